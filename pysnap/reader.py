"""Reads pysnap snapshots with NumPy and zstandard alone: no torch, no extension, nothing else of pysnap.

Written from docs/format.md, and nothing but that page, so that the tests can hold the engine against
it. The file works wherever it is copied to: `python reader.py runs/gpt/step-000000200` prints a table
of the tensors.

    snapshot = read_snapshot("runs/gpt/step-000000200")
    weight = snapshot.tensors()["model/layer.weight"]     # read and checked now
    state = snapshot.tree()                               # everything
    assert verify("runs/gpt/step-000000200") == []

A snapshot is not trusted: every number is bounded before it is used, no name in it becomes anything
but a file of digits in its own directory, and nothing in it is executed or imported.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import datetime
import json
import math
import os
import pathlib
import re
import stat
import struct
import sys
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import zstandard

__all__ = ["ReaderError", "Snapshot", "digest", "read_snapshot", "verify"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Leaf: TypeAlias = "Callable[[str, int, str], Any]"

FORMAT = 1
MAX_MANIFEST = 2**30
MAX_CHUNK = 2**26
MAX_DEPTH = 64
MAX_WINDOW = 2**23
ALIGNMENT = 4096
BLOCK = 2**20
LINE = 64

# element: width in bytes, whether it is a float
ELEMENTS = {
    "u8": (1, False),
    "i16": (2, False),
    "i32": (4, False),
    "i64": (8, False),
    "f16": (2, True),
    "f32": (4, True),
    "f64": (8, True),
}

# torch data type: NumPy's, an unsigned integer of the same width where NumPy has none
DTYPES = {
    "bool": "|b1",
    "uint8": "|u1",
    "int8": "|i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
    "complex32": "<u4",
    "complex64": "<c8",
    "complex128": "<c16",
    "float8_e4m3fn": "|u1",
    "float8_e4m3fnuz": "|u1",
    "float8_e5m2": "|u1",
    "float8_e5m2fnuz": "|u1",
    "float8_e8m0fnu": "|u1",
    "float4_e2m1fn_x2": "|u1",
}


class ReaderError(ValueError):
    """The snapshot is damaged, or not of a format that this reader knows."""


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """The snapshot in the directory `path`. Reads the manifest, and checks that its packs are there; raises ReaderError."""
    snapshot = Snapshot(path)
    for number in range(len(snapshot._packs)):
        snapshot._open_pack(number).close()
    return snapshot


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Read everything; one sentence for each thing that is wrong, none if the snapshot is intact."""
    try:
        snapshot = Snapshot(path)
    except ReaderError as error:
        return [str(error)]
    findings = []
    lost = set()
    for number, pack in enumerate(snapshot._packs):
        try:
            snapshot._open_pack(number).close()
        except ReaderError as error:
            lost.add(number)
            chunks = [chunk for chunk in snapshot._chunks if chunk.pack == number]
            findings.append(f"{error}; {snapshot._held(chunks)}")
    for index, chunk in enumerate(snapshot._chunks):
        if chunk.pack not in lost:
            try:
                snapshot._read_chunk(index)
            except ReaderError as error:
                findings.append(f"{error}; {snapshot._held([chunk])}")
    return findings


class _Pack(NamedTuple):
    name: str
    size: int


class _Chunk(NamedTuple):
    start: int  # in the stream
    pack: int
    offset: int
    stored: int
    raw: int
    element: str
    encoding: str
    digest: str


class _Tensor(NamedTuple):
    dtype: str
    numpy: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    start: int  # in the stream
    end: int


class Snapshot:
    """One snapshot. Tensors are read from the packs when they are asked for; ReaderError says what is damaged."""

    manifest: dict[str, Any]
    """The object `snapshot` of the manifest, as it was parsed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self.manifest = _read_manifest(self._path)
