"""One measurement in a process of its own, so that its memory and its threads are its own.

    python child.py DESCRIPTOR '{"measure": "saves", "arguments": {...}}'

Writes JSON lines to the descriptor: `{"tell": TEXT}` as it goes on, `{"result": {...}}` at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import codec_pairs
import coding
import psutil
import restores
import saves
import scaling
import training

MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "saves": saves.measure,
    "training": training.measure,
    "lost": training.measure,
    "codecs": codec_pairs.measure,
    "coders": coding.measure,
    "restores": restores.measure,
    "scaling": scaling.measure,
}


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as report:

        def write(line: dict[str, Any]) -> None:
            report.write(json.dumps(line) + "\n")

        job = json.loads(sys.argv[2])
        foreign = _ForeignWork()
        start = time.monotonic()
        result = MEASURES[job["measure"]](
            **job["arguments"], tell=lambda text: write({"tell": text})
        )
        cost = {"foreign_cpu": foreign.share(), "wall_seconds": time.monotonic() - start}
        write({"result": result | cost})


class _ForeignWork:
    """How busy the cores are with anything but this process, the kernel's own threads included."""

    def __init__(self) -> None:
        self._wall = time.monotonic()
        self._busy = _busy()
        self._own = time.process_time()

    def share(self) -> float:
        """Of all cores, since construction: 0 to 1."""
        busy = _busy() - self._busy - (time.process_time() - self._own)
        return max(0.0, busy / ((time.monotonic() - self._wall) * (psutil.cpu_count() or 1)))


def _busy() -> float:
    times = psutil.cpu_times()
    # Guests are counted as users, too.
    idle = times.idle + times.iowait + times.guest + times.guest_nice
    return float(sum(times) - idle)


if __name__ == "__main__":
    main()
