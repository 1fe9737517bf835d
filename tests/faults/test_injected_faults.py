"""Every file operation fails, once or from then on: what was durable stays, the error is told,
training goes on, and so do snapshots once the cause is gone (README.md section 4)."""

from __future__ import annotations

import pytest
from conftest import Count
from driving import Driver

HARNESS = "injected faults"


@pytest.mark.parametrize("existing", [True, False], ids=["resumed", "new"])
def test_an_operation_that_fails_harms_nothing(
    driver: Driver, full: bool, count: Count, existing: bool
) -> None:
    result = driver.run_shares("inject", everything=full, existing=existing)
    count(result.check())
    assert result.trials >= (2000 if full else 800)
