"""Planted bugs: each breaks one rule of the commit, without a hook in pysnap. A harness that does
not find those it is there for is broken itself."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shim import FOREVER, Shim

from pysnap import commit, repository, storage
from pysnap.errors import StorageError
from pysnap.manifest import Manifest
from pysnap.notes import FILE as NOTES_FILE
from pysnap.notes import Notes

_UUID = "?" * 32


def _unsynced(kind: str, pattern: str) -> Callable[[Shim], None]:
    def plant(shim: Shim) -> None:
        shim.fault("lie", kind=kind, pattern=pattern, count=FOREVER)

    return plant


def _sync_asked_again(shim: Shim) -> None:
    """A sync that fails is done again, and then says that all is well."""
    shim.fault("retry", errno.EIO, kind="fdatasync", pattern="*.pack", count=FOREVER)


def _short_write_accepted(shim: Shim) -> None:
    shim.fault("lie short", kind="pwrite", pattern="*.pack", first=3)


# Lies of the file system: what was to be done is reported as done.
_LIES: dict[str, Callable[[Shim], None]] = {
    "packs are not synced": _unsynced("fdatasync", "*.pack"),
    "the manifest is not synced": _unsynced("fsync", "*/manifest.json"),
    "the directory of the snapshot is not synced": _unsynced("fsync", f"*/.partial-{_UUID}"),
    "the repository is not synced": _unsynced("fsync", "*/runs/gpt"),
    "the parent of a new repository is not synced": _unsynced("fsync", "*/runs"),
    "a failed sync is asked again": _sync_asked_again,
    "a short write is accepted": _short_write_accepted,
}


def _manifest_first(
    partial: Path, manifest: Manifest, path: Path, notes: Notes | None = None
) -> repository.Snapshot:
    """The snapshot is made visible, and its manifest durable, before its names are."""
    if notes:
        storage.write_file(partial / NOTES_FILE, notes.to_bytes())
    storage.rename(partial, path)
    storage.write_file(path / "manifest.json", manifest.to_bytes())
    storage.sync_directory(path.parent)
    storage.sync_directory(path)
    return repository.Snapshot(path, manifest)


_publish = repository.publish


def _delete_first(
    partial: Path, manifest: Manifest, path: Path, notes: Notes | None = None
) -> repository.Snapshot:
    """The oldest snapshot makes room before the new one is durable."""
    for name in storage.list_directory(path.parent):
        if name.startswith("step-"):
            trash = path.parent / f".trash-{'0' * 32}"
            storage.rename(path.parent / name, trash)
            storage.sync_directory(path.parent)
            storage.remove_directory(trash)
            break
    return _publish(partial, manifest, path, notes)


def _delete_in_place(self: repository.Repository, path: Path) -> None:
    """A snapshot is unlinked where it is; what that says is not looked at."""
    self._known.pop(path, None)
    for name in storage.list_directory(path):
        with contextlib.suppress(StorageError):
            storage.remove_file(path / name)
    with contextlib.suppress(StorageError):
        storage.remove_directory(path)


def _delete_unsynced(self: repository.Repository, path: Path) -> None:
    """What was renamed to trash is unlinked before the rename is durable."""
    trash = self.root / f".trash-{'0' * 32}"
    storage.rename(path, trash)
    self._known.pop(path, None)
    storage.remove_directory(trash)
    storage.sync_directory(self.root)


def _stays_visible(
    partial: Path, manifest: Manifest, path: Path, notes: Notes | None = None
) -> repository.Snapshot:
    """A commit of which the last sync fails is not taken back."""
    storage.write_file(partial / "manifest.json", manifest.to_bytes())
    storage.sync_directory(partial)
    storage.rename(partial, path)
    storage.sync_directory(path.parent)
    return repository.Snapshot(path, manifest)


def _discard_at_once(partial: Path) -> bool:
    """What became visible and was taken back is unlinked before that is durable."""
    with contextlib.suppress(StorageError):
        storage.remove_directory(partial)
    return True


def _write_whatever_sync_says(path: Path, data: bytes) -> None:
    """A file of which the sync fails counts as written."""
    with open(path, "xb", buffering=0) as file:
        file.write(data)
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())


def _fail_in_silence(self: commit.Committer, handle: commit.Handle, error: BaseException) -> None:
    """The error of a snapshot is not logged, and is that of the file alone."""
    handle._error = error
    handle._staged.set()
    handle._capture = None
    handle._done.set()


# Functions of pysnap that do the right things in the wrong order.
_REPLACED: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "the manifest comes first": (repository, "publish", _manifest_first),
    "the old snapshot is deleted first": (repository, "publish", _delete_first),
    "errors of unlink are ignored": (repository.Repository, "delete", _delete_in_place),
    "trash is not synced": (repository.Repository, "delete", _delete_unsynced),
    "a failed commit stays visible": (repository, "publish", _stays_visible),
    "what was taken back is unlinked at once": (repository, "discard", _discard_at_once),
    "a failed sync of the manifest is ignored": (storage, "write_file", _write_whatever_sync_says),
    "a failure is not told": (commit.Committer, "_fail", _fail_in_silence),
}


def lie(bug: str | None, shim: Shim) -> None:
    """Have the file system tell the lies of this bug, if it is one of lies, until the shim's faults
    are cleared."""
    if bug in _LIES:
        _LIES[bug](shim)


@contextlib.contextmanager
def replaced(bug: str | None) -> Iterator[None]:
    """pysnap with the functions of this bug, if it is one of pysnap."""
    if bug not in _REPLACED:
        yield
        return
    owner, attribute, broken = _REPLACED[bug]
    right = getattr(owner, attribute)
    setattr(owner, attribute, broken)
    try:
        yield
    finally:
        setattr(owner, attribute, right)
