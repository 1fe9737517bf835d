"""A writer of format 1 in plain Python, from docs/format.md: a second opinion for tests.

`save(path, state)` writes a snapshot of a state. `Writer` gives each tensor, its bytes and their
encoding by hand, `planes` encodes one chunk, and `manifest_bytes` frames a manifest of any content.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

BLOCK = 2**20
LINE = 64
ALIGNMENT = 4096
STREAMS = 8
LONGEST_CODE = 11
METHODS = RAW, CONSTANT, ZSTD, HUFFMAN, SEVEN_BITS = 0, 1, 2, 3, 4

WIDTHS = {"u8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "f32": 4, "f64": 8}


def element_of(dtype: str) -> str:
    """The element type of a torch or NumPy data type, by its name in the manifest."""
    if dtype in ("float16", "bfloat16", "complex32", "<f2"):
        return "f16"
    if dtype in ("float32", "complex64", "<f4", "<c8"):
        return "f32"
    if dtype in ("float64", "complex128", "<f8", "<c16"):
        return "f64"
    for width, names in {
        2: ("int16", "uint16", "<i2", "<u2"),
        4: ("int32", "uint32", "<i4", "<u4"),
        8: ("int64", "uint64", "<i8", "<u8"),
    }.items():
        if dtype in names:
            return f"i{8 * width}"
    return "u8"


def planes(
    raw: bytes, element: str, *, method: int | None = None, line_map: bool | None = None
) -> bytes:
    """`raw` in the encoding `planes`.

    Each plane uses `method`, or raw where that cannot hold it; None takes the smallest. `line_map`
    None writes a map where a line is zero.
    """
    blocks = [raw[start : start + BLOCK] for start in range(0, len(raw), BLOCK)]
    return b"".join(_block(block, element, method, line_map) for block in blocks)


def _block(block: bytes, element: str, method: int | None, line_map: bool | None) -> bytes:
    width = WIDTHS[element]
    whole = len(block) // LINE * LINE
    lines = [block[start : start + LINE] for start in range(0, whole, LINE)]
    bits = [any(line) for line in lines]
    if line_map is None:
        line_map = not all(bits)
    kept = block
    packed = b""
    if line_map:
        kept = b"".join(line for line, bit in zip(lines, bits, strict=True) if bit) + block[whole:]
        packed = np.packbits(np.array(bits, bool), bitorder="little").tobytes()
    values = np.frombuffer(kept, f"<u{width}")
    payloads = [_payload(plane, method) for plane in _split(values, width, element[0] == "f")]
    header = struct.pack("<BBHI", line_map, width, 0, len(kept))
    entries = [struct.pack("<BBBBI", used, 0, 0, 0, len(data)) for used, data in payloads]
    return b"".join([header, packed, *entries, *(data for _, data in payloads)])


def _split(v: np.ndarray[Any, np.dtype[Any]], width: int, is_float: bool) -> Iterable[bytes]:
    bits = 8 * width
    for plane in range(width):
        if is_float and plane == 0:
            yield _bytes(v >> (bits - 9) & 255)
        elif is_float and plane == 1:
            yield _bytes(v >> (bits - 1) << 7 | v >> (bits - 16) & 127)
        else:
            yield _bytes(v >> 8 * (width - 1 - plane) & 255)


def _bytes(values: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    return values.astype(np.uint8).tobytes()


def _payload(plane: bytes, method: int | None) -> tuple[int, bytes]:
    choices = {RAW: plane}
    if plane and method != RAW:
        choices[ZSTD] = zstandard.ZstdCompressor().compress(plane)
        if len(set(plane)) == 1:
            choices[CONSTANT] = plane[:1]
        else:
            choices[HUFFMAN] = huffman(plane)
        if max(plane) < 128:
            choices[SEVEN_BITS] = _packed("".join(f"{byte:07b}"[::-1] for byte in plane))
    if method not in choices:
        method = RAW if method is not None else min(choices, key=lambda m: len(choices[m]))
    return method, choices[method]


def huffman(plane: bytes) -> bytes:
    """`plane`, of two values at least, in a Huffman code; values that occur once are escaped if a
    value is free."""
    counts = Counter(plane)
    rare = {symbol for symbol, count in counts.items() if count == 1}
    escape = next((symbol for symbol in range(256) if symbol not in counts), None)
    if not rare or escape is None:
        rare, escape = set(), None
    weights = {symbol: count for symbol, count in counts.items() if symbol not in rare}
    if escape is not None:
        weights[escape] = len(rare)
        # A code needs two symbols.
        weights.setdefault(next(s for s in range(256) if s != escape and s not in rare), 1)
    lengths = _code_lengths(weights)
    codes, code = {}, 0
    for bits, symbol in sorted((bits, symbol) for symbol, bits in lengths.items()):
        codes[symbol] = f"{code >> (LONGEST_CODE - bits):0{bits}b}"
        code += 1 << (LONGEST_CODE - bits)
    literals = bytes(byte for byte in plane if byte in rare)
    coded = [codes[escape if byte in rare else byte] for byte in plane]
    starts = [len(plane) // STREAMS * stream for stream in range(STREAMS)] + [len(plane)]
    streams = [_packed("".join(coded[start:end])) for start, end in itertools.pairwise(starts)]
    nibbles = [lengths.get(symbol, 0) for symbol in range(256)]
    header = struct.pack("<BBHI", escape is not None, escape or 0, 0, len(literals))
    header += bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))
    sizes = struct.pack(f"<{STREAMS}I", *map(len, streams))
    return b"".join([header, sizes, *streams, literals])


def _code_lengths(weights: dict[int, int]) -> dict[int, int]:
    """Bits of each symbol; weights are made more alike until no code is too long."""
    while True:
        heap = [(weight, symbol, [symbol]) for symbol, weight in weights.items()]
        heapq.heapify(heap)
        lengths = dict.fromkeys(weights, 0)
        while len(heap) > 1:
            (one, mark, left), (two, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in left + right:
                lengths[symbol] += 1
            heapq.heappush(heap, (one + two, mark, left + right))
        if max(lengths.values()) <= LONGEST_CODE:
            return lengths
        weights = {symbol: weight // 2 + 1 for symbol, weight in weights.items()}


def _packed(bits: str) -> bytes:
    """The bits as bytes, the first one lowest."""
    array = np.frombuffer(bits.encode(), np.uint8) - ord("0")
    return np.packbits(array, bitorder="little").tobytes()


def manifest_bytes(snapshot: Any) -> bytes:
    """`manifest.json` around `snapshot`: an object, or the bytes of one."""
    body = snapshot
    if not isinstance(body, bytes):
        body = json.dumps(snapshot, ensure_ascii=False, separators=(",", ":")).encode()
    digest = xxhash.xxh3_128_hexdigest(body)
    return b'{"digest":"' + digest.encode() + b'","snapshot":' + body + b"}"


class Writer:
    """Collects tensors, then writes a snapshot. Their bytes follow each other in the stream.

    `chunk_size` is a multiple of 8. Chunks go to `packs` packs in turn, the last one first.
    """

    def __init__(
        self,
        *,
        chunk_size: int = 2**20,
        encoding: str = "planes",
        method: int | None = None,
        line_map: bool | None = None,
        packs: int = 1,
    ) -> None:
        self._chunk_size = chunk_size
        self._encoding = encoding
        self._method = method
        self._line_map = line_map
        self._packs = packs
        self._runs: list[tuple[str, bytearray]] = []
        self._stream = 0
        self.tensors: list[dict[str, Any]] = []

    def add(
        self,
        data: bytes,
        dtype: str,
        shape: Iterable[int],
        *,
        element: str | None = None,
        strides: Iterable[int] | None = None,
    ) -> int:
        """A tensor with bytes of its own; returns its index."""
        element = element or element_of(dtype)
        if not self._runs or self._runs[-1][0] != element:
            self._runs.append((element, bytearray()))
        self._runs[-1][1].extend(data)
        self._stream += len(data)
        return self.alias(self._stream - len(data), dtype, shape, strides=strides)

    def alias(
        self, at: int, dtype: str, shape: Iterable[int], *, strides: Iterable[int] | None = None
    ) -> int:
        """A tensor over bytes that the stream has or will have; returns its index."""
        entry: dict[str, Any] = {"dtype": dtype, "shape": list(shape), "at": at}
        if strides is not None:
            entry["strides"] = list(strides)
        self.tensors.append(entry)
        return len(self.tensors) - 1

    def write(self, path: str | os.PathLike[str], tree: Any, **members: Any) -> dict[str, Any]:
        """Makes the directory `path`, and returns the manifest; `members` replace its own."""
        chunks = []
        for element, data in self._runs:
            for start in range(0, len(data), self._chunk_size):
                raw = bytes(data[start : start + self._chunk_size])
                chunks.append((element, raw, *self._encoded(raw, element)))
        packs = [bytearray() for _ in range(self._packs)]
        table: list[Any] = [None] * len(chunks)
        for number, (element, raw, encoding, stored) in reversed(list(enumerate(chunks))):
            pack = packs[number % len(packs)]
            digest = xxhash.xxh3_128_hexdigest(raw)
            place = [number % len(packs), len(pack), len(stored), len(raw)]
            table[number] = [*place, element, encoding, digest]
            pack.extend(stored + bytes(-len(stored) % ALIGNMENT))
        snapshot = {
            "format": 1,
            "id": "8c7e0e0e-3a7c-4b43-9f6d-0f5f2f8e9f10",
            "step": 200,
            "sequence": 1,
            "created": "2025-01-02T03:04:05+00:00",
            "tree": tree,
            "tensors": self.tensors,
            "stream": self._stream,
            "chunk_size": self._chunk_size,
            "packs": [{"name": f"{n}.pack", "size": len(pack)} for n, pack in enumerate(packs)],
            "chunks": table,
            "metadata": {},
            **members,
        }
        directory = Path(path)
        directory.mkdir()
        for number, pack in enumerate(packs):
            (directory / f"{number}.pack").write_bytes(pack)
        (directory / "manifest.json").write_bytes(manifest_bytes(snapshot))
        return snapshot

    def _encoded(self, raw: bytes, element: str) -> tuple[str, bytes]:
        if self._encoding == "planes":
            stored = planes(raw, element, method=self._method, line_map=self._line_map)
            if len(stored) < len(raw):
                return "planes", stored
        return "raw", raw


def save(path: str | os.PathLike[str], state: Any, **options: Any) -> dict[str, Any]:
    """A snapshot of a state as the tree codec takes it; `options` are those of Writer.

    Tensors that begin at the same address share bytes, and dense ones keep their strides.
    """
    import torch

    from pysnap import tree

    writer = Writer(**options)
    known: dict[int, int] = {}

    def put(path: str, value: Any) -> int:
        if isinstance(value, np.ndarray):
            return writer.add(value.tobytes(), value.dtype.str, value.shape)
        value = value.detach().resolve_conj().resolve_neg()
        dtype = str(value.dtype).removeprefix("torch.")
        strides = None if value.is_contiguous() else value.stride()
        if value.numel() and value.data_ptr() in known:
            return writer.alias(known[value.data_ptr()], dtype, value.shape, strides=strides)
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        flat = value.as_strided((extent if value.numel() else 0,), (1,))
        data = flat.view(torch.uint8).numpy().tobytes()
        index = writer.add(data, dtype, value.shape, strides=strides)
        known[value.data_ptr()] = writer.tensors[index]["at"]
        return index

    encoded = tree.encode(state, put)
    return writer.write(path, encoded)
