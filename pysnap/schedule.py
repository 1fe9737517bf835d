"""When the next snapshot is due: the cadence, and what snapshots were seen to cost.

Nothing here reads a clock: moments are told, in seconds of one monotonic clock. They are those of
the training thread, whose loop is as fast as the device only on the average.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import Protocol

from pysnap.cadence import Cadence
from pysnap.measure import shown_seconds

_log = logging.getLogger("pysnap")

_WARM_STEPS = 5
"""The first steps of a process compile, tune and fill caches."""
_LEAST_STEPS = 10
"""Steps from which it is known how long one takes."""
_STEPS_SEEN = 64
_REFRESH = 16
_PAUSE = 10
"""A step that takes so many times the usual is a pause of the loop, such as a validation."""
_PAUSES_IN_A_ROW = 8
"""So many are no pauses: the steps have become longer."""
_SNAPSHOTS_SEEN = 16
_FEW_SNAPSHOTS = 3
_OUTLIER = 10
"""A cost counts as so many times the median at most: one hiccup of a disk is no rule."""
_MARGIN = 0.9
"""Of the share, what is aimed at, so that the cost stays under it although it varies."""
_NOTABLE = 1.5
_LONG = 3600.0


class Costs:
    """What snapshots cost training: how long they block it, and how much longer steps take while
    one is in flight. Fitted to the last few."""

    def __init__(self) -> None:
        self._left_to_warm = _WARM_STEPS
        self._plain: deque[float] = deque(maxlen=_STEPS_SEEN)
        self._usual = math.nan  # mean of _plain, now and then
        self._until_refresh = _LEAST_STEPS
        self._pauses = 0  # in a row
        self._flight_seconds = 0.0
        self._flight_steps = 0
        self._long_seconds = 0.0  # of steps beside the one in flight that may be pauses
        self._long_steps = 0
        self._costs: deque[float] = deque(maxlen=_SNAPSHOTS_SEEN)
        self._stalls: deque[float] = deque(maxlen=_SNAPSHOTS_SEEN)
        self._durable: deque[float] = deque(maxlen=_SNAPSHOTS_SEEN)
        self._first = True

    def step(self, seconds: float, *, in_flight: bool) -> None:
        """A step took so long, from the end of the one before, without the time in which the
        snapshot blocked it; `in_flight`: one was when it began."""
        if self._left_to_warm:
            self._left_to_warm -= 1
            return
        is_long = seconds > _PAUSE * self._usual
        if is_long and in_flight:
            self._long_seconds += seconds
            self._long_steps += 1
            return
        if is_long:
            self._pauses += 1
            if self._pauses < _PAUSES_IN_A_ROW:
                return
            self._plain.clear()
            self._until_refresh = _LEAST_STEPS
            self._usual = math.nan
        self._pauses = 0
        if in_flight:
            self._flight_seconds += seconds
            self._flight_steps += 1
            return
        self._plain.append(seconds)
        self._until_refresh -= 1
        if not self._until_refresh:
            self._until_refresh = _REFRESH
            self._usual = statistics.fmean(self._plain)

    @property
    def ready(self) -> bool:
        """Whether it is known how long a step takes without a snapshot."""
        return not math.isnan(self._usual)

    def snapshot(self, *, stall: float, durable: float | None) -> None:
        """The one in flight blocked training for `stall` seconds, and was durable after `durable`;
        None: it failed."""
        if self._plain:
            self._usual = statistics.fmean(self._plain)
        longer = self._longer(durable) if self._plain else 0.0
        self._flight_seconds, self._flight_steps = 0.0, 0
        self._long_seconds, self._long_steps = 0.0, 0
        if self._first and len(self._costs) == 1:
            # It took its memory and made its plan: it stands for the others only while it is alone.
            self._first = False
            self._costs.clear()
            self._stalls.clear()
            self._durable.clear()
        self._stalls.append(stall)
        self._costs.append(stall + longer)
        if durable is not None:
            self._durable.append(durable)

    def _longer(self, durable: float | None) -> float:
        """By how many seconds steps took longer beside the one that was in flight."""
        longer = self._flight_seconds - self._flight_steps * self._usual
        much_longer = self._long_seconds - self._long_steps * self._usual
        # More than the time in which it was in flight is not its doing.
        return longer + much_longer if much_longer <= (durable or 0.0) else longer

    @property
    def stall(self) -> float:
        """Seconds for which a snapshot blocks training."""
        return _typical(self._stalls)

    @property
    def each(self) -> float:
        """Seconds of training that a snapshot costs."""
        # By chance, the steps beside one may have been the faster ones.
        return max(_typical(self._costs), self.stall)

    @property
    def durable(self) -> float:
        """Seconds until one is durable; 0 while none was."""
        return statistics.median(self._durable) if self._durable else 0.0


def _typical(values: deque[float]) -> float:
    if len(values) < _FEW_SNAPSHOTS:
        # Steps vary: by chance one may seem expensive, and the next come late. Another is cheap.
        return min(values)
    most = _OUTLIER * max(0.0, statistics.median(values))
    return statistics.fmean(min(value, most) for value in values)


class Flight(Protocol):
    """A snapshot that was taken, as `commit.Handle`."""

    @property
    def stall_seconds(self) -> float:
        """For how long it has blocked training."""

    @property
    def durable_seconds(self) -> float | None:
        """After how long it was durable; None: not yet, or it failed."""

    def done(self) -> bool:
        """Whether it is durable or has failed."""


class Schedule:
    """Says when a snapshot is due, step by step."""

    def __init__(self, cadence: Cadence, *, mtbf: float, now: float) -> None:
        """`mtbf` is the mean time between failures, in seconds."""
        self.cadence = cadence
        self._mtbf = mtbf
        self._costs = Costs()
        self.interval: float | None = None
        """Seconds from one snapshot to the next by a measured rule; None where there is none, or
        nothing is measured yet."""
        self._told = 0.0
        self._warned = False
        self._last_taken: float = now
        self._last_step: float = now
        self._paused = True  # nothing is known of the time before the first step
        self._flight: Flight | None = None
        self._stall_seen = 0.0  # of _flight
        self._none_taken = True

    def after_step(self, step: int, now: float) -> bool:
        """Whether a snapshot is due when `step` steps are done."""
        if not self.cadence.measured:
            return self.cadence.due_after_step(step, now - self._last_taken)
        self._observe(now)
        elapsed = now - self._last_taken
        if self.interval is not None:
            due = elapsed >= self.interval
        else:
            due = self._none_taken and self._costs.ready
        return due or self.cadence.due_after_step(step, elapsed)

    def after_epoch(self, epochs: int) -> bool:
        """Whether a snapshot is due when `epochs` epochs are done."""
        return self.cadence.due_after_epoch(epochs)

    def pause(self) -> None:
        """Something else than a step comes before the next one, such as a validation."""
        self._paused = True

    def taken(self, flight: Flight, now: float) -> None:
        """A snapshot begins; the one before is done."""
        self._land()
        self._last_taken = now
        self._none_taken = False
        self._flight, self._stall_seen = flight, 0.0

    def _observe(self, now: float) -> None:
        """A step is done."""
        flight = self._flight
        stall = 0.0 if flight is None else flight.stall_seconds
        if not self._paused:
            seconds = now - self._last_step - (stall - self._stall_seen)
            self._costs.step(seconds, in_flight=flight is not None)
        self._last_step, self._stall_seen, self._paused = now, stall, False
        if flight is not None and flight.done():
            self._land()

    def _land(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None and self.cadence.measured:
            self._costs.snapshot(stall=flight.stall_seconds, durable=flight.durable_seconds)
            self._fit()

    def _fit(self) -> None:
        cost, durable = self._costs.each, self._costs.durable
        intervals = []
        if self.cadence.share is not None:
            # At least half of the steps run without one, or nothing could be compared.
            intervals.append(max(cost / (_MARGIN * self.cadence.share), 2 * durable))
        if self.cadence.auto:
            # Young, "A first order approximation to the optimum checkpoint interval", CACM 1974.
            intervals.append(max(math.sqrt(2 * cost * self._mtbf), durable))
        self.interval = interval = min(intervals)
        if not self._told / _NOTABLE < interval < self._told * _NOTABLE:
            self._told = interval
            _log.info(
                "a snapshot every %s from now on: one costs %s of training (it waits %s) and is "
                "durable after %s",
                *map(shown_seconds, (interval, cost, self._costs.stall, durable)),
            )
        if interval > _LONG and self.cadence.seconds is None and not self._warned:
            self._warned = True
            _log.warning(
                "a snapshot costs %s of training, so that there is one every %s and a failure "
                'loses as much; to have one more often whatever it costs, add a time, as in "%s"',
                shown_seconds(cost),
                shown_seconds(interval),
                "auto, 1h" if self.cadence.share is None else f"{self.cadence.share * 100:g}%, 1h",
            )
