"""The rule that says which snapshots are kept. A pure function decides; the repository acts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pysnap.best import Best
from pysnap.errors import ConfigError
from pysnap.measure import Amount
from pysnap.repository import Snapshot

_NONE: Mapping[Path, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which snapshots are kept; each rule adds to the others, and what is tagged or pinned is kept
    besides.

    `last`: the newest ones, None all. `best`: so many by the metric that `Snapshotter(best=...)`
    names. `every` (`"10000 steps"`, `"6h"`, `"1 epoch"`): the first snapshot at or behind each
    multiple, for ever, or for as long as `for_` says. `for_` (`"2h"`, `"5000 steps"`) without
    `every`: each snapshot for so long. Hours are hours of training, so that a run that stands
    still loses nothing.
    """

    last: int | None = 3
    best: int = 0
    every: str | int | None = None
    for_: str | int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and (type(self.last) is not int or self.last < 1):
            raise ConfigError(
                f"Keep(last={self.last!r}): it must be at least 1, or None to keep all"
            )
        if type(self.best) is not int or self.best < 0:
            raise ConfigError(f"Keep(best={self.best!r}): it must be a whole number, 0 for none")
        every, period = self.grid, self.period
        if self.last is None and (every or period):
            raise ConfigError(
                f"{self}: last=None keeps every snapshot, so that every and for_ mean nothing; "
                "say how many of the newest to keep, such as last=3"
            )
        if every and period and every.measure == period.measure and period.value <= every.value:
            raise ConfigError(
                f"{self}: a snapshot would be given up before the next one is due by every; "
                "for_ must be longer than every"
            )

    @property
    def grid(self) -> Amount | None:
        """`every`, parsed."""
        return _amount("every", self.every)

    @property
    def period(self) -> Amount | None:
        """`for_`, parsed."""
        return _amount("for_", self.for_)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one snapshot, and why."""

    snapshot: Snapshot
    kept: bool
    reason: str


def plan(
    snapshots: Sequence[Snapshot],
    keep: Keep,
    *,
    best: Best | None = None,
    held: Mapping[Path, str] = _NONE,
) -> list[Verdict]:
    """What `keep` makes of the snapshots of a repository, given newest first; in that order.

    The newest is always kept; whether it is intact is for the caller to know. So is what is `held`,
    which tells the reason by path. A step that was taken again replaces the older snapshot of that
    step, unless that is one of the best; of the others, `keep` decides. Raises ConfigError where
    `keep` needs `best`.
    """
    check_best(keep, best)
    newest_of_step = {snapshot.step: snapshot for snapshot in reversed(snapshots)}
    current = [snapshot for snapshot in snapshots if newest_of_step[snapshot.step] is snapshot]
    reasons: dict[Path, list[str]] = {snapshot.path: [] for snapshot in snapshots}

    def hold(found: Iterable[Snapshot], reason: str) -> None:
        for snapshot in found:
            reasons[snapshot.path].append(reason)

    hold(snapshots[:1], "the newest")
    if keep.last is None:
        hold(current[1:], "every one is kept")
    else:
        hold(current[1 : keep.last], f"one of the newest {keep.last}")
    if best is not None and keep.best:
        for rank, snapshot in enumerate(best.ranked(snapshots)[: keep.best], 1):
            value = snapshot.metrics[best.metric]
            hold([snapshot], f"number {rank} by {best}: {value:.6g}")
    grid, period = keep.grid, keep.period
    young = current if period is None else _younger(current, period)
    if grid is not None:
        limit = "" if period is None else f" for {period}"
        hold(_firsts(young, current, grid), f"one every {grid}{limit}")
    elif period is not None:
        hold(young, f"younger than {period}")
    for path, reason in held.items():
        if path in reasons:
            reasons[path].append(reason)

    def verdict(snapshot: Snapshot) -> Verdict:
        found = reasons[snapshot.path]
        if found:
            return Verdict(snapshot, True, ", ".join(found))
        again = newest_of_step[snapshot.step] is not snapshot
        return Verdict(snapshot, False, "its step was taken again" if again else "no rule keeps it")

    return [verdict(snapshot) for snapshot in snapshots]


def check_best(keep: Keep, best: Best | None) -> None:
    """Raises ConfigError where `keep` needs a metric and none is named."""
    if keep.best and best is None:
        raise ConfigError(f'{keep} needs a metric: say what is best, such as best="min val_loss"')


def _amount(name: str, value: str | int | None) -> Amount | None:
    if value is None:
        return None
    try:
        return Amount.parse(value)
    except ValueError as error:
        raise ConfigError(f"Keep({name}={value!r}): {error}") from None


def _younger(current: Sequence[Snapshot], period: Amount) -> list[Snapshot]:
    """Those that were taken less than `period` of training before the newest."""
    places = [_place(snapshot, period) for snapshot in current]
    return [
        snapshot
        for snapshot, place in zip(current, places, strict=True)
        if place is not None and places[0] is not None and places[0] - place < period.value
    ]


def _firsts(young: Sequence[Snapshot], current: Sequence[Snapshot], grid: Amount) -> list[Snapshot]:
    """Those of `young` that are the first of `current` at or behind a multiple of `grid`.

    What was the first once stays so, whatever is taken behind it: a decision is never revised.
    """
    firsts: dict[int, tuple[float, Snapshot]] = {}
    for snapshot in current:
        place = _place(snapshot, grid)
        multiple = 0 if place is None else int(place // grid.value)
        if (
            place is not None
            and multiple
            and (multiple not in firsts or place <= firsts[multiple][0])
        ):
            firsts[multiple] = (place, snapshot)
    paths = {snapshot.path for _, snapshot in firsts.values()}
    return [snapshot for snapshot in young if snapshot.path in paths]


def _place(snapshot: Snapshot, amount: Amount) -> float | None:
    """Where in training a snapshot was taken, in the measure of `amount`; None where it does not
    say."""
    if amount.measure == "steps":
        return snapshot.step
    progress = snapshot.manifest.metadata.get("progress")
    name = "epoch" if amount.measure == "epochs" else "seconds"
    place = progress.get(name) if type(progress) is dict else None
    return place if isinstance(place, (int, float)) and math.isfinite(place) else None
