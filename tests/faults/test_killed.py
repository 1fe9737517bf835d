"""Processes that are killed leave whole snapshots, and leftovers that the next one removes
(README.md section 5)."""

from __future__ import annotations

import pytest
from conftest import Count
from driving import Driver

HARNESS = "killed writers"
_SEED = 1


@pytest.mark.parametrize("existing", [True, False], ids=["resumed", "new"])
def test_a_kill_at_any_operation_leaves_whole_snapshots(
    driver: Driver, full: bool, count: Count, existing: bool
) -> None:
    result = driver.run_shares("kill", existing=existing, everything=full)
    count(result.check())
    assert result.trials >= (400 if full else 200)


def test_training_that_is_killed_goes_on_bit_for_bit(
    driver: Driver, full: bool, count: Count
) -> None:
    trials = 240 if full else 8
    print(f"seed {_SEED}")
    result = driver.run_shares("kill_training", trials=trials, seed=_SEED)
    count(result.check())
    assert result.trials == trials
