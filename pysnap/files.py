"""Snapshots without a training loop: one directory written, one read."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pysnap.capture import Stager
from pysnap.config import Config
from pysnap.errors import CorruptError, NotFoundError, StorageError
from pysnap.manifest import plain_json
from pysnap.repository import (
    Snapshot,
    discard,
    is_snapshot,
    list_snapshots,
    new_partial,
    publish,
    tell_skipped,
)
from pysnap.restore import load_state

# A reader lists again when the writer removed what was listed; more often than this is no accident.
_ATTEMPTS = 10


def save(
    path: str | os.PathLike[str], state: object, *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write `state`, nested values of the closed set of types with tensors, as one snapshot
    directory `path`, which must not exist.

    Returns when it is durable. Raises StateError for what cannot be stored and StorageError where
    the disk refuses. `path` is whole or absent, whatever happens; a process that is killed
    meanwhile leaves a `.partial-` directory beside it, which may be removed.
    """
    described = plain_json(metadata or {})
    target = Path(path).absolute()
    if os.path.lexists(target):
        raise StorageError(17, f"{target} exists; choose a new name", str(target))
    stager = Stager(Config.resolve())
    try:
        partial = new_partial(target.parent)
        try:
            return _write(stager, state, partial, target, described)
        except BaseException:
            discard(partial)
            raise
    finally:
        stager.close()


def load(path: str | os.PathLike[str]) -> Any:
    """The whole state of a snapshot, or of the newest intact one of a repository, with new tensors
    on the CPU.

    Raises NotFoundError where there is none, CorruptError where none is intact, FormatError for
    an unknown format.
    """
    root = Path(path)
    if is_snapshot(root):
        return load_state(Snapshot.open(root))
    for _ in range(_ATTEMPTS):
        listing = list_snapshots(root)
        skipped = listing.tell_damaged()
        for snapshot in listing.snapshots:
            try:
                return load_state(snapshot)
            except (CorruptError, StorageError) as error:
                # The writer's retention may have removed it since it was listed.
                if os.path.lexists(snapshot.path):
                    skipped.append(tell_skipped(snapshot.path, error))
        if len(skipped) == len(listing.damaged) + len(listing.snapshots):
            break
    if skipped:
        raise CorruptError(f"{root} holds snapshots, but none is intact: " + "; ".join(skipped))
    raise NotFoundError(f"{root} holds no snapshot")


def _write(
    stager: Stager, state: object, partial: Path, target: Path, metadata: dict[str, Any]
) -> Path:
    # A state that is larger than the staging memory streams through, so copying and writing run
    # side by side.
    capture = stager.begin(state)
    with ThreadPoolExecutor(1, thread_name_prefix="pysnap-commit") as committer:
        written = committer.submit(capture.write, partial, step=0, sequence=0, metadata=metadata)
        try:
            capture.copy()
            manifest = written.result()
        except BaseException:
            capture.abort()
            raise
    return publish(partial, manifest, target).path
