"""How much host memory is free, for this process."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that could be taken without swapping: those of the machine or of the cgroup,
    whichever is less."""
    machine = _machine()
    group = _cgroup()
    return machine if group is None else min(machine, group)


def _machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _cgroup() -> int | None:
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            bound, used = (
                (_CGROUP / limit).read_text().strip(),
                (_CGROUP / usage).read_text().strip(),
            )
        except OSError:
            continue
        return None if bound == "max" else max(0, int(bound) - int(used))
    return None
