"""Processes that are killed: at every file operation, and at random moments of a real training run
(README.md section 5)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import torch
from oracle import Book, examine, go_on, leftovers
from power import Ground
from shim import Shim
from workloads import REPOSITORY, Note, Writer

import pysnap
from pysnap import _engine

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import Run, bits

LAST = 2
_STEPS = 3
_EPOCHS = 3
_MOST_KILLS = 3
_LOST = 99


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a new process, which ends behind it; its process id. No other thread of this
    process may be alive."""
    child = os.fork()
    if child == 0:
        status = _LOST
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return child


def write_lines(path: Path) -> Note:
    """Notes go into a file, of which every line is whole whenever the writer is killed."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(what: str, value: object) -> None:
        os.write(file, json.dumps([what, value]).encode() + b"\n")

    return note


def read_lines(path: Path) -> list[str]:
    """What was noted; nothing by a process that was killed before it began."""
    return path.read_text().splitlines() if path.exists() else []


def write_snapshots(folder: Path, note: Note, *, first: int) -> None:
    """A short run with retention."""
    with Writer(folder, note, first=first, last=LAST) as writer:
        writer.snapshotter.resume()
        for _ in range(_STEPS):
            writer.save()


def kill_at(
    shim: Shim,
    own: Path,
    ground: Ground,
    template: Path | None,
    number: int,
    how: str,
    bug: str | None = None,
) -> list[str] | None:
    """Kill such a run before or after one file operation, or cut the power there; what is wrong
    with what is left. None where it ended before it came so far: how often the thread of the event
    log writes is chance."""
    notes = own / "book"
    write_lines(notes)
    first = 1 if template is None else 3
    with ground.mounted() as top:
        place = top / "trial"
        prepare(place, template)
        ground.sync()

        def body() -> None:
            shim.start(place)
            shim.fault(how, first=number)
            planted.lie(bug, shim)
            write_snapshots(place, write_lines(notes), first=first)

        status = os.waitpid(fork(body), 0)[1]
    problems = []
    ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    if not ended and (not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL):
        problems.append(f"it was not killed but ended with {status}")
    book = Book(last=LAST)
    for attempt in range(1, first):
        book.note(f'["asked", [{attempt}, {attempt}]]')
        book.note(f'["durable", {attempt}]')
    for line in read_lines(notes):
        book.note(line)
    with ground.mounted() as top:
        problems += examine(top / "trial" / REPOSITORY, book)
        problems = problems or go_on(top / "trial" / REPOSITORY, book)
        shutil.rmtree(top / "trial")
    notes.unlink()
    return None if ended and not problems else problems


def prepare(place: Path, template: Path | None) -> None:
    """A directory with a copy of the repository `template`, or with none."""
    place.mkdir()
    if template is not None:
        shutil.copytree(template, place / REPOSITORY, symlinks=True)


def train(root: Path, note: Note, *, seed: int) -> None:
    """A real training run, resumed if there is something to resume, to its end."""
    run = Run(seed)
    with pysnap.Snapshotter(
        root,
        **run.parts,
        every="2 steps",
        keep=pysnap.Keep(last=2),
        on_durable=lambda info: note("durable", info.step),
    ) as snapshotter:
        snapshot = snapshotter.resume()
        note("resumed", 0 if snapshot is None else snapshot.step)
        for step, loss in run.train(snapshotter, epochs=_EPOCHS):
            note("trained", [step, loss])
    note("ended", digest(run.state()))


def digest(state: object) -> str:
    """Of every bit of a state."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return bits(value).hex()
        if isinstance(value, dict):
            return [[str(key), plain(item)] for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.tobytes().hex() if hasattr(value, "tobytes") else repr(value)

    return _engine.digest(json.dumps(plain(state)).encode())


class KilledTraining:
    """Training runs that are killed and resumed, held against one that is not."""

    def __init__(self, own: Path) -> None:
        self._own = own
        # Here and not in every process: the first call imports much.
        torch.optim.SGD([torch.zeros(1)]).zero_grad()
        start = time.monotonic()
        status, notes = self._run(own / "reference", seed=0, kill_after=None)
        self._duration = time.monotonic() - start
        assert status == 0
        self._losses = {value[0]: value[1] for what, value in notes if what == "trained"}
        self._end = notes[-1]

    def trial(self, seed: int) -> list[str]:
        """What is wrong with one run that is killed some times, at random moments."""
        chance = random.Random(seed)
        root = self._own / f"run-{seed}"
        problems: list[str] = []
        acknowledged = 0
        moments = [chance.uniform(0, self._duration) for _ in range(chance.randint(1, _MOST_KILLS))]
        for process, moment in enumerate([*moments, None]):
            # Another seed than the program's: nothing of it may be left when a run is resumed.
            resumes = any(root.glob("step-*"))
            status, notes = self._run(
                root, seed=seed + process if resumes else 0, kill_after=moment
            )
            for what, value in notes:
                if what == "resumed" and value < acknowledged:
                    problems.append(f"resumed at {value}, behind {acknowledged}")
                elif what == "durable":
                    acknowledged = max(acknowledged, value)
                elif what == "trained" and self._losses[value[0]] != value[1]:
                    problems.append(f"another loss at step {value[0]}")
        if status != 0 or notes[-1] != self._end:
            problems.append(f"it ended with {status} and {notes[-1]}")
        problems += [f"{name} is left over" for name in leftovers(root)]
        shutil.rmtree(root)
        return problems

    def _run(
        self, root: Path, *, seed: int, kill_after: float | None
    ) -> tuple[int, list[tuple[str, Any]]]:
        """One process, killed after so many seconds unless it has ended; its status and notes."""
        path = root.with_suffix(".notes")
        path.unlink(missing_ok=True)
        child = fork(lambda: train(root, write_lines(path), seed=seed))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        return status, [(what, value) for what, value in map(json.loads, read_lines(path))]
