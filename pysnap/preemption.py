"""Signals that ask the run to end: the newest step is made durable, and `Preempted` is raised.

A handler of signals runs between any two instructions of the main thread, where a step may be half
done. So it notes the signal and nothing else; the Snapshotter looks for it where pysnap takes
snapshots of its own accord, which are the points to which a run can be put back bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from pysnap.commit import Committer, Handle
from pysnap.events import EventLog
from pysnap.observers import SnapshotInfo
from pysnap.retries import is_transient

Handler = Callable[[int, FrameType | None], object]

_log = logging.getLogger("pysnap")

# A scheduler and a launcher may both pass on one and the same signal.
_SAME_SECONDS = 1.0
# Between a failure and the next try.
_PAUSE_SECONDS = 1.0


class Preempted(SystemExit):
    """A signal asked the run to end; what could be made durable in time is.

    As a SystemExit that nobody catches, it ends the program with status 128 + the signal's number
    (143 for SIGTERM, 138 for SIGUSR1), as a shell reports a process that a signal ended.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(128 + number)
        self.signal = number
        self.step = step
        """The last step that was finished."""

    def __str__(self) -> str:
        return f"{self.signal.name} ended the run after step {self.step}"


@dataclass(frozen=True)
class Request:
    """A signal that came."""

    signal: signal.Signals
    time: float
    """By the monotonic clock."""
    previous: Handler | None
    """The program's own handler of it."""


class _Watch:
    """The handlers of this process, which all Snapshotters share.

    A handler that was there before is kept: it is called when the run ends (see `Preemption.end`)
    or at a second signal, and is put back when no Snapshotter needs ours any more.
    """

    def __init__(self) -> None:
        self.request: Request | None = None
        self.told = False  # whether somebody has been made to end
        self.users: list[Preemption] = []
        self._owner = os.getpid()
        self._counts: Counter[signal.Signals] = Counter()  # Snapshotters that want a signal
        self._previous: dict[signal.Signals, Any] = {}  # of those that have our handler
        os.register_at_fork(after_in_child=self._leave_to_parent)

    def add(
        self, user: Preemption, signals: Iterable[signal.Signals]
    ) -> tuple[signal.Signals, ...]:
        """Watch for signals; those that cannot be watched are left out, and told."""
        if not self.users:
            self.request, self.told = None, False
        self.users.append(user)
        watched = tuple(number for number in signals if self._install(number))
        self._counts.update(watched)
        return watched

    def remove(self, user: Preemption, signals: Iterable[signal.Signals]) -> None:
        """The opposite of `add`."""
        if user not in self.users:
            return
        self.users.remove(user)
        self._counts.subtract(signals)
        # Elsewhere the handler stays, and does what the previous one did.
        if threading.current_thread() is threading.main_thread():
            for number in [number for number in self._previous if not self._counts[number]]:
                self._put_back(number)

    def _install(self, number: signal.Signals) -> bool:
        current = signal.getsignal(number)
        if current == self._handle:
            return True
        if threading.current_thread() is not threading.main_thread():
            _log.info("%s is not watched: handlers are the main thread's", number.name)
            return False
        if current is signal.SIG_IGN:
            _log.info("%s is not watched: this process ignores it", number.name)
            return False
        if current is None or (current is signal.SIG_DFL and _is_caught(number)):
            _log.info("%s is not watched: it has a handler outside Python", number.name)
            return False
        self._previous[number] = signal.signal(number, self._handle)
        return True

    def _put_back(self, number: signal.Signals) -> None:
        previous = self._previous[number]
        # Whoever installed a handler since may call ours.
        if signal.getsignal(number) == self._handle:
            signal.signal(number, previous)
            del self._previous[number]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing here may wait, log or take a lock: the main thread may be anywhere.
        name = signal.Signals(number)
        previous = self._previous.get(name)
        handler = previous if callable(previous) else None
        watched = self._counts[name] > 0 and os.getpid() == self._owner
        now = time.monotonic()
        if watched and self.request is None:
            self.request = Request(name, now, handler)
            return
        if watched and self.request is not None and now - self.request.time < _SAME_SECONDS:
            return
        if handler is not None:
            handler(number, frame)
        if watched or handler is None:
            signal.signal(name, signal.SIG_DFL)
            os.kill(os.getpid(), name)
            # The first process of a container has no default handlers.
            os._exit(128 + number)

    def _leave_to_parent(self) -> None:
        """In a forked child everything is as if there were no Snapshotter."""
        self._owner = os.getpid()
        self.request, self.told, self.users = None, False, []
        self._counts.clear()
        for number in list(self._previous):
            self._put_back(number)


def _is_caught(number: signal.Signals) -> bool:
    """Whether this process has a handler for a signal, of whichever language."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


_watch = _Watch()


class Preemption:
    """What one Snapshotter knows of signals; belongs to its training thread."""

    def __init__(self, signals: Iterable[signal.Signals], grace: float) -> None:
        """Watch for `signals`; a run that gets one has `grace` seconds from then on."""
        self._grace = grace
        self._inside: int | None = None  # the thread that is in a step
        self._gave_up = False  # the newest step is not durable, and nothing is to be done about it
        self._signals = _watch.add(self, signals)

    @property
    def active(self) -> bool:
        """Whether any signal is watched."""
        return bool(self._signals)

    def enter(self) -> None:
        """A step begins."""
        self._inside = threading.get_ident()

    def leave(self) -> None:
        """A step ends."""
        self._inside = None

    def asked(self) -> bool:
        """Whether a signal came that nobody has ended for."""
        return self.request is not None and not _watch.told

    def ended(self) -> bool:
        """Whether somebody has been made to end for a signal."""
        return self.request is not None and _watch.told

    @property
    def request(self) -> Request | None:
        """The signal that came, also once the end has been told."""
        return _watch.request if self._signals else None

    def save(
        self,
        committer: Committer,
        safe: Callable[[], bool],
        take: Callable[[], Handle] | None,
    ) -> bool:
        """Use what is left of the grace to have the newest step durable, which `safe` tells.

        What is in flight is finished first. Then `take` takes a snapshot, if there is time for
        another; None: it cannot be taken here. After a transient failure it is tried again. False
        if there is something to do, but not here.
        """
        done = self._gave_up or self._save(committer, safe, take)
        self._gave_up = done and not safe()
        return done

    def _save(
        self,
        committer: Committer,
        safe: Callable[[], bool],
        take: Callable[[], Handle] | None,
    ) -> bool:
        begun = committer.busy()
        if not self._wait(committer):
            return True
        while not safe():
            if take is None:
                return False
            if not self._fits(committer.stats().last) and begun:
                _log.warning("the steps since the last durable snapshot are lost")
                return True
            begun = True
            handle = take()
            if not self._wait(committer) or handle.error is None:
                return True
            if not is_transient(handle.error) or self._left() <= _PAUSE_SECONDS:
                return True
            time.sleep(_PAUSE_SECONDS)
        return True

    def _left(self) -> float:
        """Seconds of the grace."""
        request = self.request
        assert request is not None
        return max(0.0, request.time + self._grace - time.monotonic())

    def _wait(self, committer: Committer) -> bool:
        """Wait for what is in flight; False when the grace is over."""
        if committer.wait_done(self._left()):
            return True
        _log.warning(
            "a snapshot in flight is not durable at the end of the grace of %g s; the process "
            "waits for it before it ends, as long as it may",
            self._grace,
        )
        return False

    def _fits(self, last: SnapshotInfo | None) -> bool:
        """Whether another snapshot is durable in time, if it takes as long as the last one."""
        left = self._left()
        if last is None or last.durable_seconds <= left:
            return True
        _log.warning(
            "%.1f s are left of the grace of %g s, and a snapshot takes %.1f s; where the process "
            "may live longer, set PYSNAP_GRACE",
            left,
            self._grace,
            last.durable_seconds,
        )
        return False

    def end(self, step: int, events: EventLog) -> None:
        """End the run after `step`, once: with the handler that the program had for the signal, if
        that ends it, else by raising Preempted. Not while another Snapshotter is in a step around
        this one: its end ends the run."""
        if not self.asked():
            return
        here = threading.get_ident()
        if any(user._inside == here for user in _watch.users if user is not self):
            return
        request = self.request
        assert request is not None
        _watch.told = True
        _log.warning("%s ends the run after step %d", request.signal.name, step)
        events.add("preempted", signal=request.signal.name, step=step)
        if request.previous is not None:
            request.previous(request.signal, None)
        raise Preempted(request.signal, step)

    def close(self) -> None:
        """Watch no more; safe to repeat, and in any thread."""
        _watch.remove(self, self._signals)
