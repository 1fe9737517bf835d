"""Reads pysnap snapshots with NumPy and zstandard alone: no torch, no extension, no other module.

Written from docs/format.md, so that the tests can hold the engine against it, and so that a
snapshot opens on any laptop. The file works wherever it is copied to: `python reader.py SNAPSHOT`
prints a table of the tensors.

    snapshot = read_snapshot("runs/gpt/step-000000200")
    weight = snapshot.tensors()["model/layer.weight"]    # read and checked now
    state = snapshot.tree()                              # everything, with arrays for tensors
    assert verify("runs/gpt/step-000000200") == []

A snapshot is not trusted: every number is bounded before it is used, the only files that it can
name are packs in its own directory, and nothing is executed or imported because of it.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import datetime
import itertools
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import zstandard

__all__ = ["ReaderError", "Snapshot", "digest", "read_snapshot", "verify"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# element: its width in bytes, and whether it is a float
ELEMENTS = {
    "u8": (1, False), "i16": (2, False), "i32": (4, False), "i64": (8, False),
    "f16": (2, True), "f32": (4, True), "f64": (8, True),
}  # fmt: skip

# torch data type: that of NumPy, or an unsigned integer of the same width where NumPy has none
DTYPES = {
    "bool": "|b1", "uint8": "|u1", "int8": "|i1", "uint16": "<u2", "int16": "<i2", "uint32": "<u4",
    "int32": "<i4", "uint64": "<u8", "int64": "<i8", "float16": "<f2", "bfloat16": "<u2",
    "float32": "<f4", "float64": "<f8", "complex32": "<u4", "complex64": "<c8",
    "complex128": "<c16", "float8_e4m3fn": "|u1", "float8_e4m3fnuz": "|u1", "float8_e5m2": "|u1",
    "float8_e5m2fnuz": "|u1", "float8_e8m0fnu": "|u1", "float4_e2m1fn_x2": "|u1",
}  # fmt: skip

_MAX_MANIFEST = 2**30
_MAX_CHUNK = 2**26
_MAX_DEPTH = 64
_MAX_DIMENSIONS = 64
_MAX_INT = 2**63 - 1
_MOMENTS: dict[str, type[datetime.datetime] | type[datetime.date] | type[datetime.time]] = {
    "$datetime": datetime.datetime,
    "$date": datetime.date,
    "$time": datetime.time,
}
_MAX_WINDOW = 2**23
_ALIGNMENT = 4096
_BLOCK = 2**20
_LINE = 64
_STREAMS = 8  # of a plane in a Huffman code
_LONGEST_CODE = 11  # bits
_CACHED_CHUNKS = 4


class ReaderError(ValueError):
    """The snapshot is damaged, or of a format that this reader does not know."""


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """The snapshot in the directory `path`: its manifest is read, and its packs are there."""
    snapshot = Snapshot(path)
    for pack in snapshot._packs:
        snapshot._open(pack).close()
    return snapshot


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Reads everything. One sentence for each thing that is wrong, none if all is intact."""
    try:
        snapshot = Snapshot(path)
    except ReaderError as error:
        return [str(error)]
    findings = []
    unreadable = set()
    for pack in snapshot._packs:
        try:
            snapshot._open(pack).close()
        except ReaderError as error:
            unreadable.add(pack)
            chunks = [chunk for chunk in snapshot._chunks if chunk.pack == pack]
            findings.append(f"{error}; {snapshot._holds(chunks)}")
    for chunk in snapshot._chunks:
        if chunk.pack not in unreadable:
            try:
                snapshot._decoded(chunk)
            except (ReaderError, MemoryError) as error:
                findings.append(f"{error or 'no memory'}; {snapshot._holds([chunk])}")
    return findings


class Snapshot:
    """A snapshot on disk. Chunks are read when a tensor is asked for; damage raises ReaderError."""

    manifest: dict[str, Any]
    """The object `snapshot` of `manifest.json`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        try:
            self.manifest = self._read_manifest()
            self._packs, self._chunks = _packs_and_chunks(self.manifest)
            stream = self.manifest["stream"]
            self._tensors = [_tensor(entry, stream) for entry in _list(self.manifest["tensors"])]
            self._names: dict[str, int] = {}
            uses: dict[str, int] = {}
            for name, index in self._leaves():
                unique, count = name, uses.get(name, 1)
                while unique in self._names:
                    count += 1
                    unique = f"{name}#{count}"
                uses[name] = count
                self._names[unique] = index
        except ReaderError:
            raise
        except KeyError as error:
            raise ReaderError(f"manifest.json has no {error}") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ReaderError(f"manifest.json is malformed: {_shown(str(error))}") from error
        self._regions = _merged(self._tensors)
        _check_shared([tensor for tensor in self._tensors if tensor.dtype in DTYPES])
        self._live: weakref.WeakValueDictionary[int, Array] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[_Chunk, Array] = OrderedDict()

    def tensors(self) -> Mapping[str, Array]:
        """Arrays by name, such as "optimizer/state/0/exp_avg"; read at each access.

        bfloat16, float8 and other types that NumPy lacks come as unsigned integers of the same
        width. Arrays that shared bytes when they were saved share them again while one is alive.
        """
        return _Tensors(self)

    def dtype_of(self, name: str) -> str:
        """The torch data type of a tensor, such as "bfloat16"; the `dtype.str` of a NumPy array."""
        return self._tensors[self._names[name]].dtype

    def tree(self) -> Any:
        """The whole state as plain Python, with arrays for tensors.

        torch's own types become plain ones: a dtype or device its name, a Size a tuple, a Generator
        a dict of its device and its state as bytes. An enum member becomes "module.Class.MEMBER", a
        path a PurePosixPath.
        """
        return _plain(self.manifest["tree"], "", 0, lambda path, index, tag: self._array(index))

    def _read_manifest(self) -> dict[str, Any]:
        with _open_file(os.path.join(self._path, "manifest.json")) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_MANIFEST:
                raise ReaderError("manifest.json is too large")
            # Room for all that is asked for is allocated before anything is read.
            data = memoryview(file.read(size))
        frame = re.match(rb'\{"digest":"([0-9a-f]{32})","snapshot":(?=\{)', data)
        if frame is None or bytes(data[-2:]) != b"}}":
            raise ReaderError("manifest.json does not have the form of a manifest")
        body = data[frame.end() : -1]
        if digest(body) != frame[1].decode():
            raise ReaderError("manifest.json does not match its digest")
        manifest = json.loads(
            str(body, "utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
        if type(manifest["format"]) is not int or manifest["format"] != 1:
            raise ReaderError(f"format {manifest['format']!r:.80} is unknown; use a newer reader")
        for name, kind in (("id", str), ("created", str), ("metadata", dict)):
            if type(manifest[name]) is not kind:
                raise ReaderError(f"{name} in manifest.json is not of type {kind.__name__}")
        for name in ("step", "sequence", "stream"):
            _number(manifest[name], 0, _MAX_INT, name)
        result: dict[str, Any] = manifest
        return result

    def _leaves(self) -> list[tuple[str, int]]:
        """Path and index of every tensor and array, in the order of the tree."""
        found = []

        def visit(path: str, index: Any, tag: str) -> None:
            tensor = self._tensors[_number(index, 0, len(self._tensors) - 1, tag)]
            if (tensor.dtype in DTYPES) != (tag == "$tensor"):
                raise ReaderError(f'{tag} at "{_shown(path)}" has dtype {tensor.dtype}')
            found.append((path, index))

        _plain(self.manifest["tree"], "", 0, visit)
        return found

    def _open(self, pack: _Pack) -> BinaryIO:
        file = _open_file(os.path.join(self._path, pack.name))
        size = os.fstat(file.fileno()).st_size
        if size != pack.size:
            file.close()
            raise ReaderError(f"{pack.name} has {size} bytes instead of {pack.size}")
        return file

    def _decoded(self, chunk: _Chunk) -> Array:
        """The raw bytes of a chunk, checked."""
        width, is_float = ELEMENTS[chunk.element]
        try:
            with self._open(chunk.pack) as file:
                file.seek(chunk.offset)
                data = file.read(_aligned(chunk.stored))
            if len(data) != _aligned(chunk.stored):
                raise ReaderError("the file is cut short")
            if data[chunk.stored :].strip(b"\0"):
                raise ReaderError("the bytes behind it are not zero")
            if chunk.encoding == "raw":
                raw = np.frombuffer(data, np.uint8, chunk.stored)
            else:
                raw = _decode_planes(data[: chunk.stored], chunk.raw, width, is_float)
            if digest(raw) != chunk.digest:
                raise ReaderError("its bytes do not match its digest")
        except (OSError, ReaderError) as error:
            raise ReaderError(
                f"the chunk at {chunk.offset} of {chunk.pack.name}: {error}"
            ) from error
        return raw

    def _cached(self, chunk: _Chunk) -> Array:
        if chunk not in self._recent:
            if len(self._recent) == _CACHED_CHUNKS:
                self._recent.popitem(last=False)
            self._recent[chunk] = self._decoded(chunk)
        self._recent.move_to_end(chunk)
        return self._recent[chunk]

    def _region(self, start: int, end: int) -> Array:
        """The bytes of the stream from `start` to `end`: one array for all who ask."""
        region = self._live.get(start)
        if region is None:
            region = np.empty(end - start, np.uint8)
            first = bisect.bisect_right(self._chunks, start, key=lambda chunk: chunk.start) - 1
            for chunk in self._chunks[first:]:
                if chunk.start >= end:
                    break
                low, high = max(start, chunk.start), min(end, chunk.start + chunk.raw)
                raw = self._cached(chunk)
                region[low - start : high - start] = raw[low - chunk.start : high - chunk.start]
            self._live[start] = region
        return region

    def _array(self, index: int) -> Array:
        tensor = self._tensors[index]
        if tensor.start == tensor.end:
            return np.empty(tensor.shape, tensor.numpy)
        number = bisect.bisect_right(self._regions, (tensor.start, _MAX_INT)) - 1
        start, end = self._regions[number]
        try:
            region = self._region(start, end)
        except MemoryError:
            raise ReaderError(f"there is no memory for {end - start} bytes") from None
        array: Array = np.ndarray(
            tensor.shape, tensor.numpy, region, tensor.start - start, tensor.strides
        )
        return array

    def _holds(self, chunks: Sequence[_Chunk]) -> str:
        """Which tensors have bytes in these chunks, for a finding."""
        names = []
        for name, index in self._names.items():
            tensor = self._tensors[index]
            last = bisect.bisect_left(chunks, tensor.end, key=lambda chunk: chunk.start) - 1
            if last >= 0 and tensor.start < chunks[last].start + chunks[last].raw:
                names.append(f'"{_shown(name)}"')
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"it holds {', '.join(names[:3]) or 'no tensor'}{more}"


class _Tensors(Mapping[str, Array]):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __getitem__(self, name: str) -> Array:
        return self._snapshot._array(self._snapshot._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshot._names)

    def __len__(self) -> int:
        return len(self._snapshot._names)


class _Pack(NamedTuple):
    name: str
    size: int


class _Chunk(NamedTuple):
    start: int  # in the stream
    raw: int
    pack: _Pack
    offset: int
    stored: int
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


# The manifest.


def _open_file(path: str) -> BinaryIO:
    """An ordinary file for reading: no link, and nothing that could block, such as a pipe."""
    flags = os.O_RDONLY
    for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    name = os.path.basename(path)
    try:
        file = os.open(path, flags)
    except OSError as error:
        raise ReaderError(f"cannot open {name}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ReaderError(f"{name} is not an ordinary file")
    return os.fdopen(file, "rb")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ReaderError("an object in manifest.json has a key twice")
    return result


def _no_constant(text: str) -> None:
    raise ReaderError(f"manifest.json has a number {text}")


def _number(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ReaderError(f"{what} in manifest.json is not an integer from {low} to {high}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ReaderError("manifest.json has something else where text belongs")
    if re.search("[\ud800-\udfff]", value):
        raise ReaderError("manifest.json has text with half a surrogate pair")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ReaderError("manifest.json has something else where a list belongs")
    return value


def _shown(text: str) -> str:
    """`text` without characters that could upset a terminal, and not too long."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _packs_and_chunks(manifest: dict[str, Any]) -> tuple[list[_Pack], list[_Chunk]]:
    packs = []
    for entry in _list(manifest["packs"]):
        name = entry["name"]
        if type(name) is not str or not re.fullmatch(r"[0-9]{1,9}\.pack", name):
            raise ReaderError("a pack in manifest.json has a name that is not digits and .pack")
        packs.append(_Pack(name, _number(entry["size"], 0, _MAX_INT, "the size of a pack")))
    if len({pack.name for pack in packs}) != len(packs):
        raise ReaderError("a pack in manifest.json is named twice")
    limit = _number(manifest["chunk_size"], 1, _MAX_CHUNK, "chunk_size")
    chunks = []
    start = 0
    for entry in _list(manifest["chunks"]):
        number, offset, stored, raw, element, encoding, checksum = _list(entry)
        pack = packs[_number(number, 0, len(packs) - 1, "the pack of a chunk")]
        _number(raw, 1, limit, "the raw length of a chunk")
        _number(stored, 1, raw, "the stored length of a chunk")
        _number(offset, 0, pack.size - _aligned(stored), "the offset of a chunk")
        if offset % _ALIGNMENT or element not in ELEMENTS:
            raise ReaderError("a chunk in manifest.json is not aligned, or has an unknown element")
        if raw % ELEMENTS[element][0]:
            raise ReaderError("a chunk in manifest.json is not made of whole elements")
        if encoding not in ("raw", "planes") or (encoding == "raw") != (stored == raw):
            raise ReaderError("a chunk in manifest.json has an encoding that is not its length")
        if type(checksum) is not str or not re.fullmatch("[0-9a-f]{32}", checksum):
            raise ReaderError("a chunk in manifest.json has no digest")
        chunks.append(_Chunk(start, raw, pack, offset, stored, element, encoding, checksum))
        start += raw
    if start != manifest["stream"]:
        raise ReaderError("the chunks in manifest.json do not add up to the stream")
    placed = sorted(chunks, key=lambda chunk: (chunk.pack, chunk.offset))
    for first, second in itertools.pairwise(placed):
        if first.pack == second.pack and first.offset + first.stored > second.offset:
            raise ReaderError("chunks in manifest.json overlap")
    return packs, chunks


def _tensor(entry: Any, stream: int) -> _Tensor:
    name = entry["dtype"]
    dtype = _numpy_dtype(DTYPES.get(name, name))
    shape = [_number(size, 0, _MAX_INT, "a size of a tensor") for size in _list(entry["shape"])]
    if len(shape) > _MAX_DIMENSIONS or dtype.itemsize == 0:
        raise ReaderError("a tensor in manifest.json has too many dimensions, or no element size")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MAX_INT:
        raise ReaderError("a tensor in manifest.json is too large")
    if "strides" in entry:
        strides = [_number(step, 0, _MAX_INT, "a stride") for step in _list(entry["strides"])]
        if len(strides) != len(shape):
            raise ReaderError("a tensor in manifest.json has other strides than dimensions")
    else:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # The stride of an axis of one element moves nothing, and may be too large for NumPy.
    strides = [step if size > 1 else 0 for size, step in zip(shape, strides, strict=True)]
    extent = 0
    if math.prod(shape):
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    extent *= dtype.itemsize
    # One without elements occupies no bytes, wherever it stands.
    last = stream - extent if extent else _MAX_INT
    start = _number(entry["at"], 0, last, "the offset of a tensor")
    steps = tuple(step * dtype.itemsize for step in strides)
    return _Tensor(name, dtype, tuple(shape), steps, start, start + extent)


def _numpy_dtype(name: Any) -> np.dtype[Any]:
    pattern = r"[<>|][biufcmMSUV][0-9]{1,9}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?"
    if type(name) is not str or not re.fullmatch(pattern, name) or np.dtype(name).str != name:
        raise ReaderError("manifest.json has an unknown dtype")
    return np.dtype(name)


def _check_shared(tensors: list[_Tensor]) -> None:
    """Tensors that share bytes must be able to be views of one storage."""
    regions = _merged(tensors)
    members: dict[int, list[_Tensor]] = {}
    for tensor in tensors:
        if tensor.start < tensor.end:
            region = bisect.bisect_right(regions, (tensor.start, _MAX_INT)) - 1
            members.setdefault(region, []).append(tensor)
    for group in members.values():
        largest = max(group, key=lambda tensor: tensor.numpy.itemsize)
        if any((t.start - largest.start) % t.numpy.itemsize for t in group):
            raise ReaderError("tensors in manifest.json overlap by parts of an element")


def _merged(tensors: Iterable[_Tensor]) -> list[tuple[int, int]]:
    """The parts of the stream that tensors cover; those that share bytes lie in one part."""
    regions: list[tuple[int, int]] = []
    for start, end in sorted((t.start, t.end) for t in tensors if t.start < t.end):
        if regions and start < regions[-1][1]:
            regions[-1] = (regions[-1][0], max(regions[-1][1], end))
        else:
            regions.append((start, end))
    return regions


# The tree.


def _plain(node: Any, path: str, depth: int, leaf: Callable[[str, Any, str], Any]) -> Any:
    """The Python value of a node; `leaf` makes that of a tensor from its path, index and tag."""
    if isinstance(node, float) and not math.isfinite(node):
        raise ReaderError("manifest.json has a number that is too large")
    if isinstance(node, str):
        return _text(node)
    if not isinstance(node, (dict, list)):
        return node
    tag, content = _tagged(node)
    if tag in ("$tensor", "$array"):
        return leaf(path, content, tag)
    if tag not in _SEQUENCES and tag not in _MAPPINGS:
        return _value(tag, content)
    if depth == _MAX_DEPTH:
        raise ReaderError("the tree is nested too deep")
    entries: list[tuple[Any, str, Any]]
    if tag in _SEQUENCES:
        entries = [(None, str(number), child) for number, child in enumerate(_list(content))]
    elif tag == "dict":
        entries = [(_text(key), key, child) for key, child in content.items()]
    else:
        pairs = map(_list, _list(content))
        entries = [(*_key(key, depth + 1), child) for key, child in pairs]
    inner = _no_leaf if tag in ("$set", "$frozenset") else leaf
    values = [
        _plain(child, f"{path}/{part}" if path else part, depth + 1, inner)
        for _, part, child in entries
    ]
    if tag in _SEQUENCES:
        made = _SEQUENCES[tag](values)
    else:
        made = _MAPPINGS[tag](
            {entry[0]: value for entry, value in zip(entries, values, strict=True)}
        )
    if len(made) != len(values):
        raise ReaderError(f'the {tag} at "{_shown(path)}" has an element or a key twice')
    return made


def _no_leaf(path: str, index: Any, tag: str) -> None:
    raise ReaderError(f'the {tag} at "{_shown(path)}" is in a set')


def _tagged(node: list[Any] | dict[str, Any]) -> tuple[str, Any]:
    """The tag of a node and its content; those that have none get "list" and "dict"."""
    if isinstance(node, list):
        return "list", node
    tag = next((key for key in node if key.startswith("$")), "dict")
    if tag == "dict":
        return tag, node
    if len(node) != 1:
        raise ReaderError(f"the tree has other keys beside {_shown(tag)}")
    return tag, node[tag]


def _key(node: Any, depth: int) -> tuple[Any, str]:
    """A key of a dict, and how it reads in a path."""
    if not isinstance(node, (dict, list)):
        return _plain(node, "", 0, _no_leaf), node if isinstance(node, str) else repr(node)
    tag, content = _tagged(node)
    if tag == "$tuple" and depth < _MAX_DEPTH:
        items = [_key(item, depth + 1) for item in _list(content)]
        return tuple(key for key, _ in items), f"({', '.join(part for _, part in items)})"
    if tag not in ("$float", "$bytes", "$enum"):
        raise ReaderError(f"the tree has a {_shown(tag)} as a key, or keys nested too deep")
    key = _value(tag, content)
    return key, ".".join(content[1:]) if tag == "$enum" else repr(key)


_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list, "$tuple": tuple, "$set": set, "$frozenset": frozenset,
}  # fmt: skip
_MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "dict": dict, "$dict": dict, "$ordered": OrderedDict, "$counter": Counter,
}  # fmt: skip


def _value(tag: str, content: Any) -> Any:
    """The value of a node that holds no others."""
    if tag == "$float" and re.fullmatch("[0-9a-f]{16}", content):
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if tag == "$bytes":
        return base64.b64decode(content, validate=True)
    if tag == "$scalar":
        return _scalar(*_list(content))
    if tag == "$dtype":
        return _text(content)
    if tag == "$device":
        return _device(content)
    if tag == "$size":
        return tuple(_number(size, -_MAX_INT - 1, _MAX_INT, "a size") for size in _list(content))
    if tag == "$generator":
        state = base64.b64decode(content["state"], validate=True)
        return {"device": _device(content["device"]), "state": state}
    if tag in _MOMENTS:
        moment = _MOMENTS[tag].fromisoformat(content)
        if moment.isoformat() != content:
            raise ReaderError(f"{tag} is not in the form of isoformat()")
        return moment
    if tag == "$timedelta":
        parts = [_number(part, -_MAX_INT - 1, _MAX_INT, tag) for part in _list(content)]
        days, seconds, microseconds = parts
        duration = datetime.timedelta(days, seconds, microseconds)
        if [duration.days, duration.seconds, duration.microseconds] != parts:
            raise ReaderError("$timedelta is not days, seconds below a day and microseconds")
        return duration
    if tag == "$path":
        return pathlib.PurePosixPath(content)
    if tag == "$enum":
        module, name, member = _list(content)
        return ".".join((module, name, member))
    raise ReaderError(f"the tree has an unknown or malformed {_shown(tag)}")


def _device(content: Any) -> str:
    name = _text(content)
    if not re.fullmatch("[a-z]+(:(0|[1-9][0-9]*))?", name):
        raise ReaderError("a device in manifest.json is none")
    return name


def _scalar(name: str, text: str) -> np.generic:
    data = base64.b64decode(text, validate=True)
    scalar: np.generic
    if re.fullmatch("<U[0-9]+", name):
        scalar = np.str_(data.decode("utf-32-le"))
    elif re.fullmatch(r"\|S[0-9]+", name):
        scalar = np.bytes_(data)
    else:
        (scalar,) = np.frombuffer(data, _numpy_dtype(name))
    return scalar


# Chunks.


class _Bytes:
    """Bytes that are taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > self.left():
            raise ReaderError("its encoding is cut short")
        self._at += size
        return self._data[self._at - size : self._at]

    def left(self) -> int:
        return len(self._data) - self._at


def _decode_planes(data: bytes, raw: int, width: int, is_float: bool) -> Array:
    source = _Bytes(data)
    out = np.empty(raw, np.uint8)
    for start in range(0, raw, _BLOCK):
        _decode_block(source, out[start : start + _BLOCK], width, is_float)
    if source.left():
        raise ReaderError("bytes follow its last block")
    return out


def _decode_block(source: _Bytes, out: Array, width: int, is_float: bool) -> None:
    flags, planes, reserved, kept = struct.unpack("<BBHI", source.take(8))
    if flags > 1 or planes != width or reserved:
        raise ReaderError("a block has an unknown header")
    lines = np.ones(len(out) // _LINE, bool)
    if flags:
        bits = np.frombuffer(source.take(-(-len(lines) // 8)), np.uint8)
        bits = np.unpackbits(bits, bitorder="little")
        if bits[len(lines) :].any():
            raise ReaderError("a line map is longer than its block")
        lines = bits[: len(lines)].astype(bool)
    whole = int(lines.sum()) * _LINE
    if kept != whole + len(out) % _LINE or kept % width:
        raise ReaderError("a block keeps another number of bytes than it says")
    entries = [struct.unpack("<B3sI", source.take(8)) for _ in range(width)]
    values = np.empty((kept // width, width), np.uint8)
    for place, (method, zeros, size) in zip(range(width - 1, -1, -1), entries, strict=True):
        if zeros != b"\0\0\0":
            raise ReaderError("a plane has an unknown header")
        values[:, place] = _decode_plane(method, source.take(size), len(values))
    if is_float:
        exponent, rest = values[:, width - 1].copy(), values[:, width - 2].copy()
        values[:, width - 1] = rest & 0x80 | exponent >> 1
        values[:, width - 2] = exponent << 7 | rest & 0x7F
    flat = values.reshape(-1)
    rows = out[: len(lines) * _LINE].reshape(-1, _LINE)
    rows[lines] = flat[:whole].reshape(-1, _LINE)
    rows[~lines] = 0
    out[len(lines) * _LINE :] = flat[whole:]


def _decode_plane(method: int, payload: bytes, size: int) -> Array:
    if method == 1 and size and len(payload) == 1:
        return np.full(size, payload[0], np.uint8)
    if method == 2 and size:
        try:
            # A frame that says its size is decoded to that size, whatever the limit.
            if zstandard.frame_content_size(payload) in (size, -1):
                decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
                payload = decoder.decompress(payload, size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ReaderError(f"a zstd frame is damaged: {error}") from error
        method = 0
    if method == 3:
        return _decode_huffman(_Bytes(payload), size)
    if method == 4 and len(payload) == -(-7 * size // 8):
        bits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")
        if bits[7 * size :].any():
            raise ReaderError("bits follow the last of a plane")
        return np.packbits(bits[: 7 * size].reshape(size, 7), axis=1, bitorder="little")[:, 0]
    if method != 0 or len(payload) != size:
        raise ReaderError("a plane has an unknown method or another length than its block")
    return np.frombuffer(payload, np.uint8)


def _decode_huffman(source: _Bytes, size: int) -> Array:
    has_escape, escape, reserved, literals = struct.unpack("<BBHI", source.take(8))
    nibbles = np.frombuffer(source.take(128), np.uint8)
    lengths = np.stack((nibbles & 15, nibbles >> 4), axis=1).reshape(-1).astype(np.intp)
    sizes = struct.unpack(f"<{_STREAMS}I", source.take(4 * _STREAMS))
    used = (
        int((2 ** (_LONGEST_CODE - lengths[lengths > 0])).sum())
        if lengths.max() <= _LONGEST_CODE
        else 0
    )
    if has_escape > 1 or reserved or used != 2**_LONGEST_CODE:
        raise ReaderError("a Huffman code is not complete")
    if lengths[escape] == 0 if has_escape else escape or literals:
        raise ReaderError("a Huffman code has no code for its escape")
    # Short codes come first: the symbol of every value of the next bits, most significant first.
    order = np.argsort(lengths, kind="stable")[(lengths == 0).sum() :]
    symbols = np.repeat(order.astype(np.uint8), 2 ** (_LONGEST_CODE - lengths[order]))
    starts = [size // _STREAMS * stream for stream in range(_STREAMS)]
    counts = [end - start for start, end in zip(starts, [*starts[1:], size], strict=True)]
    streams = [
        _decode_stream(source.take(stored), count, symbols, lengths)
        for stored, count in zip(sizes, counts, strict=True)
    ]
    plane = np.concatenate(streams)
    if source.left() != literals:
        raise ReaderError("a plane has another number of literals than it says")
    if has_escape:
        (places,) = np.nonzero(plane == escape)
        if len(places) != literals:
            raise ReaderError("a plane has another number of literals than escapes")
        plane[places] = np.frombuffer(source.take(literals), np.uint8)
    return plane


def _decode_stream(data: bytes, count: int, symbols: Array, lengths: Array) -> Array:
    """The next `count` symbols: at every bit is found what a code would be that began there."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    end = len(bits)
    padded = np.concatenate((bits, np.zeros(_LONGEST_CODE, np.uint8))).astype(np.uint16)
    windows = np.zeros(end + 1, np.uint16)
    for bit in range(_LONGEST_CODE):
        windows |= padded[bit : bit + end + 1] << (_LONGEST_CODE - 1 - bit)
    found = symbols[windows]
    # Where the code 1, 2, 4 ... codes behind the one at a bit begins; only every 16th is followed.
    jumps = [np.minimum(np.arange(end + 1) + lengths[found], end)]
    for _ in range(4):
        jumps.append(jumps[-1][jumps[-1]])
    far, place, followed = jumps.pop().data, 0, []
    for _ in range(0, count, 16):
        followed.append(place)
        place = far[place]
    places = np.array(followed, np.intp)
    for jump in reversed(jumps):
        places = np.stack((places, jump[places]), axis=1).reshape(-1)
    places = places[:count]
    last = int(places[-1]) + int(lengths[found[places[-1]]]) if count else 0
    if -(-last // 8) != len(data) or bits[last:].any():
        raise ReaderError("a stream of codes has another length than it says")
    return found[places]


# The digest: XXH3-128 with seed 0, after the specification of xxHash.

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_MASK32 = 2**32 - 1
_MASK64 = 2**64 - 1
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_PRIME_MX1, _PRIME_MX2 = 0x165667919E3779F9, 0x9FB21C651E98DF25
_LANES = 8  # of 8 bytes each in a stripe
_STRIPES = 16  # in a block
_STEP = 2**20  # bytes whose products are worked out at once


def digest(data: bytes | memoryview | Array) -> str:
    """XXH3-128 of `data` in 32 hexadecimal digits."""
    size = len(data)
    if size > 240:
        low, high = _hash_long(np.frombuffer(data, np.uint8))
    elif size > 16:
        low, high = _hash_middle(bytes(data))
    else:
        low, high = _hash_short(bytes(data))
    return f"{high:016x}{low:016x}"


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _swapped(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "little"), "big")


def _folded(left: int, right: int) -> int:
    product = left * right
    return (product ^ product >> 64) & _MASK64


def _avalanche(value: int) -> int:
    value &= _MASK64
    value = (value ^ value >> 37) * _PRIME_MX1 & _MASK64
    return value ^ value >> 32


def _avalanche_64(value: int) -> int:
    value &= _MASK64
    value = (value ^ value >> 33) * _PRIME64_2 & _MASK64
    value = (value ^ value >> 29) * _PRIME64_3 & _MASK64
    return value ^ value >> 32


def _hash_short(data: bytes) -> tuple[int, int]:
    size = len(data)
    key = [_u64(_SECRET, at) for at in range(0, 96, 8)]
    if size > 8:
        first, last = _u64(data, 0), _u64(data, size - 8)
        product = (first ^ last ^ key[4] ^ key[5]) * _PRIME64_1
        low = (product & _MASK64) + ((size - 1) << 54) & _MASK64
        last ^= key[6] ^ key[7]
        high = (product >> 64) + last + (last & _MASK32) * (_PRIME32_2 - 1) & _MASK64
        product = (low ^ _swapped(high, 8)) * _PRIME64_2
        return _avalanche(product), _avalanche((product >> 64) + high * _PRIME64_2)
    if size > 3:
        keyed = _u32(data, 0) + (_u32(data, size - 4) << 32) ^ key[2] ^ key[3]
        product = keyed * (_PRIME64_1 + (size << 2))
        low = product & _MASK64
        high = (product >> 64) + (low << 1) & _MASK64
        low ^= high >> 3
        low = (low ^ low >> 35) * _PRIME_MX2 & _MASK64
        return low ^ low >> 28, _avalanche(high)
    if size > 0:
        low = data[0] << 16 | data[size >> 1] << 24 | data[-1] | size << 8
        high = _swapped(low, 4)
        high = (high << 13 | high >> 19) & _MASK32
        low ^= _u32(_SECRET, 0) ^ _u32(_SECRET, 4)
        high ^= _u32(_SECRET, 8) ^ _u32(_SECRET, 12)
        return _avalanche_64(low), _avalanche_64(high)
    return _avalanche_64(key[8] ^ key[9]), _avalanche_64(key[10] ^ key[11])


def _hash_middle(data: bytes) -> tuple[int, int]:
    size = len(data)
    low, high = size * _PRIME64_1 & _MASK64, 0

    def mixed(at: int, secret: int) -> int:
        left = _u64(data, at) ^ _u64(_SECRET, secret)
        return _folded(left, _u64(data, at + 8) ^ _u64(_SECRET, secret + 8))

    def mix(first: int, second: int, secret: int) -> None:
        nonlocal low, high
        low = low + mixed(first, secret) & _MASK64
        low ^= _u64(data, second) + _u64(data, second + 8) & _MASK64
        high = high + mixed(second, secret + 16) & _MASK64
        high ^= _u64(data, first) + _u64(data, first + 8) & _MASK64

    if size <= 128:
        for pair in range((size - 1) // 32, -1, -1):
            mix(16 * pair, size - 16 * (pair + 1), 32 * pair)
    else:
        for at in range(0, 128, 32):
            mix(at, at + 16, at)
        low, high = _avalanche(low), _avalanche(high)
        for at in range(128, size - 31, 32):
            mix(at, at + 16, at - 125)
        mix(size - 16, size - 32, 103)
    mixture = low * _PRIME64_1 + high * _PRIME64_4 + size * _PRIME64_2
    return _avalanche(low + high), -_avalanche(mixture) & _MASK64


def _hash_long(data: Array) -> tuple[int, int]:
    size = len(data)
    secret = np.frombuffer(_SECRET, "<u8")
    keys = np.array([secret[stripe : stripe + _LANES] for stripe in range(_STRIPES)])
    start = [_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3]
    start += [_PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1]
    state = np.array(start, "<u8")
    # What a stripe adds to the state does not depend on it; only the scramble behind a block does.
    blocks = (size - 1) // (8 * _LANES * _STRIPES)
    words = data[: blocks * keys.nbytes].view("<u8").reshape(blocks, _STRIPES, _LANES)
    step = _STEP // keys.nbytes
    for first in range(0, blocks, step):
        for added in _added(words[first : first + step], keys):
            state += added
            state ^= state >> 47
            state ^= secret[-_LANES:]
            state *= _PRIME32_1
    stripes = (size - 1) % keys.nbytes // (8 * _LANES)
    at = blocks * keys.nbytes
    rest = data[at : at + stripes * 8 * _LANES].view("<u8").reshape(stripes, _LANES)
    state += _added(rest, keys[:stripes])
    last = data[size - 8 * _LANES :].view("<u8").reshape(1, _LANES)
    state += _added(last, np.frombuffer(_SECRET, "<u8", _LANES, 121))
    lanes = [int(lane) for lane in state]
    low = _merge(lanes, 11, size * _PRIME64_1)
    return low, _merge(lanes, 117, ~(size * _PRIME64_2))


def _added(words: Array, keys: Array) -> Array:
    """What stripes add to the state, summed over the last axis but one."""
    keyed = words ^ keys
    products = (keyed & _MASK32) * (keyed >> 32)
    swapped = words.sum(axis=-2, dtype="<u8")[..., [1, 0, 3, 2, 5, 4, 7, 6]]
    total: Array = swapped + products.sum(axis=-2, dtype="<u8")
    return total


def _merge(lanes: list[int], secret: int, start: int) -> int:
    keyed = [lane ^ _u64(_SECRET, secret + 8 * place) for place, lane in enumerate(lanes)]
    return _avalanche(start + sum(map(_folded, keyed[::2], keyed[1::2])))


# The command.


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pysnap.reader PATH`: prints a table of the tensors; 1 if there is damage."""
    parser = argparse.ArgumentParser(
        prog="pysnap.reader", description="Print the tensors of a snapshot."
    )
    parser.add_argument("path", help="the directory of a snapshot")
    path = parser.parse_args(arguments).path
    try:
        snapshot = read_snapshot(path)
    except ReaderError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    rows = [("name", "dtype", "shape", "bytes", "at")]
    for name, index in snapshot._names.items():
        tensor = snapshot._tensors[index]
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        size = str(tensor.end - tensor.start)
        rows.append((_shown(name), tensor.dtype, shape, size, str(tensor.start)))
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, dtype, shape, size, start in rows:
        left = f"{name:{width[0]}}  {dtype:{width[1]}}  {shape:{width[2]}}"
        print(f"{left}  {size:>{width[3]}}  {start:>{width[4]}}")
    stream, step = snapshot.manifest["stream"], snapshot.manifest["step"]
    print(f"step {step}: {len(rows) - 1} tensors, {stream} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
