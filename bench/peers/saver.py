"""What every way to save has in common: the interface behind which they are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .disk import sync

# Anything with state_dict(), by name.
Parts = dict[str, Any]


class Pending(Protocol):
    """A save that was asked for."""

    def gate(self) -> None:
        """Return when the next optimizer step may change the state."""

    def done(self) -> bool:
        """Whether its background part has ended."""

    def wait(self) -> Path:
        """Block until it is durable; the file or directory that holds it."""


class Saver(Protocol):
    """A way to save the same objects again and again, one save at a time."""

    @property
    def overlaps(self) -> bool:
        """Whether a part of the copy is left for `Pending.gate`."""

    def save(self) -> Pending:
        """Return when training may go on."""

    def wait_ready(self) -> None:
        """Block until what is prepared in the background is ready."""

    def close(self) -> None:
        """Release everything."""


def _nothing() -> None:
    return None


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Written:
    """A save to `path`, made durable by us: none of the others does it itself."""

    path: Path
    end: Callable[[], object] = _nothing
    """Block until the background part has ended; raises its failure."""
    ended: Callable[[], bool] = _always
    staged: Callable[[], object] = _nothing
    """Block until the state may change."""

    def gate(self) -> None:
        self.staged()

    def done(self) -> bool:
        return self.ended()

    def wait(self) -> Path:
        self.end()
        sync(self.path)
        return self.path


class Peer(ABC):
    """A way to save to a new path each time. By default nothing is prepared and nothing is held."""

    overlaps = False
    suffix = ""

    def __init__(self, parts: Parts, directory: Path) -> None:
        """Raises ImportError where what it needs is not installed."""
        self.parts = parts
        self.directory = directory
        self._count = 0

    def save(self) -> Pending:
        self._count += 1
        return self.write(self.directory / f"{self._count}{self.suffix}")

    @abstractmethod
    def write(self, path: Path) -> Pending:
        """Begin to save to `path`, which does not exist."""

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def wait_ready(self) -> None:
        return None

    def close(self) -> None:
        return None
