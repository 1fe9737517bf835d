"""Whether a run can keep its snapshots, told before its first step: memory, disk, time.

What cannot work is an error, what is tight a warning with numbers.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from pysnap import storage
from pysnap.cadence import Cadence
from pysnap.capture import Size
from pysnap.errors import ConfigError, StorageError
from pysnap.measure import shown_seconds, shown_size
from pysnap.repository import Listing, Repository
from pysnap.retention import Keep

_log = logging.getLogger("pysnap")

_REST = 32 * 1024
"""Of a snapshot beside packs and tree: directory, notes, pages that are not full."""
_TEST_BYTES = 16 * 2**20
_ROOM = 1.25
"""Less than so many times what is needed is tight."""
_BEST_RATIO = 2.0
"""Encoded snapshots are rarely smaller than half."""
_FEW = 10
_NETWORK = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "beegfs", "gpfs",
    "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs",
)  # fmt: skip
_IN_MEMORY = ("tmpfs", "ramfs")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Forecast:
    """What the repository will need, as far as the rules tell."""

    snapshot: int
    """Bytes of one snapshot on disk, at most."""
    kept: int
    """How many stay, at least."""
    bounded: bool
    """Whether no more than those ever stay."""
    peak: int
    """Bytes of all that is there at one moment, at most, if `bounded`: those that stay, those that
    a tag or a pin holds now or that cannot be read, and one in flight, or one that is about to be
    removed."""
    present: int
    """Bytes of what is there now."""


def forecast(
    size: int,
    keep: Keep,
    cadence: Cadence,
    listing: Listing,
    held: dict[Path, str],
    *,
    improvements: bool,
) -> Forecast:
    """What the repository will need; `size` is that of one snapshot on disk, `improvements`:
    snapshots are taken for a metric, too."""
    more = _more_kept(keep, cadence, improvements)
    kept = (keep.last or 1) + keep.best + (more or 0)
    paths = [one.path for one in listing.snapshots]
    stay = [path for path in paths if path in held] + [path for path, _ in listing.damaged]
    marked = sum(map(_on_disk, stay))
    others = sum(_on_disk(path) for path in paths if path not in held)
    # What is there may be more than the rule keeps, or larger: it goes when the first is durable.
    peak = marked + max((kept + 1) * size, others + size)
    bounded = keep.last is not None and more is not None
    return Forecast(size, kept, bounded, peak, marked + others)


def _more_kept(keep: Keep, cadence: Cadence, improvements: bool) -> int | None:
    """How many snapshots `every` and `for_` keep at once; None where there is no bound, or the
    rules count in different measures."""
    grid, period = keep.grid, keep.period
    if period is None:
        return 0 if grid is None else None
    if grid is not None:
        between: float | None = grid.value if grid.measure == period.measure else None
    elif improvements or cadence.measured or _kinds(cadence) > 1:
        between = None
    else:
        between = getattr(cadence, period.measure)
    return None if between is None else math.ceil(period.value / between) + 1


def _kinds(cadence: Cadence) -> int:
    return sum(value is not None for value in (cadence.steps, cadence.seconds, cadence.epochs))


def _on_disk(snapshot: Path) -> int:
    """Bytes of the files of a snapshot; 0 where they cannot be told."""
    try:
        names = storage.list_directory(snapshot)
        return _REST + sum(storage.file_size(snapshot / name) for name in names)
    except StorageError:
        return 0


def check(
    repository: Repository,
    size: Size,
    keep: Keep,
    cadence: Cadence,
    *,
    encodes: bool,
    improvements: bool,
    free_memory: int,
    metadata: int,
) -> Forecast:
    """Look whether snapshots of `size` can be taken and kept, write a little to see how fast the
    disk is, and tell what is tight. `metadata` are the bytes of a manifest beside its tree.

    Raises ConfigError where staging does not fit into memory, StorageError where snapshots do not
    fit onto the disk or nothing can be written there.
    """
    root = repository.root
    found = forecast(
        size.disk + metadata + _REST,
        keep,
        cadence,
        repository.list(),
        repository.held(),
        improvements=improvements,
    )
    _check_memory(size, free_memory)
    _check_disk(root, found, keep, encodes=encodes)
    seconds = _check_speed(repository, size.stream)
    _tell_file_system(root)
    if size.staging < size.stream:
        _log.warning(
            "the state has %s, staging memory %s: a step that takes a snapshot waits for the disk, "
            "about %s; a larger host_memory shortens that",
            shown_size(size.stream),
            shown_size(size.staging),
            shown_seconds(seconds * (1 - size.staging / size.stream)),
        )
    if cadence.seconds is not None and seconds > cadence.seconds:
        _log.warning(
            "snapshots are due every %s, but one will be durable only after about %s: they will be "
            "late",
            shown_seconds(cadence.seconds),
            shown_seconds(seconds),
        )
    _log.info(
        "a snapshot has up to %s on disk and is durable after about %s; %s",
        shown_size(found.snapshot),
        shown_seconds(seconds),
        f"{root.name} will have {shown_size(found.peak)} at most, and what is tagged or pinned "
        "from now on"
        if found.bounded
        else f"how many {keep} keeps has no bound",
    )
    return found


def _check_memory(size: Size, free: int) -> None:
    if size.staging > free:
        raise ConfigError(
            f"host_memory: staging needs {shown_size(size.staging)}, and {shown_size(free)} of "
            "memory are free for this process; set a smaller host_memory, such as "
            f"{max(1, free // 2 // 2**20)}MiB"
        )
    if size.staging * _ROOM > free:
        _log.warning(
            "staging takes %s of the %s of memory that are free for this process",
            shown_size(size.staging),
            shown_size(free),
        )


def _check_disk(root: Path, found: Forecast, keep: Keep, *, encodes: bool) -> None:
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    needed = found.peak - found.present
    least = needed / (_BEST_RATIO if encodes else 1.0)
    numbers = (
        f"{found.kept} snapshots that {keep} keeps and one in flight, of up to "
        f"{shown_size(found.snapshot)} each, need {shown_size(needed)} more on {root}, "
        f"where {shown_size(free)} are free"
    )
    if least > free:
        raise StorageError(
            errno.ENOSPC, f"{numbers}; keep fewer, or choose another directory", str(root)
        )
    if needed * _ROOM > free:
        _log.warning("%s", numbers)
    fit = (free - needed) // found.snapshot
    if not found.bounded and fit < _FEW:
        _log.warning(
            "%s has no bound, and %s holds %d snapshots more (%s free, up to %s each)",
            keep,
            root,
            max(0, fit),
            shown_size(free),
            shown_size(found.snapshot),
        )


def _check_speed(repository: Repository, stream: int) -> float:
    """About how many seconds it takes until a snapshot is durable."""
    length = min(max(stream, 1), _TEST_BYTES)
    data = os.urandom(min(length, 2**20))
    data *= math.ceil(length / len(data))
    file = repository.scratch()
    try:
        start = time.monotonic()
        storage.write_file(file, data[:length])
        seconds = time.monotonic() - start
    finally:
        with contextlib.suppress(StorageError):
            storage.remove_file(file)
    return seconds * max(1.0, stream / length)


def _tell_file_system(root: Path) -> None:
    try:
        kind = file_system(root, Path("/proc/self/mountinfo").read_text())
    except OSError:
        # Nobody can tell, as where no more files can be opened.
        return
    if kind in _NETWORK:
        _log.warning(
            "%s is on a network file system (%s): what is durable there is for its server to say",
            root,
            kind,
        )
    elif kind in _IN_MEMORY:
        _log.warning("%s is in memory (%s): it does not survive the machine", root, kind)


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, by the lines of `/proc/self/mountinfo`; empty
    if it is in none of them."""
    found, deepest = "", -1
    resolved = path.resolve()
    for line in mounts.splitlines():
        fields = line.split()
        if "-" not in fields:
            continue
        # Blanks in a name are written as octal numbers.
        point = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4]))
        if resolved.is_relative_to(point) and len(point.parts) >= deepest:
            found, deepest = fields[fields.index("-") + 1], len(point.parts)
    return found
