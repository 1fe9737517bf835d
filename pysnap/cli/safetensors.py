"""The safetensors file format, written tensor by tensor.

Eight bytes (little-endian) say how long the header is; the header is JSON, `{name: {dtype, shape,
data_offsets}}`, padded with spaces to a multiple of eight; then come the elements of all tensors in
row-major order, without gaps. Readers: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from pysnap.dtypes import itemsize
from pysnap.errors import ConfigError, printable
from pysnap.layout import Leaf, dtype_name
from pysnap.view import Entry

# What elements of these names are called in the format.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}
_METADATA = "__metadata__"
# The most that readers take for a header.
_LONGEST_HEADER = 100_000_000
_PIECE = 1 << 24


def write(path: Path, entries: Mapping[str, Entry], about: Mapping[str, str]) -> None:
    """Write a new file `path` of these tensors and arrays, with `about` as its metadata; one of
    them is in memory at a time.

    Raises ConfigError, before anything is written, for a name or a dtype that the format does not
    have; OSError; and what reading raises.
    """
    # The largest elements first, so that all lie at multiples of their size.
    order = sorted(entries, key=lambda name: (-_width(entries[name]), name))
    header: dict[str, Any] = {_METADATA: dict(about)}
    end = 0
    for name in order:
        if name == _METADATA:
            raise ConfigError(f'"{name}" can be no name of a tensor in a .safetensors file')
        start, end = end, end + entries[name].nbytes
        dtype, shape = _described(name, entries[name])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise ConfigError(
            f"the names of {len(order)} tensors take {len(text)} bytes, more than a .safetensors "
            "file can have; export a part, or to .pt"
        )
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_elements(file, entries[name])


def _described(name: str, entry: Entry) -> tuple[str, list[int]]:
    dtype, shape = _DTYPES.get(_element(entry)), list(entry.shape)
    if dtype is None or (dtype == "F4" and not shape):
        raise ConfigError(
            f'"{printable(name)}" has elements of {_element(entry)}, which a .safetensors file '
            "cannot hold; leave it out by --only, or export to .pt"
        )
    if dtype == "F4":
        # Two in a byte, and counted one by one.
        shape[-1] *= 2
    return dtype, shape


def _element(entry: Entry) -> str:
    dtype = entry.dtype
    return dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype.name


def _width(entry: Entry) -> int:
    dtype = entry.dtype
    return itemsize(dtype_name(dtype)) if isinstance(dtype, torch.dtype) else dtype.itemsize


def _write_elements(file: BinaryIO, entry: Entry) -> None:
    # In a call of its own: the tensor is gone before the next one is read.
    for piece in _pieces(entry[...]):
        if isinstance(piece, np.ndarray):
            little = np.ascontiguousarray(piece, piece.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)
        elif piece.numel():
            file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _pieces(leaf: Leaf) -> Iterator[Leaf]:
    """The leaf in parts along its first axis: what is made contiguous is small."""
    if not leaf.shape:
        yield leaf
        return
    row = max(1, math.prod(leaf.shape[1:]) * leaf.dtype.itemsize)
    rows = max(1, _PIECE // row)
    for start in range(0, leaf.shape[0], rows):
        yield leaf[start : start + rows]
