"""The device that a benchmark of CUDA runs on, and a stand-in for it: with the CPU, the same lines
run everywhere, so that none runs for the first time when a GPU is at hand."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Accelerator(Protocol):
    """What the benchmark asks of a device."""

    name: str
    """For torch: `cuda:0`, `cpu`."""

    def facts(self) -> dict[str, Any]:
        """What a reader must know of it to judge the figures."""

    def synchronize(self) -> None:
        """Return when all that is queued has run."""

    def pinned(self, size: int) -> Tensor:
        """Bytes of host memory that copies to and from the device are fastest with."""

    def timed(self, queue: Callable[[], object]) -> float:
        """Seconds that the device needs for what `queue` queues."""


class Cuda:
    """A CUDA device, timed by its own events."""

    def __init__(self, name: str) -> None:
        self.name = f"cuda:{torch.device(name).index or 0}"
        torch.cuda.set_device(self.name)

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.name)
        return {
            "device": properties.name,
            "device_memory_bytes": properties.total_memory,
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def timed(self, queue: Callable[[], object]) -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's gap
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's gap
        start.record()
        queue()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class Cpu:
    """The stand-in: nothing is asynchronous."""

    name = "cpu"

    def facts(self) -> dict[str, Any]:
        return {
            "device": f"none ({platform.machine()})",
            "device_memory_bytes": 0,
            "driver": None,
            "cuda": None,
        }

    def synchronize(self) -> None:
        """Nothing is queued."""

    def pinned(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def timed(self, queue: Callable[[], object]) -> float:
        start = time.perf_counter()
        queue()
        return time.perf_counter() - start


def open_accelerator(name: str) -> Accelerator:
    """The device of this name; `cpu` is the stand-in."""
    return Cpu() if name == "cpu" else Cuda(name)


def _driver_version() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)
