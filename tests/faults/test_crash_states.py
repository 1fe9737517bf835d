"""Every state that a power cut may leave: acknowledged snapshots are there, whole, and a new writer
goes on (README.md section 3)."""

from __future__ import annotations

from driving import Driver, Result
from workloads import WORKLOADS

HARNESS = "crash states"
_SHARE = 1500
_FULL_MIXES = 20
_SHARE_MIXES = 3


def states_of(
    driver: Driver, workloads: list[str], *, mixes: int, limit: int | None, bug: str | None = None
) -> Result:
    """Record workloads, and try what power cuts leave of them."""
    log = str(driver.scratch / "log")
    driver.run("record", log=log, workloads=workloads, bug=bug)
    return driver.run_shares("check_states", log=log, seed=1, mixes=mixes, limit=limit)


def test_a_power_cut_takes_nothing_that_was_acknowledged(
    driver: Driver, full: bool, count: object
) -> None:
    result = states_of(
        driver,
        list(WORKLOADS),
        mixes=_FULL_MIXES if full else _SHARE_MIXES,
        limit=None if full else _SHARE,
    )
    count(result.check())
    assert result.trials >= (5000 if full else _SHARE)
