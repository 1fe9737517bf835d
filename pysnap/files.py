"""Snapshots without a training loop: one directory written, one read, in whole or in part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pysnap import storage
from pysnap.capture import Stager
from pysnap.config import Config
from pysnap.errors import ConfigError, CorruptError, NotFoundError, StorageError
from pysnap.manifest import plain_json
from pysnap.repository import (
    Snapshot,
    discard,
    is_gone,
    is_snapshot,
    list_snapshots,
    new_partial,
    publish,
    tell_skipped,
)
from pysnap.restore import load_state
from pysnap.view import View

_Read = TypeVar("_Read")

# A reader lists again when the writer removed what was listed; more often than this is no accident.
_ATTEMPTS = 10


def save(
    path: str | os.PathLike[str], state: object, *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write `state`, nested values of the closed set of types with tensors, as one snapshot
    directory `path`, which must not exist.

    Returns when it is durable, as long as the disk takes. Raises StateError for what cannot be
    stored and StorageError where the disk refuses. `path` is whole or absent, whatever happens; a
    process that is killed meanwhile leaves a `.partial-` directory beside it, which may be removed.
    """
    described = plain_json(metadata or {})
    target = Path(path).absolute()
    if storage.exists(target):
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


def load(path: str | os.PathLike[str], only: Iterable[str] | None = None) -> Any:
    """The state of a snapshot, or of the newest intact one of a repository, with new tensors on the
    CPU.

    With `only`, just what these names select, and only the chunks that hold it are read: "model"
    selects everything under it, "model/encoder" also "model/encoder.weight". Dicts keep the entries
    on the way; a list or tuple of which a part is selected stays whole.

    Raises NotFoundError where there is no snapshot or a name selects nothing, CorruptError where
    none is intact, FormatError for an unknown format, StorageError, with nothing skipped, where
    the process or the machine lacks descriptors or memory to look.
    """
    names = None if only is None else _names(only)
    return _newest(path, lambda snapshot: load_state(snapshot, names))


def open_view(path: str | os.PathLike[str]) -> View:
    """The tensors of a snapshot, or of the newest readable one of a repository, by name; each is
    read when it is indexed, and only then.

        weight = pysnap.open("runs/gpt")["model/embedding.weight"]
        weight.shape, weight.dtype
        weight[1000:1010]          # reads the chunks that hold these rows

    Raises as `load` does.
    """
    # Absolute: a program may change its directory.
    return _newest(Path(path).absolute(), View)


def _names(only: Iterable[str]) -> list[str]:
    names = list(only)
    # A single string would be taken as a list of its letters.
    if isinstance(only, str) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'only must be a list of names, such as ["model"], not {only!r}')
    return names


def _newest(path: str | os.PathLike[str], read: Callable[[Snapshot], _Read]) -> _Read:
    """What `read` makes of the snapshot at `path`, or of the newest in the repository there of
    which it can make anything; tells what it skips."""
    root = Path(path)
    if is_snapshot(root):
        return read(Snapshot.open(root))
    for _ in range(_ATTEMPTS):
        listing = list_snapshots(root)
        skipped = listing.tell_damaged()
        for snapshot in listing.snapshots:
            try:
                return read(snapshot)
            except (CorruptError, StorageError) as error:
                if error.says_nothing:
                    raise
                # The writer's retention may have removed it since it was listed.
                if not is_gone(snapshot.path):
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
