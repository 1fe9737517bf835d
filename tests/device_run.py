"""A snapshot of the memory of two devices on the driver of tests/cpp/fake_cuda, and its way back.

    python device_run.py FOLDER EAGER

What torch does on a GPU is done by hand: memory, streams, a kernel of the next step. EAGER is the
number of chunks that are copied at once, -1 for all.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pysnap import _engine
from pysnap.capture import zstd_libraries

LATE_COPIES = 1
CHUNK = 16384
LENGTH = 40_000  # of a tensor
DEVICES = [0, 1, 0, 1]  # of each tensor

_INT, _SIZE, _U64, _POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
# Place in the table of controls, result, arguments; fake_cuda.h has the table.
_CONTROLS: dict[str, tuple[int, Any, tuple[Any, ...]]] = {
    "allocate": (1, _U64, (_INT, _SIZE)),
    "poke": (3, None, (_U64, _POINTER, _SIZE)),
    "peek": (4, None, (_U64, _POINTER, _SIZE)),
    "make_stream": (5, _POINTER, (_INT,)),
    "fill": (6, None, (_INT, _POINTER, _U64, ctypes.c_uint8, _SIZE)),
    "set_late": (7, None, (_INT,)),
    "finish": (11, None, ()),
    "fail_call": (12, None, (ctypes.c_char_p, ctypes.c_uint, _INT)),
    "pageable_copies": (18, ctypes.c_uint, ()),
    "registered": (19, _SIZE, ()),
    "violation": (20, ctypes.c_char_p, ()),
}


def controls() -> dict[str, Any]:
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_cuda.restype = ctypes.POINTER(_POINTER * 22)
    table = library.fake_cuda().contents
    return {
        name: ctypes.CFUNCTYPE(result, *arguments)(table[index])
        for name, (index, result, arguments) in _CONTROLS.items()
    }


def spans(length: int) -> np.ndarray[Any, np.dtype[np.void]]:
    sizes = [min(CHUNK, length - at) for at in range(0, length, CHUNK)]
    return np.array([(size, 0) for size in sizes], dtype=_engine.SPAN)


def main(folder: Path, eager: int) -> None:
    assert _engine.cuda_unavailable() is None
    fake = controls()
    tensors = [np.random.default_rng(index).bytes(LENGTH) for index in range(len(DEVICES))]
    addresses = [fake["allocate"](device, LENGTH) for device in DEVICES]
    for address, tensor in zip(addresses, tensors, strict=True):
        fake["poke"](address, tensor, LENGTH)
    streams = {device: fake["make_stream"](device) for device in DEVICES}
    places = list(zip(addresses, DEVICES, strict=True))

    engine = _engine.Engine(
        chunk_size=CHUNK,
        slots=32,
        workers=2,
        copy_threads=2,
        nice=0,
        direct_io=True,
        codec="fast",
        zstd=zstd_libraries(),
    )
    engine.reserve(len(DEVICES) * LENGTH, sorted(streams))
    engine.wait_reserved()
    assert engine.why_pageable() is None

    fake["set_late"](LATE_COPIES)
    extents = np.array([(a, LENGTH, d) for a, d in places], dtype=_engine.EXTENT)
    chunks = spans(len(DEVICES) * LENGTH)
    job = engine.begin(extents, chunks, eager if eager >= 0 else len(chunks))
    job.capture(list(streams.items()))
    if eager >= 0:
        job.gate(list(streams.items()))
    for address, device in places:
        fake["fill"](device, streams[device], address, 0xDD, LENGTH)
    pack = folder / "0.pack"
    job.open_pack(str(pack))
    job.wait_written()
    written, size = job.finish()
    fake["finish"]()
    assert memory(fake, addresses[0]) == bytes([0xDD]) * LENGTH

    targets = [(index * LENGTH, a, LENGTH, d) for index, (a, d) in enumerate(places)]
    _engine.restore(
        packs=[(str(pack), size)],
        chunks=written,
        targets=np.array(targets, dtype=_engine.TARGET),
        threads=2,
        zstd=zstd_libraries(),
        streams=list(streams.items()),
        engine=engine,
    )
    assert [memory(fake, address) for address in addresses] == tensors
    engine.close()
    assert fake["pageable_copies"]() == 0
    assert fake["violation"]() == b"", fake["violation"]()


def memory(fake: dict[str, Any], address: int) -> bytes:
    found = ctypes.create_string_buffer(LENGTH)
    fake["peek"](address, found, LENGTH)
    return found.raw


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
