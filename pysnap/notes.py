"""Marks of a snapshot that may change after its commit: tags, a pin, a note (`notes.json`).

They are changed beside a running writer, and by several processes at once, without one losing what
another did: `edit` locks the snapshot's directory, reads, and replaces the file. The writer's
retention takes the same lock before it removes a snapshot.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pysnap import storage
from pysnap.errors import ConfigError, CorruptError, NotFoundError, StorageError

FILE = "notes.json"
_LARGEST = 2**20
_LONGEST_NOTE = 2**16
_PATIENCE_SECONDS = 10.0
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


@contextlib.contextmanager
def locked(snapshot: Path, seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Nobody else changes the notes of the snapshot, nor removes it, meanwhile. Raises
    NotFoundError where it is gone, BusyError where another process holds it for `seconds`."""
    try:
        with storage.locked_directory(snapshot, seconds):
            yield
    except StorageError as error:
        if error.errno == errno.ENOENT:
            raise NotFoundError(f"{snapshot} is gone; it was removed or replaced") from None
        raise


def edit(snapshot: str | os.PathLike[str], change: Callable[[Notes], Notes]) -> Notes:
    """Replace the notes of a snapshot directory by what `change` makes of them; the new ones, which
    are durable.

    Needs no writer lock. Raises NotFoundError, BusyError, CorruptError (notes that cannot be read
    are not replaced) or StorageError.
    """
    path = Path(snapshot)
    with locked(path):
        before = Notes.read(path)
        after = change(before)
        if after != before:
            storage.replace_file(path / FILE, after.to_bytes())
        return after


def add_tags(snapshot: str | os.PathLike[str], *tags: str) -> Notes:
    """Tag a snapshot; those it has already change nothing. Raises ConfigError, or as `edit`."""
    new = [check_tag(tag) for tag in tags]
    return edit(
        snapshot, lambda notes: replace(notes, tags=tuple(dict.fromkeys([*notes.tags, *new])))
    )


def remove_tags(snapshot: str | os.PathLike[str], *tags: str) -> Notes:
    """Take tags away; those it does not have change nothing. Raises as `edit`."""
    return edit(
        snapshot,
        lambda notes: replace(notes, tags=tuple(tag for tag in notes.tags if tag not in tags)),
    )


def pin(snapshot: str | os.PathLike[str], pinned: bool = True) -> Notes:
    """Pin a snapshot, so that retention keeps it, or unpin it. Raises as `edit`."""
    return edit(snapshot, lambda notes: replace(notes, pinned=pinned))


def write_note(snapshot: str | os.PathLike[str], text: str) -> Notes:
    """Set the note, free text for people; an empty one removes it. Raises ConfigError for what is
    too long or no text, or as `edit`."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError("the note holds characters that are no text; write it anew") from None
    if size > _LONGEST_NOTE:
        raise ConfigError(f"the note has {size} bytes, more than {_LONGEST_NOTE}; shorten it")
    return edit(snapshot, lambda notes: replace(notes, note=text))
