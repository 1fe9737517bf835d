"""How much host memory is free, for this process."""

from __future__ import annotations

import contextlib
import errno
import mmap
import resource
from collections.abc import Iterator
from pathlib import Path

from pysnap.errors import StorageError

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
# The stack of a thread, 8 MiB by default, and what it allocates until it can tell a failure.
_SPARE = 32 << 20


def available_memory() -> int:
    """Bytes that could be taken without swapping: those of the machine, or of any cgroup that this
    process is in, whichever is least."""
    return min([_machine(), *_groups()])


def check_spare_memory() -> None:
    """Raise MemoryError where the system gives this process hardly any more. In a thread that
    starts then, Python or the C library may fail in ways that cannot be caught: whoever has started
    it waits for ever, or the process is ended."""
    try:
        mmap.mmap(-1, _SPARE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise MemoryError(f"less than {_SPARE >> 20} MiB of memory can be had") from None


def advice_to_lock() -> str:
    """What to do where the system refuses to lock memory for the copies of devices."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "no limit" if limit == resource.RLIM_INFINITY else f"a limit of {limit >> 10} KiB"
    return (
        f"let the process lock more memory (it has {shown}; `ulimit -l unlimited`, or for a "
        "container `--ulimit memlock=-1`), or set a smaller host_memory"
    )


def _machine() -> int:
    file = _PROC / "meminfo"
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise StorageError.wrap(error, f"reading {file}", file) from error
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise StorageError(errno.EINVAL, f"{file} has no MemAvailable", str(file))


def _groups() -> Iterator[int]:
    """What is left in each cgroup above this process that has a limit."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            # Inside a container the name may be that of the machine outside, where nothing is found
            # but the root, which is the container's own group.
            if controllers == "":
                folder, files = _CGROUP, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                folder = _CGROUP / "memory"
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = folder / name.lstrip("/")
            for place in (group, *group.parents):
                yield from _left(place, *files)
                if place == folder:
                    break


def _left(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        bound = (group / limit).read_text().strip()
        if bound == "max":
            return
        used = int((group / usage).read_text())
        # Of what is used, files that were read or written once: the system gives them up at once.
        with contextlib.suppress(OSError):
            for line in (group / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == cache:
                    used -= int(value)
        yield max(0, int(bound) - used)
