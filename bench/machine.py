"""What a reader must know of the machine to judge the figures, but not which one it is."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import psutil
import safetensors
import torch
from floors import available_cores

import pysnap
from pysnap import _engine

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def facts(directory: Path) -> dict[str, Any]:
    """The machine, and the file system that `directory` is on."""
    huge_pages = _HUGE_PAGES.read_text() if _HUGE_PAGES.exists() else "[unknown]"
    return {
        "cpu": _cpu(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "transparent_huge_pages": huge_pages.partition("[")[2].partition("]")[0],
        "kernel": platform.release(),
        "file_system": _file_system(directory),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "pysnap": pysnap.__version__,
        "simd": _engine.simd_path(),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    place = directory.resolve()
    mounts = [
        partition
        for partition in psutil.disk_partitions(all=True)
        if place.is_relative_to(partition.mountpoint)
    ]
    deepest = max(mounts, key=lambda partition: len(partition.mountpoint), default=None)
    return deepest.fstype if deepest is not None else "unknown"
