"""Reads whole snapshots and tells everything that is wrong with them, without torch."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pysnap import _engine, storage
from pysnap.errors import CorruptError, Error, NotFoundError, StorageError, printable
from pysnap.manifest import Manifest
from pysnap.notes import FILE as NOTES_FILE
from pysnap.notes import Notes
from pysnap.repository import (
    MANIFEST,
    Snapshot,
    check_header,
    is_gone,
    is_snapshot,
    open_listed,
    snapshot_names,
)
from pysnap.zstd import zstd_libraries

_MOST_THREADS = 16
# Raw bytes that the engine checks between two calls of `progress`.
_BATCH = 256 * 2**20
_MOST_SENTENCES = 100
_MOST_NAMES = 5

Progress: TypeAlias = Callable[[int], object]
_Range: TypeAlias = tuple[int, int]


@dataclass
class Verdict:
    """What verifying found in one snapshot."""

    path: Path
    manifest: Manifest | None = field(default=None, repr=False)
    """None where it cannot be read: nothing else is known of the snapshot then."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each thing that is wrong, with its file."""
    damaged: list[str] = field(default_factory=list)
    """Names of the tensors and arrays that cannot be read, in the order of the state."""
    missing: list[str] = field(default_factory=list)
    """Names of the files that the manifest names and that are not there."""
    extra: list[str] = field(default_factory=list)
    """Names in the directory that do not belong to the snapshot. No damage."""
    remarks: list[str] = field(default_factory=list)
    """Sentences on what is odd and harms no tensor."""

    @property
    def intact(self) -> bool:
        """Whether everything in the snapshot can be read, and is what was written."""
        return not self.problems


@dataclass
class RepositoryVerdict:
    """What verifying found in a repository."""

    path: Path
    snapshots: list[Verdict] = field(default_factory=list)
    """Newest first; those whose manifest cannot be read stand last."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each thing that is wrong beside the snapshots."""
    remarks: list[str] = field(default_factory=list)
    """Sentences on what is odd and harms no snapshot."""

    @property
    def intact(self) -> bool:
        """Whether the repository and every snapshot in it is intact."""
        return not self.problems and all(verdict.intact for verdict in self.snapshots)


def verify_snapshot(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Verdict:
    """Read and check every byte of the snapshot in the directory `path`.

    `progress` is called now and then with the number of bytes of encoded chunks that were checked
    since the last call; in all they are `Verdict.manifest.stored`. Damage is told, not raised, and
    so is a format that is not known. Raises NotFoundError where there is no snapshot, and an Error
    where the process or the machine lacks what looking takes (descriptors, memory, libzstd).
    """
    directory = Path(path)
    if not is_snapshot(directory):
        raise NotFoundError(f"{directory} is no snapshot: it holds no {MANIFEST}")
    return _verify(directory, Snapshot.open, progress)


def verify_repository(
    path: str | os.PathLike[str], *, progress: Progress | None = None
) -> RepositoryVerdict:
    """Verify every snapshot of the repository `path`, safely beside its writer.

    `progress` as in `verify_snapshot`. Raises NotFoundError where there is no repository,
    StorageError where it cannot be listed, and as `verify_snapshot`.
    """
    root = Path(path)
    names = snapshot_names(root) if os.path.isdir(root) else []
    verdict = RepositoryVerdict(root)
    try:
        check_header(root)
    except Error as error:
        if error.says_nothing:
            raise
        # Where there are snapshots, a missing header is damage.
        if isinstance(error, NotFoundError) and not names:
            raise
        verdict.problems.append(str(error))
    for name in names:
        found = _verify(root / name, open_listed, progress)
        # The writer's retention may have removed it meanwhile.
        if not is_gone(root / name):
            verdict.snapshots.append(found)
    verdict.snapshots.sort(key=_sequence, reverse=True)
    verdict.remarks += _copies(verdict.snapshots)
    return verdict


def _verify(
    path: Path, open_snapshot: Callable[[Path], Snapshot], progress: Progress | None
) -> Verdict:
    verdict = Verdict(path)
    try:
        snapshot = open_snapshot(path)
    except Error as error:
        if error.says_nothing:
            raise
        verdict.problems.append(str(error))
        return verdict
    verdict.manifest = snapshot.manifest
    _check_files(verdict, snapshot)
    damages = _damages(verdict, snapshot, progress)
    try:
        _tell(verdict, snapshot, damages)
    except CorruptError as error:
        # The tree is none: nothing in the snapshot has a name.
        verdict.problems.append(str(error))
    return verdict


def _check_files(verdict: Verdict, snapshot: Snapshot) -> None:
    packs = {name for name, _ in snapshot.manifest.packs}
    try:
        present = storage.list_directory(snapshot.path)
    except StorageError as error:
        if error.says_nothing:
            raise
        verdict.problems.append(str(error))
        return
    verdict.missing += sorted(packs.difference(present))
    # Notes may be just being replaced.
    present = [name for name in present if not name.startswith(f".{NOTES_FILE}-")]
    verdict.extra += sorted({*present} - packs - {MANIFEST, NOTES_FILE})
    verdict.remarks += [
        f"{snapshot.path} holds {printable(name)}, which does not belong to it"
        for name in verdict.extra
    ]
    try:
        Notes.read(snapshot.path)
    except Error as error:
        if error.says_nothing:
            raise
        verdict.remarks.append(str(error))


def _damages(
    verdict: Verdict, snapshot: Snapshot, progress: Progress | None
) -> dict[str, list[_Range]]:
    """What is wrong with chunks, and where their bytes lie in the stream."""
    chunks = snapshot.manifest.chunks
    ends = chunks["raw"].cumsum(dtype=np.int64).tolist()
    damages: dict[str, list[_Range]] = {}
    for first, last in _batches(ends):
        try:
            found = _engine.verify(
                packs=snapshot.packs(),
                chunks=chunks[first:last],
                threads=min(_MOST_THREADS, _engine.available_processors()),
                zstd=zstd_libraries(),
            )
        except MemoryError:
            raise Error(f"{snapshot.path} cannot be verified: there is no memory") from None
        except Error as error:
            # No damage: libzstd is missing.
            raise Error(f"{snapshot.path} cannot be verified: {error}") from error
        for index, what, number in found:
            refusal = StorageError(number, what, str(snapshot.path))
            if refusal.says_nothing:
                raise refusal
            chunk = first + index
            start = ends[chunk - 1] if chunk else 0
            damages.setdefault(what, []).append((start, ends[chunk]))
        if progress is not None:
            progress(int(chunks["stored"][first:last].sum(dtype=np.int64)))
    return damages


def _batches(ends: list[int]) -> Iterator[tuple[int, int]]:
    """First and behind the last chunk of runs of about `_BATCH` raw bytes."""
    first = 0
    while first < len(ends):
        done = ends[first - 1] if first else 0
        last = max(first + 1, bisect.bisect_right(ends, done + _BATCH))
        yield first, last
        first = last


def _tell(verdict: Verdict, snapshot: Snapshot, damages: dict[str, list[_Range]]) -> None:
    """Names of what is damaged. Raises CorruptError where the tree is none."""
    where = str(snapshot.path)
    for what, ranges in islice(damages.items(), _MOST_SENTENCES):
        names = snapshot.manifest.names_in(ranges, where)
        shown = ", ".join(map(printable, names[:_MOST_NAMES])) or "no tensor"
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        verdict.problems.append(f"{what}; it holds {shown}{more}")
    if len(damages) > _MOST_SENTENCES:
        verdict.problems.append(
            f"{where}: {len(damages) - _MOST_SENTENCES} more chunks are damaged"
        )
    ranges = sorted(place for places in damages.values() for place in places)
    verdict.damaged += snapshot.manifest.names_in(ranges, where)


def _sequence(verdict: Verdict) -> int:
    return -1 if verdict.manifest is None else verdict.manifest.sequence


def _copies(verdicts: list[Verdict]) -> Iterator[str]:
    """A sentence for each directory that holds a snapshot that another one holds, too, or one of
    another step than its name says."""
    seen: dict[str, str] = {}
    for verdict in verdicts:
        manifest, name = verdict.manifest, verdict.path.name
        if manifest is None:
            continue
        first = seen.setdefault(manifest.id, name)
        if first != name:
            yield f"{verdict.path} is a copy of {first}: it has the same id"
        if int(name.removeprefix("step-").partition(".")[0]) != manifest.step:
            yield f"{verdict.path} holds the snapshot of step {manifest.step}"
