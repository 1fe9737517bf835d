"""The manifest: the index of a snapshot, as JSON with a digest (docs/format.md section 2)."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pysnap import _engine
from pysnap.errors import ConfigError, CorruptError, FormatError

FORMAT = 1
ELEMENTS = ("u8", "i16", "i32", "i64", "f16", "f32", "f64")
ENCODINGS = ("raw", "planes")

_PREFIX = b'{"digest":"'
_MIDDLE = b'","snapshot":'
_SUFFIX = b"}"
_DIGEST_LENGTH = 32
_LARGEST_CHUNK = 64 * 2**20
_PAGE = 4096
_U64 = 2**64


@dataclass(frozen=True)
class Record:
    """One tensor or array: data type, shape, offset of its first element in the stream in bytes,
    strides in elements (None: row major)."""

    dtype: str
    shape: tuple[int, ...]
    at: int
    strides: tuple[int, ...] | None = None


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

    def to_bytes(self) -> bytes:
        """The exact content of `manifest.json`."""
        snapshot = {
            "format": FORMAT,
            "id": self.id,
            "step": self.step,
            "sequence": self.sequence,
            "created": self.created,
            "stream": self.stream,
            "chunk_size": self.chunk_size,
            "packs": [{"name": name, "size": size} for name, size in self.packs],
            "metadata": self.metadata,
            "tree": self.tree,
            "tensors": [_record_to_json(record) for record in self.tensors],
            "chunks": [_chunk_to_json(row) for row in self.chunks.tolist()],
        }
        body = json.dumps(
            snapshot, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode()
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
                    f"{where} has format {snapshot.get('format')!r}, this version of pysnap reads "
                    f"format {FORMAT}; use a newer pysnap"
                )
            return _Parser(snapshot).manifest()
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CorruptError(f"{where} is not valid: {error}") from None


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


def _record_to_json(record: Record) -> dict[str, Any]:
    entry: dict[str, Any] = {"dtype": record.dtype, "shape": record.shape, "at": record.at}
    if record.strides is not None:
        entry["strides"] = record.strides
    return entry


def _chunk_to_json(row: tuple[int, ...]) -> list[Any]:
    pack, raw, stored, element, encoding, offset, high, low = row
    return [
        pack,
        offset,
        stored,
        raw,
        ELEMENTS[element],
        ENCODINGS[encoding],
        f"{high:016x}{low:016x}",
    ]


def _padded(size: int) -> int:
    return (size + _PAGE - 1) // _PAGE * _PAGE


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _natural(value: Any, what: str, limit: int = _U64) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{what} is {value!r}")
    return value


def _text(value: Any, what: str) -> str:
    if type(value) is not str:
        raise ValueError(f"{what} is {value!r}")
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
        chunk_size = _natural(get("chunk_size"), "chunk_size", _LARGEST_CHUNK + 1)
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
            tensors=[self._record(entry) for entry in _sequence(get("tensors"), "tensors")],
            chunk_size=chunk_size,
            packs=packs,
            chunks=np.array(rows, dtype=_engine.CHUNK),
            metadata=metadata,
        )

    def _pack(self, entry: Any) -> tuple[str, int]:
        name = _text(entry["name"], "the name of a pack")
        # The name becomes a path: nothing but digits may stand in it.
        if not re.fullmatch(r"[0-9]{1,9}\.pack", name, re.ASCII):
            raise ValueError(f"{name!r} is no name of a pack")
        return name, _natural(entry["size"], "the size of a pack")

    def _chunk(self, entry: Any, packs: list[tuple[str, int]], chunk_size: int) -> tuple[int, ...]:
        pack, offset, stored, raw, element, encoding, digest = _sequence(entry, "a chunk")
        _natural(pack, "the pack of a chunk", len(packs))
        _natural(raw, "the raw length of a chunk", chunk_size + 1)
        _natural(stored, "the stored length of a chunk", raw + 1)
        _natural(offset, "the offset of a chunk", packs[pack][1])
        if offset % _PAGE or offset + _padded(stored) > packs[pack][1] or not stored:
            raise ValueError(f"a chunk at {offset} does not lie in its pack")
        if not re.fullmatch(r"[0-9a-f]{32}", _text(digest, "a digest"), re.ASCII):
            raise ValueError(f"{digest!r} is no digest")
        return (
            pack,
            raw,
            stored,
            ELEMENTS.index(_text(element, "an element")),
            ENCODINGS.index(_text(encoding, "an encoding")),
            offset,
            int(digest[:16], 16),
            int(digest[16:], 16),
        )

    def _record(self, entry: Any) -> Record:
        shape = _sequence(entry["shape"], "a shape")
        strides = _sequence(entry["strides"], "strides") if "strides" in entry else None
        if len(shape) > 64 or (strides is not None and len(strides) != len(shape)):
            raise ValueError("a tensor has too many dimensions, or other strides than dimensions")
        return Record(
            dtype=_text(entry["dtype"], "a dtype"),
            shape=tuple(_natural(size, "a size", 2**63) for size in shape),
            at=_natural(entry["at"], "at"),
            strides=None
            if strides is None
            else tuple(_natural(stride, "a stride", 2**63) for stride in strides),
        )
