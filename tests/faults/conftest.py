"""Harnesses that try the promises. Each counts its trials; the table at the end says how many.

`./dev faults` runs the share of CI, `./dev faults --full` everything.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import shim
from driving import Driver, temporary_directory
from programs import Zygote, zygote_running

sys.path.insert(0, str(Path(__file__).parent.parent))  # support.py


class Trials:
    """How often each harness tried a promise, and how long that took."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()


_KEY = pytest.StashKey[Trials]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all trials, not only the share of CI")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Trials()


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
    """Counts the trials of one test under the harness's name."""

    def __init__(self, trials: Trials, harness: str) -> None:
        self._trials = trials
        self._harness = harness

    def __call__(self, trials: int = 1) -> None:
        self._trials.counts[self._harness] += trials


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Iterator[Count]:
    """Call it once per trial that kept the promise, or with a number of them."""
    module = request.module
    harness = getattr(module, "HARNESS", module.__name__.removeprefix("test_"))
    trials = request.config.stash[_KEY]
    start = time.monotonic()
    yield Count(trials, harness)
    trials.seconds[harness] += time.monotonic() - start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    trials = terminalreporter.config.stash[_KEY]
    if not trials.counts:
        return
    terminalreporter.section("trials")
    for harness, number in sorted(trials.counts.items()):
        seconds = trials.seconds[harness]
        terminalreporter.write_line(f"{harness:<32} {number:>9,} trials {seconds:>7.0f} s")
