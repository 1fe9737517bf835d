"""What the choice of a codec costs: saves with `codec="auto"` and `codec="none"` in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from peers.disk import remove, size_on_disk
from state import State


def measure(
    *, parameters: int, repeats: int, directory: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Pairs of saves of the same values in one process, after one pair that is not counted; which
    of the two comes first changes from pair to pair."""
    tell("building the state")
    state = State.build(parameters)
    savers = {
        name: peers.open_saver(subject, state.parts(), Path(directory) / name, state.nbytes)
        for name, subject in (("auto", peers.PYSNAP), ("none", peers.PYSNAP_RAW))
    }
    for saver in savers.values():
        saver.wait_ready()
    pairs = []
    for repetition in range(1 + repeats):
        tell(f"pair {repetition} of {repeats}" if repetition else "first pair")
        state.advance()
        gc.collect()
        pair = {}
        for name in sorted(savers, reverse=bool(repetition % 2)):
            start = time.perf_counter()
            path = savers[name].save().wait()
            pair[name] = {
                "durable_seconds": time.perf_counter() - start,
                "bytes": size_on_disk(path),
            }
            remove(path)
        pairs.append(pair)
    for saver in savers.values():
        saver.close()
    return {"pairs": pairs[1:], "state_bytes": state.nbytes}
