"""Snapshots without a training loop: one directory written, one read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pysnap.capture import Stager
from pysnap.config import Config
from pysnap.errors import CorruptError, Error, FormatError, NotFoundError, StorageError
from pysnap.repository import Snapshot, discard, is_snapshot, list_snapshots, new_partial, publish
from pysnap.restore import load_state


def save(
    path: str | os.PathLike[str], state: object, *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write `state`, nested values of the closed set of types with tensors, as one snapshot
    directory `path`, which must not exist.

    Returns when it is durable. Raises StateError for what cannot be stored and StorageError where
    the disk refuses; then there is no `path`. A process that is killed meanwhile leaves a
    `.partial-` directory beside `path`, which may be removed.
    """
    target = Path(path).absolute()
    if os.path.lexists(target):
        raise StorageError(17, f"{target} exists; choose a new name", str(target))
    stager = Stager(Config.resolve())
    try:
        partial = new_partial(target.parent)
        try:
            return _write(stager, state, partial, target, metadata or {})
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
    listing = list_snapshots(root)
    failures: list[Error] = [error for _, error in listing.damaged]
    for error in failures:
        if isinstance(error, FormatError):
            raise error
    for snapshot in listing.snapshots:
        try:
            return load_state(snapshot)
        except (CorruptError, StorageError) as error:
            failures.append(error)
    if failures:
        raise CorruptError(
            f"{root} holds snapshots, but none is intact: " + "; ".join(map(str, failures))
        )
    raise NotFoundError(f"{root} holds no snapshot")


def _write(
    stager: Stager, state: object, partial: Path, target: Path, metadata: dict[str, Any]
) -> Path:
    # A state that is larger than the staging memory streams through, so copying and writing run
    # side by side.
    from concurrent.futures import ThreadPoolExecutor

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
