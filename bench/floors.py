"""What the machine can do at best: copying the bytes of the state in memory, writing as many."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

STREAMING_STORES = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x10000"}
"""Environment in which glibc's `memmove` takes streaming stores for 64 KiB and more, as a copy that
nobody reads soon should; by default, that begins above the size of most tensors."""

_MOST_THREADS = 16
_ALIGNMENT = 64
_IN_FLIGHT = 16 * 2**20
_COPY_TRIES = 3
_WRITES_IN_FLIGHT = (1, 2, 4)
_WRITE_TRIES = 2
_READ_BLOCK = 16 * 2**20

# (destination, source, length)
_Piece = tuple[int, int, int]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def thread_counts() -> list[int]:
    """1, 2, 4 ... and the number of cores, 16 at most: few take all of the memory's speed."""
    cores = min(available_cores(), _MOST_THREADS)
    return sorted({1, cores} | {2**power for power in range(5) if 2**power <= cores})


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class Buffer:
    """Anonymous memory, in huge pages where the system has them, every page of it touched."""

    def __init__(self, size: int) -> None:
        self.size = _round_up(max(size, 1), mmap.PAGESIZE)
        self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(self.address, 1, self.size)

    def tensor(self) -> Tensor:
        """The whole of it as bytes."""
        return torch.frombuffer(self._map, dtype=torch.uint8)


class MemcpyFloor:
    """Copies tensors into memory that was touched before, with several good implementations.

    They are libc's `memmove` in 1, 2, 4 ... threads, the bytes split evenly between them, and
    torch's `copy_` with torch's threads. A process that starts with `STREAMING_STORES` in its
    environment has the faster `memmove`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sources = list(tensors)
        offsets: list[int] = []
        end = 0
        for tensor in self._sources:
            offsets.append(end)
            end = _round_up(end + tensor.nbytes, _ALIGNMENT)
        self.buffer = Buffer(end)
        whole = self.buffer.tensor()
        self._targets = [
            whole[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(offsets, self._sources, strict=True)
        ]
        pieces = [
            (self.buffer.address + offset, tensor.data_ptr(), tensor.nbytes)
            for offset, tensor in zip(offsets, self._sources, strict=True)
        ]
        self._shares = {threads: _split(pieces, threads) for threads in thread_counts()}
        self._pool = ThreadPoolExecutor(max(self._shares))
        self._ways = {
            f"memmove, {threads} threads": partial(self.copy_in_threads, threads)
            for threads in self._shares
        } | {"torch copy_": self.copy_with_torch}

    def fastest(self) -> str:
        """Name of the implementation that is the fastest now."""
        tries = {way: [self.measure(way) for _ in range(_COPY_TRIES)] for way in self._ways}
        return min(tries, key=lambda way: min(tries[way]))

    def measure(self, way: str) -> float:
        """Seconds of one copy by an implementation."""
        start = time.perf_counter()
        self._ways[way]()
        return time.perf_counter() - start

    def copy_in_threads(self, threads: int | None = None) -> None:
        """With `memmove` in one of `thread_counts()` threads; None: in as many as there are."""
        shares = self._shares[threads or max(self._shares)]
        others = [self._pool.submit(_move, share) for share in shares[1:]]
        _move(shares[0])
        for other in others:
            other.result()

    def copy_with_torch(self) -> None:
        """With `copy_`, tensor by tensor."""
        for target, source in zip(self._targets, self._sources, strict=True):
            target.copy_(source)

    def clear(self) -> None:
        """Forget what was copied, and touch the memory as when it was made."""
        ctypes.memset(self.buffer.address, 1, self.buffer.size)

    def is_copied(self) -> bool:
        """Whether the copies have the same bits as the tensors."""
        return all(
            torch.equal(_bytes(target), _bytes(source))
            for target, source in zip(self._targets, self._sources, strict=True)
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _split(pieces: list[_Piece], count: int) -> list[list[_Piece]]:
    """Shares of equal size; a piece that lies across a border is cut."""
    size = sum(length for _, _, length in pieces)
    share = _round_up(-(-size // count), _ALIGNMENT)
    shares: list[list[_Piece]] = [[]]
    room = share
    for target, source, left in pieces:
        while left:
            if not room:
                shares.append([])
                room = share
            length = min(left, room)
            shares[-1].append((target, source, length))
            target, source, left, room = (
                target + length,
                source + length,
                left - length,
                room - length,
            )
    return shares


def _move(pieces: list[_Piece]) -> None:
    move = ctypes.memmove  # leaves the GIL
    for target, source, length in pieces:
        move(target, source, length)


def write_and_sync(path: Path, data: memoryview, *, direct: bool, threads: int = 1) -> None:
    """Write a new file and make its content durable; past the page cache if `direct`. 16 MiB are in
    flight, in so many writes.

    Raises OSError (EINVAL) where the file system has no direct writes. `data` is page-aligned then.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags, 0o600)
    block = _IN_FLIGHT // threads

    def write(first: int) -> None:
        for start in range(first, len(data), _IN_FLIGHT):
            at, end = start, min(start + block, len(data))
            while at < end:
                at += os.pwrite(descriptor, data[at:end], at)

    try:
        with contextlib.suppress(OSError):
            os.posix_fallocate(descriptor, 0, len(data))
        if threads == 1:
            write(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(write, range(0, _IN_FLIGHT, block)))
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


class WriteFloor:
    """Writes `data` to a new file in `directory` and makes it durable, in the best of several ways:
    direct, with 1, 2 or 4 writes in flight (buffered where the file system has no direct writes).

    The way is chosen once, so that a repetition has one write beside it and not the luckiest of
    several.
    """

    def __init__(self, directory: Path, data: memoryview) -> None:
        self._path = directory / "floor"
        self._data = data
        self._direct = self._has_direct()
        seconds = {
            threads: min(self._write(threads) for _ in range(_WRITE_TRIES))
            for threads in _WRITES_IN_FLIGHT
        }
        self._threads = min(seconds, key=seconds.__getitem__)
        self.way = f"{'direct' if self._direct else 'buffered'}, {self._threads} in flight"

    def measure(self) -> float:
        """Seconds of one write."""
        return self._write(self._threads)

    def write(self, path: Path) -> None:
        """Write the same to a new file, which stays."""
        write_and_sync(path, self._data, direct=self._direct, threads=self._threads)

    def _write(self, threads: int) -> float:
        try:
            start = time.perf_counter()
            write_and_sync(self._path, self._data, direct=self._direct, threads=threads)
            return time.perf_counter() - start
        finally:
            self._path.unlink(missing_ok=True)

    def _has_direct(self) -> bool:
        try:
            write_and_sync(self._path, self._data[: mmap.PAGESIZE], direct=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        finally:
            self._path.unlink(missing_ok=True)
        return True


def read_floor(path: Path) -> float:
    """Seconds to read a file into memory that was touched before, in several threads."""
    size = path.stat().st_size
    threads = max(thread_counts())
    blocks = [Buffer(_READ_BLOCK).view for _ in range(threads)]
    descriptor = os.open(path, os.O_RDONLY)

    def read(thread: int) -> None:
        for at in range(thread * _READ_BLOCK, size, threads * _READ_BLOCK):
            os.preadv(descriptor, [blocks[thread]], at)

    try:
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(read, range(threads)))
            return time.perf_counter() - start
    finally:
        os.close(descriptor)
