"""Harnesses that try the promises. Each counts its trials; the table at the end says how many.

`./dev faults` runs the share of CI, `./dev faults --full` everything.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import shim
from driving import Driver, temporary_directory
from programs import Zygote, zygote_running

sys.path.insert(0, str(Path(__file__).parent.parent))  # support.py

_PROPERTY = "trials"
"""Of a test's report, which comes from whatever process ran it: harness, trials, seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all trials, not only the share of CI")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all trials are wanted."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim, built."""
    return shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def driver(library: Path) -> Iterator[Driver]:
    """Starts drive.py."""
    with temporary_directory() as folder:
        yield Driver(library, folder)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts programs in processes of their own."""
    with zygote_running() as zygote:
        yield zygote


class Count:
    """Counts the trials of one test."""

    def __init__(self) -> None:
        self.trials = 0

    def __call__(self, trials: int = 1) -> None:
        self.trials += trials


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Iterator[Count]:
    """Call it once per trial that kept the promise, or with a number of them."""
    module = request.module
    harness = getattr(module, "HARNESS", module.__name__.removeprefix("test_"))
    counted = Count()
    start = time.monotonic()
    yield counted
    if counted.trials:
        figures = (harness, counted.trials, time.monotonic() - start)
        request.node.user_properties.append((_PROPERTY, figures))


def _reported(terminalreporter: pytest.TerminalReporter) -> Iterator[Any]:
    for report in chain.from_iterable(terminalreporter.stats.values()):
        # Reports of all phases have the properties of a test; that of the last one has all of them.
        if isinstance(report, pytest.TestReport) and report.when == "teardown":
            yield from (figures for name, figures in report.user_properties if name == _PROPERTY)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    trials: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for harness, tried, took in _reported(terminalreporter):
        trials[harness] += tried
        seconds[harness] += took
    if not trials:
        return
    terminalreporter.section("trials")
    for harness, number in sorted(trials.items()):
        terminalreporter.write_line(f"{harness:<32} {number:>9,} trials {seconds[harness]:>7.0f} s")
