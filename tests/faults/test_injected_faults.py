"""Every file operation fails, once or from then on: what was durable stays, the error is told,
training goes on, and so do snapshots once the cause is gone (README.md section 4)."""

from __future__ import annotations

import pytest
from conftest import Count
from driving import Driver

HARNESS = "injected faults"


@pytest.mark.parametrize("what", ["resumed", "new", "file"])
def test_an_operation_that_fails_harms_nothing(
    driver: Driver, full: bool, count: Count, what: str
) -> None:
    result = driver.run_shares("inject", everything=full, what=what)
    count(result.check())
    assert result.trials >= (500 if full else 100)
