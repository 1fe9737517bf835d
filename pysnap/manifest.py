"""The manifest: the index of a snapshot, as JSON with a digest (docs/format.md section 2)."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pysnap import _engine, paths
from pysnap.dtypes import ELEMENT_WIDTH, itemsize
from pysnap.errors import ConfigError, CorruptError, FormatError, printable

FORMAT = 1
ELEMENTS = ("u8", "i16", "i32", "i64", "f16", "f32", "f64")
ENCODINGS = ("raw", "planes")

_PREFIX = b'{"digest":"'
_MIDDLE = b'","snapshot":'
_SUFFIX = b"}"
_DIGEST_LENGTH = 32
_LARGEST_CHUNK = 64 * 2**20
_PAGE = 4096
_LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Record:
    """One tensor or array: data type, shape, offset of its first element in the stream in bytes,
    strides in elements (None: row major)."""

    dtype: str
    shape: tuple[int, ...]
    at: int
    strides: tuple[int, ...] | None = None

    @functools.cached_property
    def extent(self) -> int:
        """Bytes from the first to behind the last element in the stream."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            elements = math.prod(self.shape)
        else:
            steps = zip(self.shape, self.strides, strict=True)
            elements = 1 + sum((size - 1) * stride for size, stride in steps)
        return elements * itemsize(self.dtype)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `chunks` is a table of `_engine.CHUNK`, in the order of the
    stream."""

    id: str
    step: int
    sequence: int
    created: str
    tree: Any
    tensors: list[Record]
    chunk_size: int
    packs: list[tuple[str, int]]
    chunks: np.ndarray[Any, np.dtype[np.void]]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def stream(self) -> int:
        """Length of the stream in bytes."""
        return int(self.chunks["raw"].sum(dtype=np.uint64))

    @property
    def stored(self) -> int:
        """Bytes of all encoded chunks."""
        return int(self.chunks["stored"].sum(dtype=np.uint64))

    def leaves(self, where: str) -> Iterator[tuple[str, Record]]:
        """Name and record of every tensor and array, in the order of the tree. Raises CorruptError,
        which names `where`, for a tree that is none, or that names a record that does not exist."""
        try:
            leaves = list(paths.leaves(self.tree))
        except CorruptError as error:
            raise CorruptError(f"{where}: {error}") from None
        for name, index in leaves:
            if index >= len(self.tensors):
                raise CorruptError(
                    f'{where} is damaged: "{printable(name)}" is tensor {index}, which does not '
                    "exist; open an intact snapshot"
                )
            yield name, self.tensors[index]

    def names_in(self, ranges: Sequence[tuple[int, int]], where: str) -> list[str]:
        """Names of the tensors and arrays that have bytes in these ranges (start, end) of the
        stream, which are sorted and do not overlap. Raises as `leaves` does."""
        starts = [start for start, _ in ranges]
        names = []
        for name, record in self.leaves(where):
            before = bisect.bisect_left(starts, record.at + record.extent)
            if record.extent and before and ranges[before - 1][1] > record.at:
                names.append(name)
        return names

    def prepare(self) -> None:
        """Do what of `to_bytes` needs neither packs nor chunks."""
        # Beside the fields, which are what a manifest says. Not a cached_property: before Python
        # 3.12 that holds a lock meanwhile, which a forked child would inherit.
        vars(self)["_described"] = self._describe()

    def completed(
        self, created: str, packs: list[tuple[str, int]], chunks: np.ndarray[Any, np.dtype[np.void]]
    ) -> Manifest:
        """This manifest, of a snapshot that is written now; what was prepared goes with it."""
        manifest = replace(self, created=created, packs=packs, chunks=chunks)
        vars(manifest)["_described"] = vars(self).pop("_described", None)
        return manifest

    def _describe(self) -> str:
        """What stands of the state in `manifest.json`."""
        described = _to_json({"metadata": self.metadata, "tree": self.tree})
        return f'{described[1:-1]},"tensors":[{",".join(map(_record_to_json, self.tensors))}]'

    def to_bytes(self) -> bytes:
        """The exact content of `manifest.json`."""
        head = {
            "format": FORMAT,
            "id": self.id,
            "step": self.step,
            "sequence": self.sequence,
            "created": self.created,
            "stream": self.stream,
            "chunk_size": self.chunk_size,
            "packs": [{"name": name, "size": size} for name, size in self.packs],
        }
        chunks = ",".join(map(_chunk_to_json, self.chunks.tolist()))
        # Large, and manifests stay: it is not kept.
        described = vars(self).pop("_described", None) or self._describe()
        body = f'{_to_json(head)[:-1]},{described},"chunks":[{chunks}]}}'.encode()
        return _PREFIX + _engine.digest(body).encode() + _MIDDLE + body + _SUFFIX

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Parse and check; `where` names the file in errors. Raises CorruptError or, for an
        unknown format, FormatError."""
        start = len(_PREFIX) + _DIGEST_LENGTH
        if not (
            data.startswith(_PREFIX) and data[start:].startswith(_MIDDLE) and data.endswith(_SUFFIX)
        ):
            raise CorruptError(f"{where} is no manifest; the file is damaged or cut short")
        body = data[start + len(_MIDDLE) : -len(_SUFFIX)]
        if not (body.startswith(b"{") and body.endswith(b"}")):
            raise CorruptError(f"{where} is no manifest; the file is damaged")
        if _engine.digest(body).encode() != data[len(_PREFIX) : start]:
            raise CorruptError(f"{where} does not match its digest; the file is damaged")
        try:
            snapshot = json.loads(
                body.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant
            )
            if not isinstance(snapshot, dict):
                raise ValueError("it is no object")
            if type(snapshot.get("format")) is not int or snapshot["format"] != FORMAT:
                raise FormatError(
                    f"{where} has format {_shown(snapshot.get('format'))}, this version "
                    f"of pysnap reads format {FORMAT}; use a newer pysnap"
                )
            return _Parser(snapshot).manifest()
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CorruptError(f"{where} is not valid: {printable(str(error))}") from None


def plain_json(metadata: object) -> dict[str, Any]:
    """A copy of `metadata` as a manifest holds it. ConfigError for what is no JSON object."""
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata must be plain JSON: {error}") from None
    copy = json.loads(text)
    if type(copy) is not dict:
        raise ConfigError(f"metadata must be a dict, not a {type(metadata).__qualname__}")
    return copy


def finite(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics as JSON holds them, which has no NaN and no infinity: they are texts there."""
    return {name: value if math.isfinite(value) else repr(value) for name, value in metrics.items()}


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


# There may be many records and chunks, and training waits for the GIL meanwhile: each is written as
# text at once, not as an object for `json`.
def _record_to_json(record: Record) -> str:
    strides = "" if record.strides is None else f',"strides":{_numbers(record.strides)}'
    shape = _numbers(record.shape)
    return f'{{"dtype":"{record.dtype}","shape":{shape},"at":{record.at}{strides}}}'


def _numbers(values: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, values))}]"


def _chunk_to_json(row: tuple[int, ...]) -> str:
    pack, raw, stored, element, encoding, offset, high, low = row
    return (
        f'[{pack},{offset},{stored},{raw},"{ELEMENTS[element]}","{ENCODINGS[encoding]}",'
        f'"{high:016x}{low:016x}"]'
    )


def _padded(size: int) -> int:
    return (size + _PAGE - 1) // _PAGE * _PAGE


def _shown(value: object) -> str:
    return f"{value!r:.80}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _natural(value: Any, what: str, most: int = _LARGEST_INTEGER) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is {_shown(value)}, not an integer from 0 to {most}")
    return value


def _text(value: Any, what: str) -> str:
    if type(value) is not str:
        raise ValueError(f"{what} is {_shown(value)}, not text")
    return value


def _sequence(value: Any, what: str) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{what} is no list")
    return value


class _Parser:
    """Believes nothing: every number is bounded before it is used."""

    def __init__(self, snapshot: dict[str, Any]) -> None:
        self._snapshot = snapshot

    def manifest(self) -> Manifest:
        get = self._snapshot.__getitem__
        metadata = get("metadata")
        if type(metadata) is not dict:
            raise ValueError("metadata is no object")
        packs = [self._pack(entry) for entry in _sequence(get("packs"), "packs")]
        if len({name for name, _ in packs}) != len(packs):
            raise ValueError("a pack is named twice")
        chunk_size = _natural(get("chunk_size"), "chunk_size", _LARGEST_CHUNK)
        rows = [
            self._chunk(entry, packs, chunk_size) for entry in _sequence(get("chunks"), "chunks")
        ]
        stream = _natural(get("stream"), "stream")
        if sum(row[1] for row in rows) != stream:
            raise ValueError("the chunks do not cover the stream")
        placed = sorted((row[0], row[5], row[5] + row[2]) for row in rows)
        for (pack, _, end), (next_pack, start, _) in itertools.pairwise(placed):
            if pack == next_pack and start < end:
                raise ValueError(f"two chunks overlap at {start}")
        return Manifest(
            id=_text(get("id"), "id"),
            step=_natural(get("step"), "step"),
            sequence=_natural(get("sequence"), "sequence"),
            created=_text(get("created"), "created"),
            tree=get("tree"),
            tensors=[self._record(entry, stream) for entry in _sequence(get("tensors"), "tensors")],
            chunk_size=chunk_size,
            packs=packs,
            chunks=np.array(rows, dtype=_engine.CHUNK),
            metadata=metadata,
        )

    def _pack(self, entry: Any) -> tuple[str, int]:
        name = _text(entry["name"], "the name of a pack")
        # The name becomes a path: nothing but digits may stand in it.
        if not re.fullmatch(r"[0-9]{1,9}\.pack", name, re.ASCII):
            raise ValueError(f"{_shown(name)} is no name of a pack")
        return name, _natural(entry["size"], "the size of a pack")

    def _chunk(self, entry: Any, packs: list[tuple[str, int]], chunk_size: int) -> tuple[int, ...]:
        pack, offset, stored, raw, element, encoding, digest = _sequence(entry, "a chunk")
        _natural(pack, "the pack of a chunk", len(packs) - 1)
        _natural(raw, "the raw length of a chunk", chunk_size)
        _natural(stored, "the stored length of a chunk", raw)
        _natural(offset, "the offset of a chunk")
        if offset % _PAGE or offset + _padded(stored) > packs[pack][1] or not stored:
            raise ValueError(f"a chunk at {offset} does not lie in its pack")
        if element not in ELEMENTS or raw % ELEMENT_WIDTH[element]:
            raise ValueError(f"a chunk at {offset} is not made of whole elements")
        if encoding not in ENCODINGS or (encoding == "raw") != (stored == raw):
            raise ValueError(f"a chunk at {offset} has an encoding that is not its length")
        if not re.fullmatch(r"[0-9a-f]{32}", _text(digest, "a digest"), re.ASCII):
            raise ValueError(f"{_shown(digest)} is no digest")
        return (
            pack,
            raw,
            stored,
            ELEMENTS.index(element),
            ENCODINGS.index(encoding),
            offset,
            int(digest[:16], 16),
            int(digest[16:], 16),
        )

    def _record(self, entry: Any, stream: int) -> Record:
        shape = _sequence(entry["shape"], "a shape")
        strides = _sequence(entry["strides"], "strides") if "strides" in entry else None
        if len(shape) > 64 or (strides is not None and len(strides) != len(shape)):
            raise ValueError("a tensor has too many dimensions, or other strides than dimensions")
        record = Record(
            dtype=_text(entry["dtype"], "a dtype"),
            shape=tuple(_natural(size, "a size") for size in shape),
            at=_natural(entry["at"], "at"),
            strides=None
            if strides is None
            else tuple(_natural(stride, "a stride") for stride in strides),
        )
        # Neither torch nor NumPy counts further, and both count a size of 0 as 1.
        elements = math.prod(max(size, 1) for size in shape)
        if elements * itemsize(record.dtype) > _LARGEST_INTEGER:
            raise ValueError("a tensor is too large")
        # One without elements occupies no bytes, wherever it stands.
        if record.extent and record.at + record.extent > stream:
            raise ValueError("a tensor reaches past the end of the stream")
        return record
