"""Which snapshot a run goes on from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pysnap.best import Best
from pysnap.errors import ConfigError, CorruptError, NotFoundError, StorageError
from pysnap.notes import Notes, check_tag
from pysnap.repository import Listing, Snapshot, is_snapshot, list_snapshots

_SHOWN = 10


@dataclass(frozen=True)
class Which:
    """One rule: `newest`, `best`, `off`, a `step` or a `tag` by value, or a `path`."""

    kind: Literal["newest", "best", "off", "step", "tag", "path"]
    value: int | str | None = None

    @classmethod
    def parse(cls, rule: str | os.PathLike[str], where: str) -> Which:
        """The rule `newest`, `best`, `off`, `step=N`, `tag=NAME` or a path. ConfigError names
        `where`."""
        if not isinstance(rule, (str, os.PathLike)):
            raise ConfigError(f"{where} is {rule!r}; a step is named by step={rule!r}")
        text = os.fspath(rule)
        if text in ("newest", "best", "off"):
            return cls(text)  # type: ignore[arg-type]  # one of the literals
        if re.fullmatch(r"step=\d{1,18}", text, re.ASCII):
            return cls("step", int(text.removeprefix("step=")))
        if text.startswith("tag="):
            return cls("tag", check_tag(text.removeprefix("tag=")))
        # A word that is misspelt must not be taken for a path.
        if isinstance(rule, os.PathLike) or os.sep in text:
            return cls("path", text)
        raise ConfigError(
            f"{where} is {text!r}; it must be `newest`, `best`, `off`, `step=N`, `tag=NAME` "
            "or a path with a `/` in it"
        )

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind} {self.value}"

    def candidates(self, listing: Listing, best: Best | None, root: Path) -> list[Snapshot]:
        """The snapshots to try, in order; none where the repository holds none yet and the rule
        does not name one. Raises NotFoundError where the rule finds none, ConfigError where it
        needs a rule of what is best."""
        snapshots = listing.snapshots
        if self.kind == "best" and best is None:
            raise ConfigError('to resume from the best snapshot, say what is best: best="min loss"')
        if self.kind == "path":
            path = Path(str(self.value))
            return [Snapshot.open(path)] if is_snapshot(path) else list_snapshots(path).snapshots
        names_none = self.value is None
        if self.kind == "newest" or (names_none and not snapshots):
            return snapshots
        if self.kind == "best":
            assert best is not None
            found = best.ranked(snapshots)
        elif self.kind == "step":
            found = [snapshot for snapshot in snapshots if snapshot.step == self.value]
        else:
            found = [snapshot for snapshot in snapshots if self.value in _tags(snapshot)]
        if not found:
            raise NotFoundError(f"{root} holds no {self} snapshot; {_there_are(snapshots)}")
        return found


def _tags(snapshot: Snapshot) -> tuple[str, ...]:
    try:
        return Notes.read(snapshot.path).tags
    except (CorruptError, StorageError) as error:
        if error.says_nothing:
            raise
        return ()


def _there_are(snapshots: list[Snapshot]) -> str:
    if not snapshots:
        return "it holds none at all"
    steps = ", ".join(str(snapshot.step) for snapshot in snapshots[:_SHOWN])
    more = f" and {len(snapshots) - _SHOWN} more" if len(snapshots) > _SHOWN else ""
    tags = sorted({tag for snapshot in snapshots for tag in _tags(snapshot)})
    return f"there are those of step {steps}{more}" + (
        f", and the tags {', '.join(tags)}" if tags else ""
    )
