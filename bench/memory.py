"""How much memory a process took on top of what it had, at its peak."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import psutil

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have memory that is freed stay with this process, where its allocator can: a result of
    megabytes is in new pages each time otherwise, or is not, by chance."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # The largest that is allowed.
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class ExtraMemory:
    """Resident bytes above those at construction, at the peak since then.

    The kernel keeps the peak (`VmHWM`), so nothing is missed between two samples. Processes that
    were started since then, and live, count with their own peak, less what they share.
    """

    def __init__(self) -> None:
        """Start to count, after freed memory has gone back to the system."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._known = True
        except OSError:
            self._known = False
        self._start = _status(os.getpid(), "VmRSS")

    def peak(self) -> int | None:
        """The peak so far; None where the kernel does not let it be reset."""
        if not self._known:
            return None
        others = psutil.Process().children(recursive=True)
        own = _status(os.getpid(), "VmHWM") - self._start
        return max(0, own) + sum(_private_peak(other.pid) for other in others)


def _private_peak(process: int) -> int:
    try:
        return _status(process, "VmHWM") - _status(process, "RssShmem")
    except OSError:
        return 0  # it has ended


def _status(process: int, field: str) -> int:
    path = Path(f"/proc/{process}/status")
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {field}")
