"""Data types as a manifest names them, without torch: the element type and the size of each."""

from __future__ import annotations

import functools
import re

import numpy as np

# Every torch data type that has whole bytes, by name, and the element type of its bytes. A torch
# that lacks one never shows it.
TORCH_ELEMENTS = {
    "bool": "u8",
    "uint8": "u8",
    "int8": "u8",
    "float8_e4m3fn": "u8",
    "float8_e4m3fnuz": "u8",
    "float8_e5m2": "u8",
    "float8_e5m2fnuz": "u8",
    "float8_e8m0fnu": "u8",
    "float4_e2m1fn_x2": "u8",
    "int16": "i16",
    "uint16": "i16",
    "int32": "i32",
    "uint32": "i32",
    "int64": "i64",
    "uint64": "i64",
    "float16": "f16",
    "bfloat16": "f16",
    "float32": "f32",
    "float64": "f64",
    "complex32": "f16",
    "complex64": "f32",
    "complex128": "f64",
}
ELEMENT_WIDTH = {"u8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "f32": 4, "f64": 8}

# NumPy would take much more for a dtype, and parse it.
_NUMPY = re.compile(r"[<>|][biufcmMSUV][0-9]{1,9}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?", re.ASCII)


@functools.lru_cache(256)
def itemsize(name: str) -> int:
    """Bytes of one element of a torch data type, or of a NumPy array of that `dtype.str`. Raises
    ValueError for what is neither."""
    if name in TORCH_ELEMENTS:
        return ELEMENT_WIDTH[TORCH_ELEMENTS[name]] * (2 if name.startswith("complex") else 1)
    if not _NUMPY.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no dtype")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is no dtype") from None
    if dtype.str != name or dtype.itemsize == 0:
        raise ValueError(f"{name} is no dtype of plain elements")
    return dtype.itemsize
