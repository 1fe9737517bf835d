"""The power of a real file system is cut at every operation (README.md section 6)."""

from __future__ import annotations

import os

import pytest
from conftest import Count
from driving import Driver
from power import FILE_SYSTEMS, why_not

HARNESS = "power cuts"


@pytest.fixture(params=FILE_SYSTEMS)
def file_system(request: pytest.FixtureRequest, driver: Driver, full: bool) -> str:
    """Each that can be had here."""
    if not full:
        pytest.skip("only with --full")
    reason = why_not(request.param, driver.scratch)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True, params=["on", "off"], ids=["direct", "buffered"])
def direct_io(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written past the page cache survives more."""
    monkeypatch.setenv("PYSNAP_DIRECT_IO", request.param)


@pytest.mark.parametrize("existing", [True, False], ids=["resumed", "new"])
def test_a_real_power_cut_takes_nothing_that_was_acknowledged(
    driver: Driver, count: Count, file_system: str, existing: bool
) -> None:
    result = driver.run_shares("kill", existing=existing, file_system=file_system)
    count(result.check())
    assert result.trials >= 300


def test_power_cuts_show_planted_bugs(
    driver: Driver, count: Count, file_system: str, direct_io: None
) -> None:
    bugs = ["the manifest is not synced", "the repository is not synced"]
    if os.environ["PYSNAP_DIRECT_IO"] == "off":
        bugs.append("packs are not synced")
    for bug in bugs:
        result = driver.run_shares(
            "kill", existing=False, bug=bug, file_system=file_system, only="mkdir"
        )
        assert result.violations, bug
        count()
