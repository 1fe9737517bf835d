"""Every state that a power cut may leave: acknowledged snapshots are there, whole, and a new writer
goes on (README.md section 3)."""

from __future__ import annotations

from conftest import Count
from driving import Driver
from workloads import WORKLOADS

HARNESS = "crash states"
_OF_EACH = 120  # workload


def test_a_power_cut_takes_nothing_that_was_acknowledged(
    driver: Driver, full: bool, count: Count
) -> None:
    log = str(driver.scratch / "log")
    driver.run("record", log=log, workloads=[(name, None) for name in WORKLOADS])
    result = driver.run_shares(
        "check_states",
        log=log,
        seed=1,
        mixes=60 if full else 3,
        limit=None if full else _OF_EACH,
    )
    count(result.check())
    assert result.trials >= (5000 if full else 1500)
