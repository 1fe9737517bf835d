"""The programs that the harnesses run, mostly under the shim: `python drive.py COMMAND JSON`.

The answer is one line of JSON. Thousands of trials share a process, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import torch
from crash_model import CrashState, crash_states
from injection import Run, injections, make_template
from oracle import Book, examine, examine_files, go_on, silence
from shim import Shim
from workloads import FILES, REPOSITORY, WORKLOADS, marks_to


def record(log: str, folder: str, workloads: list[str], bug: str | None = None) -> dict[str, Any]:
    """Run workloads under the shim, each in a directory of its own, and store their logs."""
    shim = Shim()
    logs = {}
    for name in workloads:
        root = Path(folder) / name
        root.mkdir(parents=True)
        shim.start(root)
        with planted.bug(bug, shim):
            WORKLOADS[name](root, marks_to(shim), shim)
        shim.stop()
        logs[name] = (str(root), shim.log())
        shutil.rmtree(root)
    Path(log).write_bytes(pickle.dumps(logs))
    return {"operations": sum(len(operations) for _, operations in logs.values())}


def check_states(
    log: str, folder: str, seed: int, mixes: int, limit: int | None, shard: int, shards: int
) -> dict[str, Any]:
    """Make the crash states of stored logs real, and try each."""
    states: list[tuple[str, CrashState]] = []
    for name, (root, operations) in pickle.loads(Path(log).read_bytes()).items():
        found = crash_states(root, operations, seed=seed, mixes=mixes)
        states += [(name, state) for state in found]
    total = len(states)
    if limit is not None and total > limit:
        states = [states[index * total // limit] for index in range(limit)]
    violations = []
    mine = states[shard::shards]
    for name, state in mine:
        place = Path(folder) / f"state-{shard}"
        problems = _try_state(state, place)
        violations += [f"{name}, {state.why}: {problem}" for problem in problems]
        shutil.rmtree(place)
    return {"trials": len(mine), "total": total, "violations": violations}


def _try_state(state: CrashState, place: Path) -> list[str]:
    book = Book()
    for mark in state.marks:
        book.note(mark)
    state.lay_out(place)
    if (place / FILES).is_dir():
        return examine_files(place / FILES, book)
    problems = examine(place / REPOSITORY, book)
    return problems or go_on(place / REPOSITORY, book)


def inject(
    folder: str, everything: bool, existing: bool, shard: int, shards: int, bug: str | None = None
) -> dict[str, Any]:
    """Fail every operation of a training run, in every way."""
    shim = Shim()
    own = Path(folder) / f"inject-{shard}"
    own.mkdir()
    template = make_template(own / "template") if existing else None
    operations = Run(shim, own / "rehearsal", template).rehearse()
    plan = list(injections(operations, everything=everything))[shard::shards]
    violations = []
    for injection in plan:
        place = own / "trial"
        problems = Run(shim, place, template).under(injection)
        named = f"{injection} ({operations[injection.first - 1] if not injection.kind else ''})"
        violations += [f"{named}: {problem}" for problem in problems]
        shutil.rmtree(place)
    return {"trials": len(plan), "violations": violations, "operations": len(operations)}


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "record": record,
    "check_states": check_states,
    "inject": inject,
}


if __name__ == "__main__":
    silence()
    torch.set_num_threads(1)
    answer = COMMANDS[sys.argv[1]](**json.loads(sys.argv[2]))
    os.write(1, json.dumps(answer).encode())
