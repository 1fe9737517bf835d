"""One point of a curve: what a snapshot costs of a state of so many bytes in so many tensors."""

from __future__ import annotations

import gc
import json
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import ExtraMemory
from peers.disk import remove
from torch import Tensor, nn

import pysnap

PATTERN_BYTES = 2**30
"""Of physical memory, which a larger state shows again and again: more than any cache holds."""
_MOMENTS = 3
_TRACE = "PYSNAP_TRACE"


def repeated(size: int, tensors: int) -> list[Tensor]:
    """Tensors of fp32 with `size` bytes in all, each at addresses of its own.

    Behind them is at most PATTERN_BYTES of memory with noise, mapped as often as it takes, so that
    a state may be larger than the memory. Every page is mapped before this returns.
    """
    each = max(4, size // tensors // 4 * 4)
    span = -(-each // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    places = max(1, min(tensors, PATTERN_BYTES // span))
    descriptor = os.memfd_create("state")
    try:
        os.ftruncate(descriptor, places * span)
        noise = torch.frombuffer(mmap.mmap(descriptor, places * span), dtype=torch.float32)
        noise.normal_(std=0.02)
        found = []
        for number in range(tensors):
            mapped = mmap.mmap(descriptor, span, offset=number % places * span)
            found.append(torch.frombuffer(mapped, dtype=torch.float32, count=each // 4))
            found[-1].sum()
        return found
    finally:
        os.close(descriptor)


def of_bytes(size: int, tensors: int) -> dict[str, Any]:
    """A state of few tensors with `size` bytes: what a program registers, by name."""
    return {"state": repeated(size, tensors)}


def of_tensors(tensors: int) -> dict[str, Any]:
    """A model of tiny parameters and its AdamW, `tensors` in all: each parameter has its two
    moments and a count of steps."""
    parameters = [nn.Parameter(torch.randn(8)) for _ in range(max(1, tensors // (1 + _MOMENTS)))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(200.0),
            "exp_avg": torch.randn(8),
            "exp_avg_sq": torch.rand(8),
        }
    return {"model": nn.ParameterList(parameters), "optimizer": optimizer}


def _tensors_of(parts: dict[str, Any]) -> list[Tensor]:
    if "state" in parts:
        return list(parts["state"])
    moments = parts["optimizer"].state.values()
    return [*parts["model"].parameters(), *(value for state in moments for value in state.values())]


def measure(
    *,
    size: int | None,
    tensors: int,
    repeats: int,
    host_memory: int | None,
    directory: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The first save and `repeats` warm ones of `tensors` tensors: with `size` bytes in all, or, if
    it is None, of a tiny model and its AdamW."""
    folder = Path(directory)
    tell("building the state")
    parts = of_tensors(tensors) if size is None else of_bytes(size, tensors)
    held = _tensors_of(parts)
    # How long the copy alone took stands in pysnap's own timeline.
    os.environ[_TRACE] = str(folder / "trace.json")
    memory = ExtraMemory()
    rows = []
    with pysnap.Snapshotter(
        folder / "repository",
        host_memory=host_memory,
        keep=pysnap.Keep(last=None),
        **parts,
    ) as snapshotter:
        snapshotter.wait_ready()
        for repetition in range(1 + repeats):
            tell(f"save {repetition} of {repeats}" if repetition else "first save")
            for tensor in held[:1]:
                tensor.detach().mul_(1 + 2**-10)
            gc.collect()
            objects = _seconds_of_state_dicts(parts)
            snapshotter.progress.step += 1
            start = time.perf_counter()
            handle = snapshotter.save()
            blocked = time.perf_counter() - start
            info = handle.wait()
            rows.append(
                {
                    "blocked_seconds": blocked,
                    "state_dict_seconds": objects,
                    "durable_seconds": time.perf_counter() - start,
                    "manifest_bytes": (info.path / "manifest.json").stat().st_size,
                    "bytes": sum(file.stat().st_size for file in info.path.iterdir()),
                    "overlap_seconds": _overlap(snapshotter),
                }
            )
            remove(info.path)
        extra = memory.peak()
    copies = _captures(folder / "trace.json")
    for row, copied, beside in zip(rows, copies[::2], copies[1::2], strict=True):
        row["copy_seconds"] = copied
        row["python_seconds"] = row["blocked_seconds"] - copied
        row["overlap_python_seconds"] = row["overlap_seconds"] - beside
    return {
        "bytes": sum(tensor.nbytes for tensor in held),
        "tensors": len(held),
        "first": rows[:1],
        "warm": rows[1:],
        "extra_memory": extra,
        "staging_bytes": host_memory,
    }


def _overlap(snapshotter: pysnap.Snapshotter) -> float:
    """Seconds of a `save()` as it is at the end of a step."""
    gc.collect()
    snapshotter.progress.step += 1
    start = time.perf_counter()
    handle = snapshotter.save(overlap=True)
    seconds = time.perf_counter() - start
    remove(handle.wait().path)
    return seconds


def _seconds_of_state_dicts(parts: dict[str, Any]) -> float:
    """What the program's own objects take to tell their state."""
    start = time.perf_counter()
    for part in parts.values():
        if hasattr(part, "state_dict"):
            part.state_dict()
    return time.perf_counter() - start


def _captures(trace: Path) -> list[float]:
    """Seconds of each copy on the training thread, in order."""
    spans = [event for event in json.loads(trace.read_text()) if event.get("name") == "capture"]
    return [span["dur"] / 1e6 for span in sorted(spans, key=lambda span: float(span["ts"]))]
