"""Text that every machine has: the source files of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pysnap.errors import NotFoundError


def standard_library(limit: int) -> bytes:
    """The first `limit` bytes of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if not text:
        raise NotFoundError(
            f"{folder} holds no .py files: run the demo with a Python that has its sources"
        )
    return bytes(text[:limit])


class Windows(Dataset[Tensor]):
    """`count` windows of `length` bytes (as int64), spread evenly over `text`."""

    def __init__(self, text: bytes, *, count: int, length: int) -> None:
        if len(text) < length:
            raise ValueError(f"a text of {len(text)} bytes has no window of {length} bytes")
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._count = count
        self._length = length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        start = index * (len(self._bytes) - self._length) // max(1, self._count - 1)
        return self._bytes[start : start + self._length].long()
