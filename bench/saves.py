"""What one way to save costs: blocked time, time to durable, bytes, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from floors import MemcpyFloor, WriteFloor
from memory import ExtraMemory
from peers.disk import remove, size_on_disk
from state import State

from pysnap.memory import available_memory
from pysnap.verify import verify_snapshot

FORWARD_AND_BACKWARD = 3
"""Times the copy: how long training computes between a save and the optimizer's step."""


def compute(seconds: float) -> None:
    """Multiply matrices with torch's threads for so long."""
    matrix = torch.ones(1024, 1024)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)


def measure(
    *,
    subject: str,
    parameters: int,
    repeats: int,
    host_memory: int | None,
    directory: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The first save and `repeats` warm ones, each beside the floors."""
    folder = Path(directory)
    tell("building the state")
    state = State.build(parameters)
    floor = MemcpyFloor(list(state.tensors().values()))
    tell("looking for the best ways to copy and to write")
    way = floor.fastest()
    disk = WriteFloor(folder, floor.buffer.view)

    def advance() -> None:
        state.advance()
        gc.collect()

    def floors_beside(*, first: bool) -> dict[str, Any]:
        """What the floors take. What is copied to was touched before, for the first save as for
        the others, but rests while the state advances, as the saver's memory does: a copy at once
        after another is faster."""
        written = disk.measure()
        if first:
            floor.clear()
        advance()
        return {
            "write_seconds": written,
            "write_floor": disk.way,
            "memcpy_seconds": floor.measure(way),
            "memcpy_again_seconds": floor.measure(way),
            "memcpy_floor": way,
        }

    beside = floors_beside(first=True)
    memory = ExtraMemory()
    budget = min(host_memory or available_memory() // 4, state.nbytes)
    saver = peers.open_saver(subject, state.parts(), folder, host_memory)
    saver.wait_ready()
    rows = []
    damages = 0
    for repetition in range(1 + repeats):
        tell(f"save {repetition} of {repeats}" if repetition else "first save")
        if repetition:
            beside = floors_beside(first=False)
        advance()

        start = time.perf_counter()
        pending = saver.save()
        blocked = time.perf_counter() - start
        if saver.overlaps:
            compute(FORWARD_AND_BACKWARD * beside["memcpy_seconds"])
            at_gate = time.perf_counter()
            pending.gate()
            blocked += time.perf_counter() - at_gate
        path = pending.wait()
        durable = time.perf_counter() - start

        extra = memory.peak()
        if isinstance(saver, peers.Pysnap) and repetition == repeats:
            damages = len(verify_snapshot(path).damaged)
        costs = {
            "blocked_seconds": blocked,
            "durable_seconds": durable,
            "bytes": size_on_disk(path),
        }
        rows.append(costs | beside)
        remove(path)
    saver.close()
    return {
        "first": rows[:1],
        "warm": rows[1:],
        "extra_memory": extra,
        "staging_budget": budget,
        "damaged_chunks": damages,
        "state": {"parameters": sum(p.numel() for p in state.model.parameters()),
                  "tensors": len(state.tensors()), "bytes": state.nbytes},
    }  # fmt: skip
