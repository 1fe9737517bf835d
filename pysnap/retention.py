"""The rule that says which snapshots are kept. A pure function decides; the repository acts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pysnap.best import Best
from pysnap.errors import ConfigError
from pysnap.repository import Snapshot


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Keep the newest `last` snapshots, None all, and the `best` ones by the metric that
    `Snapshotter(best=...)` names. What is tagged or pinned is kept besides."""

    last: int | None = 3
    best: int = 0

    def __post_init__(self) -> None:
        if self.last is not None and (type(self.last) is not int or self.last < 1):
            raise ConfigError(
                f"Keep(last={self.last!r}): it must be at least 1, or None to keep all"
            )
        if type(self.best) is not int or self.best < 0:
            raise ConfigError(f"Keep(best={self.best!r}): it must be a whole number, 0 for none")


def removable(
    snapshots: Sequence[Snapshot],
    keep: Keep,
    *,
    best: Best | None = None,
    held: Collection[Path] = (),
) -> list[Snapshot]:
    """The snapshots, given newest first, that are not to be kept; never the newest, and none of
    `held`.

    A step that was taken again replaces the older snapshot of that step, unless that is one of the
    best; of the others, `keep` decides. Oldest first: the order to remove them in.
    """
    newest_of_step = {snapshot.step: snapshot for snapshot in reversed(snapshots)}
    current = [snapshot for snapshot in snapshots if newest_of_step[snapshot.step] is snapshot]
    kept = current if keep.last is None else current[: keep.last]
    if best is not None:
        kept = [*kept, *best.ranked(snapshots)[: keep.best]]
    return [
        snapshot
        for snapshot in reversed(snapshots)
        if snapshot not in kept and snapshot.path not in held
    ]
