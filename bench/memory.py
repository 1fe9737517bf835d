"""How much memory a process took on top of what it had, at its peak."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class ExtraMemory:
    """Resident bytes above those at construction, at the peak since then.

    The kernel keeps the peak (`VmHWM`), so nothing is missed between two samples.
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
        self._start = _status("VmRSS")

    def peak(self) -> int | None:
        """The peak so far; None where the kernel does not let it be reset."""
        return max(0, _status("VmHWM") - self._start) if self._known else None


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
