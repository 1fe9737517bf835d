"""The directory of one run: which snapshots are in it, how one is added (the commit) and how one is
removed.

The commit is `publish`; its statements are the proof of P1 and P2 (docs/format.md section 6).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pysnap import storage
from pysnap.errors import (
    BusyError,
    ConfigError,
    CorruptError,
    Error,
    FormatError,
    NotFoundError,
    StorageError,
    printable,
)
from pysnap.manifest import FORMAT, Manifest
from pysnap.notes import FILE as NOTES_FILE
from pysnap.notes import Notes, locked
from pysnap.paths import is_unicode

_log = logging.getLogger("pysnap")

MANIFEST = "manifest.json"

_HEADER = ".pysnap"
_LOCK = ".writer"
_LATEST = "latest"
_PARTIAL = ".partial-"
_TRASH = ".trash-"
_NEW_HEADER = ".pysnap-"
_NEW_LATEST = ".latest-"
_SNAPSHOT_NAME = re.compile(r"step-(\d{9,18})(?:\.(\d{1,9}))?", re.ASCII)
_LARGEST_HEADER = 4096
# More often than this, no writer removes what a reader has just listed.
_ATTEMPTS = 10
_LARGEST_MANIFEST = 2**30


@dataclass(frozen=True)
class Snapshot:
    """A committed snapshot: its directory and its manifest."""

    path: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Snapshot:
        """Read the manifest of a snapshot directory. Raises NotFoundError, CorruptError,
        FormatError, StorageError, or ConfigError for a path that is no text."""
        _check_text(path)
        file = path / MANIFEST
        try:
            data = storage.read_file(file, _LARGEST_MANIFEST)
        except StorageError as error:
            if error.errno == 2:
                raise NotFoundError(f"{path} is no snapshot: it holds no {MANIFEST}") from None
            raise
        return cls(path, Manifest.from_bytes(data, str(file)))

    @property
    def step(self) -> int:
        """The step after which it was taken."""
        return self.manifest.step

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that were reported at its moment."""
        metrics = self.manifest.metadata.get("metrics")
        if type(metrics) is not dict:
            return {}
        return {name: value for name, value in metrics.items() if type(value) is float}

    def packs(self) -> list[tuple[str, int]]:
        """Paths and lengths of the packs, as the engine takes them."""
        return [(str(self.path / name), size) for name, size in self.manifest.packs]


@dataclass(frozen=True)
class Listing:
    """What is in a repository: the readable snapshots, newest first, and what could not be read,
    with the reason."""

    snapshots: list[Snapshot]
    damaged: list[tuple[Path, Error]]

    def tell_damaged(self) -> list[str]:
        """Warn of what could not be read; a sentence for each. Raises FormatError for a snapshot of
        another format, which is no damage: to pass over it would be to lose what is newest."""
        for _, error in self.damaged:
            if isinstance(error, FormatError):
                raise error
        return [tell_skipped(path, error) for path, error in self.damaged]


def tell_skipped(path: Path, error: Error) -> str:
    """Warn that a damaged snapshot is passed over; the sentence for the error that may follow."""
    sentence = f"{path.name}: {error}"
    _log.warning("skipping a damaged snapshot, %s", sentence)
    return sentence


def is_snapshot(path: Path) -> bool:
    """Whether a directory is one snapshot (rather than a repository of them)."""
    return storage.exists(path / MANIFEST)


def list_snapshots(root: Path) -> Listing:
    """Everything committed in the repository at `root`. Safe beside a writer; takes no lock.

    Raises NotFoundError where there is no repository, FormatError where it has an unknown format
    and the StorageError that says nothing of what is stored.
    """
    check_header(root)
    return _list(root, known={})


def _list(root: Path, known: Mapping[Path, Snapshot]) -> Listing:
    """Everything committed at `root`; the manifest of a `known` snapshot is not read again."""
    read = dict(known)
    for _ in range(_ATTEMPTS):
        listing, complete = _list_once(root, read)
        if complete:
            break
        read |= {snapshot.path: snapshot for snapshot in listing.snapshots}
    return listing


def _list_once(root: Path, known: Mapping[Path, Snapshot]) -> tuple[Listing, bool]:
    """What a listing of the directory leads to; not complete where the writer has deleted some of
    it since, and so has added what replaces it."""
    snapshots: list[Snapshot] = []
    damaged: list[tuple[Path, Error]] = []
    complete = True
    for name in snapshot_names(root):
        path = root / name
        try:
            snapshots.append(known.get(path) or open_listed(path))
        except (CorruptError, FormatError, NotFoundError, StorageError) as error:
            if error.says_nothing:
                raise
            if is_gone(path):
                complete = False
            else:
                damaged.append((path, error))
    snapshots.sort(key=lambda snapshot: snapshot.manifest.sequence, reverse=True)
    return Listing(snapshots, damaged), complete


def is_gone(path: Path) -> bool:
    """Whether nothing is there any more, for certain."""
    try:
        return not storage.exists(path)
    except StorageError:
        return False


def snapshot_names(root: Path) -> list[str]:
    """Names in a repository that are those of snapshots, sorted."""
    return [name for name in storage.list_directory(root) if _SNAPSHOT_NAME.fullmatch(name)]


def open_listed(path: Path) -> Snapshot:
    """`Snapshot.open` of what was found in a repository: a link could lead out of it, and is
    refused with a CorruptError."""
    if storage.is_link(path):
        raise CorruptError(f"{path} is a link, not the directory of a snapshot; remove it")
    return Snapshot.open(path)


def publish(partial: Path, manifest: Manifest, path: Path, notes: Notes | None = None) -> Snapshot:
    """The commit: make `partial`, whose packs are durable, the visible and durable snapshot
    `path`, which must not exist."""
    if notes:
        storage.write_file(partial / NOTES_FILE, notes.to_bytes())
    # The manifest is written after the packs it names, and the directory's names after the files
    # they name.
    storage.write_file(partial / MANIFEST, manifest.to_bytes())
    storage.sync_directory(partial)
    # Before the rename there is no snapshot, after it there is a whole one.
    storage.rename(partial, path)
    # Only this makes the rename survive a power cut. Until it returns nobody may count on the
    # snapshot.
    try:
        storage.sync_directory(path.parent)
    except BaseException:
        # Nobody knows whether it does: it is taken back.
        with contextlib.suppress(StorageError):
            storage.rename(path, partial)
        raise
    return Snapshot(path, manifest)


def new_partial(parent: Path) -> Path:
    """A new directory for the packs of one snapshot that will be published in `parent`."""
    path = parent / f"{_PARTIAL}{uuid.uuid4().hex}"
    storage.make_directory(path)
    return path


def discard(partial: Path) -> bool:
    """Remove what a failed snapshot left; False if something stays, which the next writer
    removes."""
    try:
        # It may have been visible: a power cut must not bring it back half empty.
        storage.sync_directory(partial.parent)
        storage.remove_directory(partial)
    except StorageError as error:
        return error.errno == 2
    return True


class Repository:
    """The one writer of a repository. Not thread safe: it belongs to the committing thread while a
    snapshot is in flight, and to the training thread otherwise."""

    def __init__(self, root: Path) -> None:
        """Open or create the repository, take the writer lock and remove what dead writers left.

        Raises BusyError, FormatError, StorageError (an unwritable path, a file where the directory
        should be), or ConfigError for a path that is no text.
        """
        # Absolute: a program may change its directory.
        self.root = root = root.absolute()
        _check_text(root)
        _make_root(root)
        self._lock = storage.WriterLock(root / _LOCK)
        try:
            _make_header(root)
            check_header(root)
            # What dead writers renamed and did not sync is durable from here on: what became
            # visible, and what became trash, before it is unlinked.
            storage.sync_directory(root)
            self._remove_leftovers()
            listing = list_snapshots(root)
        except BaseException:
            self.close()
            raise
        self._known = {snapshot.path: snapshot for snapshot in listing.snapshots}
        self._uncertain: set[Path] = set()  # visible, perhaps, and not durable
        self._leftovers: list[Path] = []  # of ours, and could not be removed
        self._next_sequence = 1
        self._unread = False  # a manifest could not be read when the repository was listed
        self._pass_sequences(listing)

    def begin(self) -> Path:
        """A new directory for the packs of one snapshot. Raises StorageError where the repository
        was removed, moved or replaced meanwhile: it is never made again, for what is found there
        may be an empty mount point or somebody else's."""
        self._lock.check()
        return new_partial(self.root)

    def scratch(self) -> Path:
        """A name for a file that nobody needs; the next writer removes it where this one dies."""
        return self.root / f"{_NEW_HEADER}{uuid.uuid4().hex}"

    def next_sequence(self) -> int:
        """The sequence number of the next snapshot. Raises StorageError."""
        if self._unread:
            # The newest may be among what could not be read: perhaps the disk is well again.
            self.list()
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        return sequence

    def commit(self, partial: Path, manifest: Manifest, notes: Notes) -> Snapshot:
        """Make `partial`, whose packs are durable, the visible and durable snapshot of its step."""
        path = self._free_name(manifest.step)
        self._uncertain.add(path)
        snapshot = publish(partial, manifest, path, notes)
        self._uncertain.remove(path)
        self._known[snapshot.path] = snapshot
        with contextlib.suppress(StorageError):
            storage.replace_link(self.root / _LATEST, snapshot.path.name)
        return snapshot

    def list(self) -> Listing:
        """Everything committed. Manifests do not change, so each is read once."""
        listing = _list(self.root, self._known)
        self._known = {snapshot.path: snapshot for snapshot in listing.snapshots}
        self._pass_sequences(listing)
        return listing

    def durable(self) -> Sequence[Snapshot]:
        """What retention may count: without those that a power cut may take away, because their
        commit failed and could not be taken back."""
        return [
            snapshot for snapshot in self.list().snapshots if snapshot.path not in self._uncertain
        ]

    def _pass_sequences(self, listing: Listing) -> None:
        """What is taken from now on is newer than all that is there, whoever put it there."""
        self._unread = any(isinstance(error, StorageError) for _, error in listing.damaged)
        newest = max((snapshot.manifest.sequence for snapshot in listing.snapshots), default=0)
        self._next_sequence = max(self._next_sequence, newest + 1)

    def held(self) -> dict[Path, str]:
        """The snapshots that a tag or a pin holds, and which."""
        return {path: why for path in self._known if (why := held_by(path))}

    def delete(self, path: Path) -> bool:
        """Remove a snapshot: it disappears at once and whole. False, and it stays, where it was
        tagged or pinned since that was looked at, or is just being."""
        self._lock.check()
        trash = self.root / f"{_TRASH}{uuid.uuid4().hex}"
        try:
            with locked(path, seconds=0):
                if held_by(path):
                    return False
                storage.rename(path, trash)
        except BusyError:
            return False
        self._known.pop(path, None)
        self._leftovers.append(trash)
        storage.sync_directory(self.root)
        storage.remove_directory(trash)
        self._leftovers.remove(trash)
        return True

    def discard(self, partial: Path) -> None:
        """Remove what a failed snapshot left, or remember it for `remove_rest`."""
        if not discard(partial):
            self._leftovers.append(partial)

    def remove_rest(self) -> None:
        """Remove what could not be removed when it was to be."""
        leftovers, self._leftovers = self._leftovers, []
        for path in leftovers:
            self.discard(path)

    def close(self) -> None:
        """Give the writer lock back; safe to repeat."""
        self._lock.release()

    def _remove_leftovers(self) -> None:
        for name in storage.list_directory(self.root):
            try:
                if name.startswith((_PARTIAL, _TRASH)):
                    storage.remove_directory(self.root / name)
                elif name.startswith((_NEW_HEADER, _NEW_LATEST)):
                    storage.remove_file(self.root / name)
            except StorageError as error:
                # Somebody else's file in it is no reason not to train.
                _log.warning("what a killed writer left stays: %s", error)

    def _free_name(self, step: int) -> Path:
        name = f"step-{step:09d}"
        taken = [
            match
            for match in map(_SNAPSHOT_NAME.fullmatch, storage.list_directory(self.root))
            if match and int(match[1]) == step
        ]
        if not taken:
            return self.root / name
        return self.root / f"{name}.{1 + max(int(match[2] or 0) for match in taken)}"


def held_by(path: Path) -> str:
    """What holds a snapshot, whatever retention says: its tags, its pin; empty where nothing
    does."""
    try:
        notes = Notes.read(path)
    except Error as error:
        # Notes that cannot be read may have held it.
        _log.warning("%s is kept: %s", path, error)
        return "its notes cannot be read"
    marks = ["pinned"] if notes.pinned else []
    return ", ".join([*marks, *(f"tagged {tag}" for tag in notes.tags)])


def _check_text(path: Path) -> None:
    """The engine takes paths as UTF-8."""
    if not is_unicode(str(path)):
        raise ConfigError(
            f"the path {printable(str(path))} is not UTF-8; rename it, or choose another one"
        )


def _make_root(root: Path) -> None:
    if storage.exists(root / _HEADER):
        return
    missing = [path for path in (root, *root.parents) if not storage.exists(path)]
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(storage.DIRECTORY_MODE, exist_ok=True)
        if root in missing:
            root.chmod(storage.DIRECTORY_MODE)
    except OSError as error:
        raise StorageError.wrap(error, f"creating repository {root}", root) from error
    for path in (root, *root.parents[:-1]):
        try:
            storage.sync_directory(path.parent)
        except StorageError:
            # What was there may be nobody's but an administrator's. It is synced all the same: who
            # made it may have been killed before that.
            if path in missing:
                raise
    # Hidden names may be ours: another process may be making the same repository.
    others = [name for name in storage.list_directory(root) if not name.startswith(".")]
    if others:
        raise NotFoundError(
            f"{root} is no repository and holds other files, such as {printable(others[0])}; "
            "choose a new or empty directory"
        )


def _make_header(root: Path) -> None:
    if storage.exists(root / _HEADER):
        return
    header = json.dumps({"pysnap": "repository", "format": FORMAT, "id": uuid.uuid4().hex}).encode()
    temporary = root / f"{_NEW_HEADER}{uuid.uuid4().hex}"
    storage.write_file(temporary, header)
    storage.rename(temporary, root / _HEADER)
    storage.sync_directory(root)


def check_header(root: Path) -> None:
    """Raise NotFoundError where there is no repository, CorruptError or StorageError where its
    header cannot be read, FormatError where it has an unknown format."""
    file = root / _HEADER
    try:
        data = storage.read_file(file, _LARGEST_HEADER)
    except StorageError as error:
        if error.errno in (2, 20):
            raise NotFoundError(f"{root} is no repository: it holds no {_HEADER}") from None
        raise
    try:
        header = json.loads(data)
        format_number = header["format"] if header["pysnap"] == "repository" else None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptError(
            f"{file} is damaged; restore it from another repository of the same format"
        ) from None
    if type(format_number) is not int or format_number != FORMAT:
        raise FormatError(
            f"{root} has format {format_number!r:.80}, this version of pysnap reads format "
            f"{FORMAT}; use a newer pysnap"
        )
