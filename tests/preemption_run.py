"""A training run that gets a signal again and again, each time in a process of its own.

`python tests/preemption_run.py FOLDER SEED`: trains uninterrupted, then with 20 signals at random
moments, and prints as JSON what each attempt did. Torch is imported once: the attempts are forks of
a process without threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import Run, bits

from pysnap import Preempted, Snapshotter

EPOCHS = 45  # of 6 steps
SIGNALS = 20
MOST_STEPS = 12  # of an attempt until its signal
MOST_MILLISECONDS = 6.0  # and how much later it comes: a step takes about one


def validate(run: Run) -> float:
    """Draws, and changes the mode of the model, as validations do."""
    run.model.eval()
    with torch.no_grad():
        loss = run.model(torch.randn(8, 6)).square().mean().item()
    run.model.train()
    return float(loss)


def train(path: Path, report: int) -> None:
    """Train to the end, or to a signal; one line to `report` for each step and at the end."""
    run = Run(seed=os.getpid())
    if not path.exists():
        run = Run(seed=0)

    def write(*words: object) -> None:
        os.write(report, (" ".join(map(str, words)) + "\n").encode())

    with Snapshotter(path, **run.parts, every="7 steps") as snapshotter:
        try:
            snapshotter.resume()
            write("start", snapshotter.progress.step)
            for _ in snapshotter.epochs(EPOCHS):
                for batch in run.loader:
                    with snapshotter.step():
                        loss = (run.model(batch) - batch).square().mean()
                        run.optimizer.zero_grad()
                        loss.backward()
                        run.optimizer.step()
                        run.scheduler.step()
                        write("step", snapshotter.progress.step + 1, loss.item().hex())
                snapshotter.report(val_loss=validate(run))
        except Preempted as end:
            write("preempted", end.step, end.signal.name)
            raise
    write("end", hashlib.sha256(repr(exact(run.state())).encode()).hexdigest())


def exact(state: Any) -> Any:
    """A state whose text shows every bit."""
    if isinstance(state, dict):
        return {key: exact(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [exact(value) for value in state]
    if isinstance(state, torch.Tensor):
        return (str(state.dtype), tuple(state.shape), bits(state))
    return state.tobytes() if isinstance(state, np.ndarray) else state


def attempt(path: Path, steps: int | None, delay: float) -> dict[str, Any]:
    """Train in a child that gets SIGTERM `delay` seconds after its `steps`-th step began to be
    reported; None: it gets none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.close(reading)
            train(path, writing)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    os.close(writing)
    found: dict[str, Any] = {"steps": []}
    with open(reading) as lines:
        for line in lines:
            word, *rest = line.split()
            if word == "step":
                found["steps"].append([int(rest[0]), rest[1]])
                if len(found["steps"]) == steps:
                    time.sleep(delay)
                    os.kill(child, signal.SIGTERM)
            else:
                found[word] = rest
    found["status"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return found


def warm_up() -> None:
    """Have torch import what it imports at the first use."""
    run = Run()
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.state()


def main() -> None:
    torch.set_num_threads(1)
    warm_up()
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    whole = attempt(folder / "whole", None, 0)
    attempts = [
        attempt(
            folder / "run",
            chance.randint(1, MOST_STEPS),
            chance.uniform(0, MOST_MILLISECONDS / 1000),
        )
        for _ in range(SIGNALS)
    ]
    attempts.append(attempt(folder / "run", None, 0))
    print(json.dumps({"whole": whole, "attempts": attempts}))


if __name__ == "__main__":
    main()
