"""Marks of a snapshot that may change after its commit: tags, a pin, a note (`notes.json`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pysnap import storage
from pysnap.errors import ConfigError, CorruptError, StorageError

FILE = "notes.json"
_LARGEST = 2**20
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What stands in `notes.json`; a snapshot without the file has none of it."""

    tags: tuple[str, ...] = ()
    pinned: bool = False
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.tags or self.pinned or self.note)

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @classmethod
    def read(cls, snapshot: Path) -> Notes:
        """The notes of a snapshot directory. Raises CorruptError or StorageError."""
        file = snapshot / FILE
        try:
            data = storage.read_file(file, _LARGEST)
        except StorageError as error:
            if error.errno == 2:
                return cls()
            raise
        try:
            value = json.loads(data)
            tags = value.get("tags", [])
            pinned, note = value.get("pinned", False), value.get("note", "")
            if type(tags) is not list or type(pinned) is not bool or type(note) is not str:
                raise ValueError("an entry has another type")
            return cls(tags=tuple(map(check_tag, tags)), pinned=pinned, note=note)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CorruptError(
                f"{file} is damaged; remove it, which loses the tags, and set them again"
            ) from None


def check_tag(tag: object) -> str:
    """`tag`, if it can be one. Raises ConfigError."""
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise ConfigError(
            f"{tag!r} is no tag: it must be letters, digits, `.`, `_` or `-`, at most 64, "
            "and begin with a letter or a digit"
        )
    return tag


def tagged(tags: str | Iterable[str]) -> Notes:
    """The notes of a new snapshot. Raises ConfigError for what is no tag."""
    return Notes(tags=tuple(map(check_tag, [tags] if isinstance(tags, str) else tags)))
