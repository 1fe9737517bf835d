"""Each harness finds the bugs that it is there for (README.md section 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Count
from driving import Driver, temporary_directory

HARNESS = "planted bugs"
_STATES_OF_EACH = 330

# Bugs that states of a power cut show, and a workload that meets each.
_OF_CRASHES = {
    "packs are not synced": "new_repository",
    "the manifest is not synced": "new_repository",
    "the directory of the snapshot is not synced": "new_repository",
    "the repository is not synced": "retention",
    "the parent of a new repository is not synced": "new_repository",
    "a failed sync is asked again": "new_repository",
    "a short write is accepted": "new_repository",
    "the manifest comes first": "new_repository",
    "the old snapshot is deleted first": "retention",
    "errors of unlink are ignored": "retention",
    "trash is not synced": "retention",
    "what was taken back is unlinked at once": "outcome_unknown",
}
# Bugs that failing operations show, and the kind of operation that does it.
_OF_FAULTS = {
    "the old snapshot is deleted first": "fsync",
    "errors of unlink are ignored": "unlink",
    "a failed commit stays visible": "fsync",
    "a failed sync of the manifest is ignored": "fsync",
    "a failure is not told": "fdatasync",
}
_OF_KILLS = ("the manifest comes first", "the old snapshot is deleted first")


@pytest.fixture(scope="module")
def found(library: Path) -> Iterator[Counter[str]]:
    """How many states of a power cut each bug spoils."""
    with temporary_directory() as folder:
        driver = Driver(library, folder)
        log = str(folder / "log")
        driver.run("record", log=log, workloads=[(load, bug) for bug, load in _OF_CRASHES.items()])
        result = driver.run_shares("check_states", log=log, seed=1, mixes=0, limit=_STATES_OF_EACH)
    yield Counter(
        bug
        for bug, workload in _OF_CRASHES.items()
        for text in result.violations
        if text.startswith(f"{workload} with {bug},")
    )


@pytest.mark.parametrize("bug", _OF_CRASHES)
def test_crash_states_show(bug: str, found: Counter[str], count: Count) -> None:
    assert found[bug] >= 2
    count()


@pytest.mark.parametrize("bug", _OF_FAULTS)
def test_injected_faults_show(bug: str, driver: Driver, count: Count) -> None:
    result = driver.run_shares(
        "inject", everything=False, what="resumed", bug=bug, only=_OF_FAULTS[bug]
    )
    assert result.violations
    count()


@pytest.mark.parametrize("bug", _OF_KILLS)
def test_kills_show(bug: str, driver: Driver, count: Count) -> None:
    assert driver.run_shares("kill", existing=True, bug=bug, only="rename").violations
    count()
