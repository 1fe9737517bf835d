"""The rule that says which snapshots are kept. A pure function decides; the repository acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pysnap.errors import ConfigError
from pysnap.repository import Snapshot


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Keep the newest `last` snapshots; None keeps all."""

    last: int | None = 3

    def __post_init__(self) -> None:
        if self.last is not None and (type(self.last) is not int or self.last < 1):
            raise ConfigError(
                f"Keep(last={self.last!r}): it must be at least 1, or None to keep all"
            )


def removable(snapshots: Sequence[Snapshot], keep: Keep) -> list[Snapshot]:
    """The snapshots, given newest first, that are not to be kept; never the newest.

    A step that was taken again replaces the older snapshot of that step; of the others, `keep`
    decides. Oldest first: the order to remove them in.
    """
    newest_of_step = {snapshot.step: snapshot for snapshot in reversed(snapshots)}
    current = [snapshot for snapshot in snapshots if newest_of_step[snapshot.step] is snapshot]
    kept = current if keep.last is None else current[: keep.last]
    return [snapshot for snapshot in reversed(snapshots) if snapshot not in kept]
