"""What one way to save costs: blocked time, time to durable, bytes, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from floors import MemcpyFloor, write_floor
from memory import ExtraMemory
from state import State

from pysnap.memory import available_memory
from pysnap.repository import Snapshot
from pysnap.restore import verify


def measure(
    *,
    subject: str,
    parameters: int,
    repeats: int,
    host_memory: int | None,
    directory: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The first save and `repeats` warm ones, each right after the floors."""
    folder = Path(directory)
    tell("building the state")
    state = State.build(parameters)
    floor = MemcpyFloor(list(state.tensors().values()))
    floor.measure()

    memory = ExtraMemory()
    budget = min(host_memory or available_memory() // 4, state.nbytes)
    saver = peers.open_saver(subject, state.parts(), folder, host_memory)
    saver.wait_ready()
    rows = []
    damages = 0
    for repetition in range(1 + repeats):
        tell(f"save {repetition} of {repeats}" if repetition else "first save")
        state.advance()
        gc.collect()
        written = write_floor(folder, floor.buffer.view)
        copied = floor.measure()

        start = time.perf_counter()
        pending = saver.save()
        blocked = time.perf_counter() - start
        path = pending.wait()
        durable = time.perf_counter() - start

        extra = memory.peak()
        if isinstance(saver, peers.Pysnap) and repetition == repeats:
            damages = len(verify(Snapshot.open(path)))
        rows.append(
            {
                "blocked_seconds": blocked,
                "durable_seconds": durable,
                "bytes": peers.size_on_disk(path),
                "memcpy_seconds": copied,
                "write_seconds": written,
            }
        )
        peers.remove(path)
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
