"""The rule that says which of two values of a metric is the better one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pysnap.errors import ConfigError
from pysnap.repository import Snapshot

_RULE = re.compile(r"(min|max)\s+(\S+)(?:\s+by\s+(\S+))?")


@dataclass(frozen=True)
class Best:
    """The smallest or the largest value of `metric`; one that is better by `delta` or less is no
    improvement."""

    metric: str
    larger: bool
    delta: float = 0.0

    @classmethod
    def parse(cls, rule: str) -> Best:
        """The rule `"min val_loss"`, or `"max accuracy by 0.001"`."""
        match = _RULE.fullmatch(rule.strip()) if isinstance(rule, str) else None
        try:
            delta = float(match[3] or 0) if match else math.nan
        except ValueError:
            delta = math.nan
        if match is None or not (math.isfinite(delta) and delta >= 0):
            raise ConfigError(
                f"best is {rule!r}; it must be `min METRIC` or `max METRIC`, "
                "and may end in `by DELTA`, such as `max accuracy by 0.001`"
            )
        return cls(match[2], match[1] == "max", delta)

    def __str__(self) -> str:
        rule = f"{'max' if self.larger else 'min'} {self.metric}"
        return f"{rule} by {self.delta!r}" if self.delta else rule

    def improves(self, value: float, record: float | None) -> bool:
        """Whether `value` is better than the best so far; NaN never is."""
        if math.isnan(value):
            return False
        if record is None:
            return True
        gain = value - record if self.larger else record - value
        return gain > self.delta

    def ranked(self, snapshots: Sequence[Snapshot]) -> list[Snapshot]:
        """Those of `snapshots`, given newest first, that were taken when the metric was reported:
        the best first, of equal ones the newest."""
        found = [
            (value, snapshot)
            for snapshot in snapshots
            if (value := snapshot.metrics.get(self.metric)) is not None
        ]
        found.sort(key=lambda pair: pair[0], reverse=self.larger)
        return [snapshot for _, snapshot in found]
