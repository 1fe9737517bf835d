"""What snapshots cost a training run, told from when its steps ended."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

WARM_STEPS = 5
"""The first steps of a process compile, tune and fill caches."""
NEIGHBOURS = 32
"""So many plain steps before and behind tell how long those beside a snapshot would have taken."""


@dataclass(frozen=True)
class Overhead:
    """Shares of the training time, as numbers such as 0.01."""

    seconds: float
    """Of training that was looked at."""
    snapshots: int
    stall_share: float
    """Training stood still."""
    inflation_share: float
    """Steps beside a snapshot took longer, less by chance; without the stall."""
    error: float | None
    """Standard error of `share`, from how much the snapshots differ; None for a single one."""

    @property
    def share(self) -> float:
        """All that snapshots cost."""
        return self.stall_share + self.inflation_share


@dataclass(frozen=True)
class Flight:
    """One snapshot: the step behind which it was taken, its stall, and when it was durable."""

    step: int
    stall_seconds: float
    durable_at: float


def measure(ends: Sequence[float], flights: Sequence[Flight]) -> Overhead | None:
    """The overhead of a run of which step `i + 1` ended at `ends[i]`; None where no steps with and
    without a snapshot can be compared.

    A step counts as beside a snapshot from the one at whose end it was taken to the one in which
    it became durable. What a step would have taken is the mean of the nearest plain ones, so that
    a machine that becomes slower is no overhead. Nothing is left out as an outlier.
    """
    periods = {step: end - start for step, (start, end) in enumerate(pairwise(ends), start=2)}
    periods = {step: period for step, period in periods.items() if step > WARM_STEPS}
    beside: set[int] = set()
    for flight in flights:
        begun = bisect.bisect_left(ends, flight.durable_at) + 1
        beside.update(range(flight.step, max(flight.step, begun) + 1))
    plain = [step for step in periods if step not in beside]
    if len(plain) in (0, len(periods)):
        return None
    costs = []
    for _, group in groupby(periods, key=beside.__contains__):
        steps = list(group)
        if steps[0] in beside:
            before = [step for step in plain if step < steps[0]][-NEIGHBOURS:]
            behind = [step for step in plain if step > steps[-1]][:NEIGHBOURS]
            usual = statistics.fmean(periods[step] for step in (*before, *behind))
            costs.append(sum(periods[step] for step in steps) - len(steps) * usual)
    total = sum(periods.values())
    stall = sum(flight.stall_seconds for flight in flights if flight.step in periods)
    return Overhead(
        seconds=total,
        snapshots=sum(flight.step in periods for flight in flights),
        stall_share=stall / total,
        inflation_share=(sum(costs) - stall) / total,
        error=(math.sqrt(len(costs)) * statistics.stdev(costs) / total if len(costs) > 1 else None),
    )
