"""Types of the C++ engine. It deals in addresses and chunks; layout.py and restore.py give them
meaning."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

_Object = TypeVar("_Object")
_Result = TypeVar("_Result")

EXTENT: np.dtype[np.void]
"""address (u8), length (u8), device (i4; -1 is the host)"""
SPAN: np.dtype[np.void]
"""raw (u4), element (u1)"""
CHUNK: np.dtype[np.void]
"""pack, raw, stored (u4), element, encoding (u1), offset, digest_high, digest_low (u8)"""
TARGET: np.dtype[np.void]
"""offset, address, length (u8), device (i4)"""
TRACED: np.dtype[np.void]
"""start, end (u8: nanoseconds of CLOCK_MONOTONIC), amount (u8: bytes), thread (u4), phase (u1)"""
PHASES: tuple[str, ...]

class Job:
    def capture(self, streams: Sequence[tuple[int, int]] = ...) -> None:
        """Copy the eager chunks; blocks for the copy of host memory. Copies of CUDA devices are
        queued: after what `streams` (device, handle) have queued, before what is queued on them
        next. Every CUDA device of the extents must be named. The tensors must live until
        `wait_staged`. Failures are kept for `wait_written` and `finish`."""

    def gate(self, streams: Sequence[tuple[int, int]] = ...) -> None:
        """Return when every byte on the host has been read, and `streams` wait until every byte
        on a device has been."""

    def open_pack(self, path: str) -> None:
        """Create the pack and reserve its space; from then on chunks are written."""

    def wait_staged(self, timeout: float | None = None) -> bool:
        """True once no tensor is read any more, on the host or a device, and may be freed; False
        after `timeout` seconds."""

    def wait_written(self, timeout: float | None = None) -> bool:
        """False after `timeout` seconds; raises the failure of the job."""

    def finish(self) -> tuple[NDArray[np.void], int]:
        """Make the pack durable; the chunk table and the length of the pack."""

    def abort(self) -> None: ...

class Engine:
    def __init__(
        self,
        *,
        chunk_size: int,
        slots: int,
        workers: int,
        copy_threads: int,
        nice: int,
        direct_io: bool,
        codec: str,
        zstd: Sequence[str],
        disk_seconds: float = ...,
    ) -> None:
        """`codec` is that of the setting; without `zstd` integers are stored larger.
        `disk_seconds`: how long `capture` and `gate` wait for a disk that takes nothing."""

    def reserve(self, size: int, devices: Sequence[int] = ..., eager: int = 0) -> None:
        """Have staging memory made ready in the background, pinned where `devices` has a CUDA
        device; on these, memory for a copy of `eager` bytes that cannot wait, unless that is too
        much. Raises where a device cannot be used."""

    def wait_reserved(self) -> None: ...
    def why_pageable(self) -> str | None:
        """Why staging memory that CUDA devices copy to is not pinned; None if it is, or need not
        be."""

    def begin(self, extents: NDArray[np.void], spans: NDArray[np.void], eager: int) -> Job: ...
    def close(self) -> None: ...

class TensorPlaces:
    """Where the bytes of some tensors are, and what they mean, without the tensors."""

    def __init__(self, exchange: object, tensors: list[Any]) -> None:
        """`exchange` is the capsule `__dlpack_c_exchange_api__` of their types. Raises ConfigError
        for another object, and what the exchange raises for a tensor that it cannot describe."""

    def are_of(self, tensors: list[Any]) -> bool:
        """Whether as many tensors have the same address, device, dtype, shape and strides, one by
        one; raises what the exchange raises."""

class Level:
    """Some lists, tuples, dicts and OrderedDicts: the length of each, which are mappings, their
    keys (of types str and int) and the types of what is in them, one container after the other."""

    def __init__(
        self, *, lengths: list[int], is_mapping: list[bool], keys: list[Any], kinds: list[type]
    ) -> None: ...
    def open(self, containers: list[Any]) -> list[Any] | None:
        """What is in other containers of the same types, one after the other; None where it is not
        of the same types, or not under the same keys."""

def map_ahead(function: Callable[[_Object], _Result], objects: list[_Object]) -> list[_Result]:
    """`list(map(function, objects))`, several times as fast where that waits for the memory: for
    many tensors, of which `function` asks something small."""

def restore(
    *,
    packs: Sequence[tuple[str, int]],
    chunks: NDArray[np.void],
    targets: NDArray[np.void],
    threads: int,
    zstd: Sequence[str],
    streams: Sequence[tuple[int, int]] = ...,
    engine: Engine | None = ...,
) -> None:
    """Copy checked chunks into `targets`. Those on CUDA devices are written after what `streams`
    have queued, and are whole on return; every device must be named. They go through the staging
    memory of `engine`, which has no job in flight, where that is large enough."""

def verify(
    *,
    packs: Sequence[tuple[str, int]],
    chunks: NDArray[np.void],
    threads: int,
    zstd: Sequence[str],
) -> list[tuple[int, str, int]]:
    """Each damaged chunk, what is wrong, and the errno where the system refused, else 0."""

class Coder:
    """The encoder and decoder of one thread, for benchmarks and tests."""

    def __init__(self, *, codec: str, zstd: Sequence[str]) -> None: ...
    def encode(self, element: int, raw: Buffer, out: Buffer) -> int:
        """Encode into `out`, which is as large as `raw`; the length, 0 where it is not smaller."""

    def decode(self, element: int, encoded: Buffer, out: Buffer) -> bool:
        """False unless `encoded` holds exactly the bytes of `out`, which then has rubbish."""

def digest(data: Buffer) -> str: ...
def has_zstd(names: Sequence[str]) -> bool: ...
def write_file(path: str, data: Buffer) -> None:
    """Create a file that must not exist (0600), whole and durable. Raises StorageError."""

def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Raises StorageError."""

def call_in_main_thread(call: Callable[[], object]) -> bool:
    """Have `call` made by the main thread between two of its instructions; False while too many
    wait for that. What it raises is raised there."""

def cuda_unavailable() -> str | None:
    """Why CUDA cannot be used, or None. Starts the driver, after which forked children cannot use
    CUDA: for a process that has tensors there."""

def trace(on: bool) -> None:
    """Begin or end to note what each thread does when."""

def take_spans() -> tuple[NDArray[np.void], list[tuple[int, str]], int]:
    """What was noted since the last call; the number and name of every thread that ever noted
    something; how many spans found no room since the last call."""

def available_processors() -> int: ...
def simd_path() -> str: ...
