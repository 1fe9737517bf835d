"""The programs that the harnesses run, mostly under the shim: `python drive.py COMMAND JSON`.

The answer is one line of JSON. Thousands of trials share a process, so that torch is imported once.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import torch
from crash_model import CrashState, choose, crash_states
from injection import File, Run, Trial, injections, make_template
from killing import KilledTraining, kill_at, prepare, write_snapshots
from oracle import Book, examine, examine_files, go_on, silence
from power import Disk, Ground
from shim import Operation, Shim
from workloads import FILES, REPOSITORY, WORKLOADS, marks_to

_PR_SET_PDEATHSIG = 1


def record(log: str, folder: str, workloads: list[tuple[str, str | None]]) -> dict[str, Any]:
    """Run workloads, with or without a planted bug, under the shim, each in a directory of its own,
    and store their logs."""
    shim = Shim()
    logs = {}
    for name, bug in workloads:
        root = Path(folder) / "recorded"
        root.mkdir(parents=True)
        shim.start(root)
        planted.lie(bug, shim)
        with planted.replaced(bug):
            WORKLOADS[name](root, marks_to(shim), shim)
        shim.stop()
        logs[f"{name} with {bug}" if bug else name] = (str(root), shim.log())
        shutil.rmtree(root)
    Path(log).write_bytes(pickle.dumps(logs))
    return {"operations": sum(len(operations) for _, operations in logs.values())}


def check_states(
    log: str, folder: str, seed: int, mixes: int, limit: int | None, shard: int, shards: int
) -> dict[str, Any]:
    """Make the crash states of stored logs real, of each log `limit` at most, and try them."""
    states: list[CrashState] = []
    for name, (root, operations) in pickle.loads(Path(log).read_bytes()).items():
        found = list(crash_states(name, root, operations, seed=seed, mixes=mixes))
        states += choose(found, limit or len(found))
    own = Path(tempfile.mkdtemp(dir=folder))
    mine = states[shard::shards]
    violations = []
    for state in mine:
        place = own / "state"
        violations += [f"{state.why}: {problem}" for problem in _try_state(state, place)]
        shutil.rmtree(place)
    return {"trials": len(mine), "violations": violations}


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
    folder: str,
    everything: bool,
    what: str,
    shard: int,
    shards: int,
    bug: str | None = None,
    only: str = "",
) -> dict[str, Any]:
    """Fail every operation of a training run that is `resumed` or `new`, or of a `file`, in every
    way; `only` operations of one kind."""
    shim = Shim()
    own = Path(tempfile.mkdtemp(dir=folder))
    template = make_template(own / "template") if what == "resumed" else None

    def trial(place: Path) -> Trial:
        return File(shim, place) if what == "file" else Run(shim, place, template)

    with planted.replaced(bug):
        operations = trial(own / "rehearsal").rehearse()
    plan = [
        (operation, injection)
        for operation, injection in injections(operations, everything=everything)
        if only in ("", operation.kind)
    ][shard::shards]
    violations = []
    for operation, injection in plan:
        place = own / "trial"
        with planted.replaced(bug):
            problems = trial(place).under(injection)
        violations += [f"{injection}, {operation}: {problem}" for problem in problems]
        shutil.rmtree(place)
    return {"trials": len(plan), "violations": violations, "operations": len(operations)}


def kill(
    folder: str,
    existing: bool,
    shard: int,
    shards: int,
    bug: str | None = None,
    only: str = "",
    file_system: str | None = None,
    everything: bool = True,
) -> dict[str, Any]:
    """Kill a run before and after every operation; `only` those of one kind. With `file_system`,
    the power of the disk is cut there."""
    shim = Shim()
    own = Path(tempfile.mkdtemp(dir=folder))
    template = make_template(own / "template") if existing else None
    ground = Ground(own) if file_system is None else Disk(file_system, own)
    end = "kill" if file_system is None else "power cut"
    place = own / "rehearsal"
    prepare(place, template)
    shim.start(place)
    with planted.replaced(bug):
        write_snapshots(place, lambda what, value: None, first=3 if existing else 1)
    shim.stop()
    operations = shim.log()
    plan = [
        (number, how)
        for number, operation in enumerate(operations, 1)
        for how in (f"{end} before", f"{end} after")
        if only in ("", operation.kind)
        # Before an operation is after the one before, but for other threads.
        if how.endswith("after")
        or (everything and operation.kind not in ("readdir", "stat", "read", "pread"))
    ][shard::shards]
    violations = []
    killed = 0
    for number, how in plan:
        with planted.replaced(bug):
            problems = kill_at(shim, own, ground, template, number, how, bug)
        if problems is None:
            continue
        killed += 1
        violations += [f"{how} {operations[number - 1]}: {problem}" for problem in problems]
    if killed < 0.95 * len(plan):
        violations.append(f"only {killed} of {len(plan)} runs were killed")
    return {"trials": killed, "violations": violations}


def kill_training(folder: str, trials: int, seed: int, shard: int, shards: int) -> dict[str, Any]:
    """Kill real training runs at random moments."""
    own = Path(tempfile.mkdtemp(dir=folder))
    training = KilledTraining(own)
    seeds = [1000 * (seed + trial) for trial in range(trials)][shard::shards]
    violations = [f"seed {seed}: {problem}" for seed in seeds for problem in training.trial(seed)]
    return {"trials": len(seeds), "violations": violations}


# Python's audit events that name a path below the repository, as kinds of operations.
_EVENTS = {
    "open": "open",
    "os.chmod": "chmod",
    "os.link": "link",
    "os.listdir": "opendir",
    "os.mkdir": "mkdir",
    "os.remove": "unlink",
    "os.rename": "rename",
    "os.rmdir": "rmdir",
    "os.scandir": "opendir",
    "os.symlink": "symlink",
}


def audit(folder: str) -> dict[str, Any]:
    """A run of which Python's audit events are held against the shim's log."""
    shim = Shim()
    root = Path(folder)
    events: set[tuple[str, str]] = set()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        for argument in arguments:
            if isinstance(argument, (str, os.PathLike)) and str(argument).startswith(f"{root}/"):
                events.add((_EVENTS.get(event, event), str(argument)))

    sys.addaudithook(hook)
    shim.start(root)
    WORKLOADS["retention"](root, marks_to(shim), shim)
    shim.stop()
    log = shim.log()
    seen = {(operation.kind, path) for operation in log for path in _paths(operation)}
    return {
        "events": len(events),
        "missing": sorted(events - seen),
        "kinds": Counter(operation.kind for operation in log),
        "root": str(root),
    }


def _paths(operation: Operation) -> tuple[str, str]:
    return operation.path, operation.target


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "audit": audit,
    "record": record,
    "check_states": check_states,
    "inject": inject,
    "kill": kill,
    "kill_training": kill_training,
}


if __name__ == "__main__":
    # Not left behind by a test that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    silence()
    torch.set_num_threads(1)
    answer = COMMANDS[sys.argv[1]](**json.loads(sys.argv[2]))
    os.write(1, json.dumps(answer).encode())
