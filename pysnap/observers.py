"""Who is told of snapshots: the log, the event log, TensorBoard, and callbacks of the program."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pysnap import trace
from pysnap.events import EventLog
from pysnap.manifest import finite

_log = logging.getLogger("pysnap")


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
    """A durable snapshot and what it cost. Seconds count from the beginning of its capture."""

    path: Path
    step: int
    epoch: int
    seconds: float
    """Training time so far (see `Progress`)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Reported at its moment."""
    tags: tuple[str, ...] = ()
    late: bool
    """It was due earlier: another was in flight, or one had just failed."""
    stall_seconds: float
    """How long the training thread was blocked."""
    staged_seconds: float
    """Until every byte was in staging memory, so that everything could change."""
    durable_seconds: float
    """Until it was durable."""
    raw_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        """Raw by stored bytes; 1 for a snapshot without tensors."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A snapshot that failed."""

    step: int
    error: BaseException
    retry_seconds: float | None
    """After which another is taken; None: not before the next is due."""


class ScalarWriter(Protocol):
    """What TensorBoard's `SummaryWriter` is."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Note a value at a step."""


class Observers:
    """Tells them all. What one of them raises is logged and goes no further. Thread safe, if they
    are."""

    def __init__(
        self,
        events: EventLog,
        *,
        on_durable: Callable[[SnapshotInfo], object] | None = None,
        on_error: Callable[[Failure], object] | None = None,
        tensorboard: ScalarWriter | None = None,
        grace: float | None = None,
    ) -> None:
        """`grace` is the time that a preempted run has for a snapshot, None if it has no such
        end."""
        self.events = events
        self._on_durable = on_durable
        self._on_error = on_error
        self._tensorboard = tensorboard
        self._grace = grace

    def note_durable(self, info: SnapshotInfo) -> None:
        """Log what became durable."""
        _log.info(
            "the snapshot of step %d is durable: stall %.3f s, staged %.3f s, durable %.3f s, "
            "%.1f MB in %.1f MB (ratio %.2f), %s",
            info.step,
            info.stall_seconds,
            info.staged_seconds,
            info.durable_seconds,
            info.raw_bytes / 1e6,
            info.stored_bytes / 1e6,
            info.ratio,
            info.path.name,
        )
        self.events.add(
            "snapshot",
            step=info.step,
            epoch=info.epoch,
            name=info.path.name,
            late=info.late,
            tags=list(info.tags),
            metrics=finite(info.metrics),
            seconds=info.seconds,
            stall_seconds=info.stall_seconds,
            staged_seconds=info.staged_seconds,
            durable_seconds=info.durable_seconds,
            raw_bytes=info.raw_bytes,
            stored_bytes=info.stored_bytes,
        )
        if self._grace is not None and info.durable_seconds > self._grace:
            _log.warning(
                "the snapshot of step %d took %.1f s until it was durable, longer than the grace "
                "of %g s: a preempted run may lose its newest steps; where the process may live "
                "longer, set PYSNAP_GRACE",
                info.step,
                info.durable_seconds,
                self._grace,
            )
            self._grace = None

    def tell_durable(self, info: SnapshotInfo) -> None:
        """Call back for what became durable."""
        _call(self._on_durable, info, f"on_durable failed for the snapshot of step {info.step}")
        _call(self._write_scalars, info, f"tensorboard failed at step {info.step}")

    def _write_scalars(self, info: SnapshotInfo) -> None:
        if self._tensorboard is None:
            return
        for name in (
            "stall_seconds",
            "staged_seconds",
            "durable_seconds",
            "raw_bytes",
            "stored_bytes",
            "ratio",
        ):
            self._tensorboard.add_scalar(f"pysnap/{name}", getattr(info, name), info.step)

    def note_failed(self, failure: Failure) -> None:
        """Log a failure."""
        again = failure.retry_seconds
        _log.error(
            "the snapshot of step %d failed: %s%s",
            failure.step,
            failure.error,
            "" if again is None else f"; another is taken after {again:g} s",
        )
        self.events.add(
            "failed",
            step=failure.step,
            error=str(failure.error) or type(failure.error).__name__,
            errno=getattr(failure.error, "errno", None),
            retry_seconds=again,
        )

    def tell_failed(self, failure: Failure) -> None:
        """Call back for a failure."""
        _call(self._on_error, failure, f"on_error failed for the snapshot of step {failure.step}")


def _call(call: Callable[[Any], object] | None, argument: object, failed: str) -> None:
    if call is None:
        return
    try:
        with trace.span("callback"):
            call(argument)
    except BaseException as error:
        # In the main thread, what ends a process may be somebody's Ctrl-C or signal; in another, it
        # would end that thread without a word.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and not isinstance(error, Exception):
            raise
        _log.exception(failed)
