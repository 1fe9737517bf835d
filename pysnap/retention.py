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
    """The snapshots, given newest first, that `keep` does not keep; never the newest. Oldest
    first: the order to remove them in."""
    if keep.last is None:
        return []
    return list(reversed(snapshots[keep.last :]))
