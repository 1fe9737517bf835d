"""Runs that die by SIGKILL and go on in a fresh process, of every kind of loader, optimizer and
schedule, cut at every kind of place: each is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matrix
import pytest
from matrix import BOUNDARIES, EPOCHS, LOADERS, OPTIMIZERS, SCHEDULERS, Case

TIMEOUT = 60

# A server that has imported everything forks each process: fresh, and in milliseconds.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(matrix.PRELOAD)


def enumerate_cases() -> list[Case]:
    """Every loader with every boundary, twice; the optimizers and the schedules take turns."""
    pairs = list(itertools.product(LOADERS, BOUNDARIES)) * 2
    # So that no axis goes in step with another.
    random.Random(0).shuffle(pairs)
    turns = zip(pairs, itertools.cycle(OPTIMIZERS), itertools.cycle(SCHEDULERS), strict=False)
    return sorted((Case(*pair, *turn) for pair, *turn in turns), key=str)


CASES = enumerate_cases()


def test_the_cases_cover_the_matrix() -> None:
    assert 150 <= len(CASES) == len(set(CASES)) <= 230
    assert {(case.loader, case.boundary) for case in CASES} == set(
        itertools.product(LOADERS, BOUNDARIES)
    )
    for axis, names in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        met: defaultdict[str, list[Case]] = defaultdict(list)
        for case in CASES:
            met[getattr(case, axis)].append(case)
        assert set(met) == set(names)
        for cases in met.values():
            assert len({case.loader for case in cases}) >= 4
            assert len({case.boundary for case in cases}) >= 3


class Children:
    """The processes of one case."""

    def __init__(self, case: Case, directory: Path) -> None:
        self._case = case
        self.repository = directory / "run"
        self._directory = directory
        self._processes: dict[str, Any] = {}

    def start(self, role: str) -> None:
        repository = self._directory / role if role == "reference" else self.repository
        process = server.Process(
            target=matrix.run, args=(self._case, role, repository, self._log(role))
        )
        process.start()
        self._processes[role] = process

    def finish(self, role: str, status: int) -> dict[str, list[Any]]:
        """What the process wrote, by kind, when it has ended with `status`."""
        process = self._processes[role]
        process.join(TIMEOUT)
        assert process.exitcode == status, f"{role}: {process}"
        written: defaultdict[str, list[Any]] = defaultdict(list)
        for kind, value in map(json.loads, self._log(role).read_text().splitlines()):
            written[kind].append(value)
        return written

    def end(self) -> None:
        for process in self._processes.values():
            # The data workers of a process that was killed outlive it for seconds.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            process.close()

    def _log(self, role: str) -> Path:
        return self._directory / f"{role}.log"


@pytest.fixture
def children(case: Case, tmp_path: Path) -> Iterator[Children]:
    children = Children(case, tmp_path)
    yield children
    children.end()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_killed_and_resumed(case: Case, children: Children) -> None:
    boundary = BOUNDARIES[case.boundary]
    children.start("reference")
    children.start("killed")
    whole = children.finish("reference", 0)
    steps = [row["step"] for row in whole["row"] if "step" in row]
    assert steps == list(range(1, EPOCHS * boundary.batches + 1))
    assert all(math.isfinite(loss) for row in whole["row"] for loss in row["losses"])

    killed = children.finish("killed", -signal.SIGKILL)
    assert killed["row"][-1]["step"] == boundary.kill
    assert_same_rows(killed["row"], whole["row"][: len(killed["row"])])

    # Beside what the killed process left: its data workers, and what it was about to write.
    newest = max(children.repository.glob("step-*"))
    children.start("resumed")
    resumed = children.finish("resumed", 0)
    [place], [rows_before] = resumed["place"], resumed["rows before"]
    assert place in boundary.newest and newest.name == f"step-{place[0]:09}"
    assert_same_rows(resumed["row"], whole["row"][rows_before:])
    [state], [expected] = resumed["final"], whole["final"]
    names = dict.fromkeys([*expected, *state])
    others = [name for name in names if state.get(name) != expected.get(name)]
    assert not others, f"different at the end: {', '.join(others)}"


def assert_same_rows(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for row, other in zip(rows, expected, strict=False):
        assert row == other
    assert len(rows) == len(expected)
