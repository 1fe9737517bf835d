"""What encodes and decodes chunks in one thread: pysnap, those beside it, and memcpy as a floor."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import zstandard
from payloads import Payload

from pysnap import _engine
from pysnap.zstd import zstd_libraries

CHUNK_SIZE = 4 * 2**20

PYSNAP = "pysnap"
ZSTD = "zstd-1"
ZIPNN = "ZipNN"
MEMCPY = "memcpy"

_ZIPNN_DTYPES = ("bfloat16", "float32")


class UnavailableCoderError(Exception):
    """A coder that is not installed, or does not know a type."""


class Coder(Protocol):
    """Encodes and decodes chunks of one type of element, in the thread that calls.

    What it returns may be memory that its next call uses again.
    """

    def encode(self, raw: bytearray) -> bytes | memoryview:
        """What is stored of a chunk. `raw` may be changed: ZipNN reorders it in its place."""

    def decode(self, stored: bytes, size: int) -> bytes | memoryview:
        """The chunk of `size` bytes that was stored."""


class _Memcpy:
    def __init__(self) -> None:
        self._out = memoryview(bytearray(CHUNK_SIZE))

    def encode(self, raw: bytearray) -> memoryview:
        return self._copy(raw)

    def decode(self, stored: bytes, size: int) -> memoryview:
        return self._copy(stored)

    def _copy(self, data: bytes | bytearray) -> memoryview:
        out = self._out[: len(data)]
        out[:] = data
        return out


class _Pysnap:
    def __init__(self, element: int) -> None:
        self._element = element
        self._coder = _engine.Coder(codec="fast", zstd=zstd_libraries())
        self._out = memoryview(bytearray(CHUNK_SIZE))

    def encode(self, raw: bytearray) -> memoryview:
        length = self._coder.encode(self._element, raw, self._out[: len(raw)])
        # What is not made smaller is written as it is.
        return self._out[:length] if length else memoryview(raw)

    def decode(self, stored: bytes, size: int) -> memoryview:
        out = self._out[:size]
        if len(stored) == size:
            out[:] = stored
        elif not self._coder.decode(self._element, stored, out):
            raise ValueError("pysnap cannot decode what it encoded")
        return out


class _Zstd:
    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, raw: bytearray) -> bytes:
        return self._compressor.compress(raw)

    def decode(self, stored: bytes, size: int) -> bytes:
        return self._decompressor.decompress(stored)


class _ZipNN:
    def __init__(self, dtype: str) -> None:
        try:
            with warnings.catch_warnings():
                # Its own, which pytest takes for errors.
                warnings.simplefilter("ignore")
                zipnn: Any = importlib.import_module("zipnn")
        except ImportError:
            raise UnavailableCoderError("zipnn is not installed") from None
        if dtype not in _ZIPNN_DTYPES:
            raise UnavailableCoderError(f"ZipNN does not know {dtype}")
        self._zipnn = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)

    def encode(self, raw: bytearray) -> bytes:
        stored: bytes = self._zipnn.compress(raw)
        return stored

    def decode(self, stored: bytes, size: int) -> bytes:
        raw: bytes = self._zipnn.decompress(stored)
        return raw


_CODERS: dict[str, Callable[[Payload], Coder]] = {
    PYSNAP: lambda payload: _Pysnap(payload.element),
    ZSTD: lambda _: _Zstd(),
    ZIPNN: lambda payload: _ZipNN(payload.dtype),
    MEMCPY: lambda _: _Memcpy(),
}
CODERS = tuple(_CODERS)


def open_coder(name: str, payload: Payload) -> Coder:
    """One of CODERS, for the type of `payload`. Raises UnavailableCoderError with the reason."""
    return _CODERS[name](payload)


def chunk_copies(data: memoryview) -> list[bytearray]:
    """Copies, for a coder may change what it encodes."""
    return [bytearray(data[at : at + CHUNK_SIZE]) for at in range(0, len(data), CHUNK_SIZE)]


def encode_all(coder: Coder, copies: list[bytearray]) -> None:
    """Encode them one after the other, and keep nothing: a coder that allocates its results would
    touch new pages for each, as no writer of snapshots has to."""
    for chunk in copies:
        coder.encode(chunk)
