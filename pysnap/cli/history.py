"""What happened in a repository, from its events and its manifests. Both may have been written by
somebody else: what has another type than it should is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pysnap.cli.choose import notes_of
from pysnap.events import read_events
from pysnap.repository import Listing, list_snapshots

Event = dict[str, Any]


@dataclass
class History:
    """The events of a repository by kind, oldest first, and what is in it now."""

    root: Path
    listing: Listing
    events: list[Event] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> History:
        """Raises NotFoundError where there is no repository, and what reading raises."""
        return cls(root, list_snapshots(root), list(read_events(root)))

    def of(self, kind: str) -> list[Event]:
        """The events of one kind that name a step, where that kind has one."""
        named = [event for event in self.events if event["event"] == kind]
        return named if kind in ("run", "preempted") else [e for e in named if _is_step(e)]

    def series(self, kind: str, name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        """Step and value of a number in all events of a kind."""
        return [
            (float(event["step"]), value * factor)
            for event in self.of(kind)
            if (value := finite(event.get(name))) is not None
        ]

    def metrics(self) -> dict[str, list[tuple[float, float]]]:
        """Step and value of every metric; from the manifests where no event tells of it."""
        found: dict[str, dict[float, float]] = {}
        for step, values in self._reports():
            for name, value in values.items():
                number = finite(value)
                if number is not None:
                    found.setdefault(str(name), {})[float(step)] = number
        return {name: sorted(points.items()) for name, points in found.items()}

    def held(self) -> dict[str, str]:
        """Marks of the snapshots that are there, by name."""
        marks = {}
        for snapshot in self.listing.snapshots:
            notes, _ = notes_of(snapshot)
            marks[snapshot.path.name] = ", ".join(
                [*(["pinned"] if notes.pinned else []), *(f"tagged {tag}" for tag in notes.tags)]
            )
        return marks

    def _reports(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for snapshot in self.listing.snapshots:
            yield snapshot.step, dict(snapshot.metrics)
        for event in self.of("metrics"):
            if isinstance(event.get("values"), dict):
                yield event["step"], event["values"]


def finite(value: object) -> float | None:
    """A number that can be drawn or summed; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _is_step(event: Event) -> bool:
    return type(event.get("step")) is int and 0 <= event["step"] < 2**63
