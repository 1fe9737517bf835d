"""The committing thread: makes a capture a durable snapshot, applies retention, and tells."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pysnap import trace
from pysnap.best import Best
from pysnap.capture import Capture
from pysnap.errors import ClosedError, Error
from pysnap.memory import check_spare_memory
from pysnap.notes import Notes
from pysnap.observers import Failure, Observers, SnapshotInfo
from pysnap.repository import Repository, Snapshot
from pysnap.retention import Keep, Verdict, plan
from pysnap.retries import Backoff, lacks_space
from pysnap.threads import RefusedError, Threads

_log = logging.getLogger("pysnap")


@dataclass
class Stats:
    """Counts since the Snapshotter was made."""

    durable: int = 0
    failed: int = 0
    retried: int = 0
    """Taken after one that failed for a reason that may pass."""
    late: int = 0
    """Due while another was in flight or had just failed, and taken later."""
    stall_seconds: float = 0.0
    raw_bytes: int = 0
    stored_bytes: int = 0
    last: SnapshotInfo | None = None
    interval_seconds: float | None = None
    """From one snapshot to the next by what they cost (`1%`, `auto`); None by other rules, or while
    nothing is measured yet."""


class Handle:
    """One snapshot that was asked for. Thread safe."""

    def __init__(self, step: int, *, late: bool = False) -> None:
        self.step = step
        self.late = late
        """It was due earlier."""
        self._start = time.monotonic()
        self._stall = 0.0
        self._staged = threading.Event()  # set after _stall
        self._done = threading.Event()  # set after _error or _info
        self._claim = threading.Lock()  # held, for good, by who tells how it ended
        self._capture: Capture | None = None
        self._error: BaseException | None = None
        self._info: SnapshotInfo | None = None
        self._told = False  # whether the failure has been raised
        self._owner = os.getpid()

    def done(self) -> bool:
        """Whether it is durable or has failed."""
        return self._done.is_set()

    def durable(self) -> bool:
        """Whether it is durable."""
        return self._done.is_set() and self._error is None

    @property
    def stall_seconds(self) -> float:
        """How long it has blocked the training thread."""
        return self._stall

    @property
    def durable_seconds(self) -> float | None:
        """How long it took until it was durable; None while it is not."""
        return None if self._info is None else self._info.durable_seconds

    @property
    def error(self) -> BaseException | None:
        """Why the snapshot failed; None while it has not."""
        return self._error

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until the state is captured, so that everything may change, or the snapshot has
        failed; False after `timeout` seconds. Without one, as long as the disk takes. Raises
        ClosedError in a forked child."""
        self._check_process()
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._staged.wait(timeout):
            return False
        capture = self._capture
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return capture is None or capture.wait_staged(left)

    def gate(self) -> None:
        """Let nothing pass that may change what is still to be copied: return when all is. For the
        training thread."""
        capture = self._capture
        if capture is not None:
            start = time.monotonic()
            with trace.span("gate"):
                capture.gate()
            self._stall += time.monotonic() - start

    def wait(self, timeout: float | None = None) -> SnapshotInfo:
        """Wait until it is durable. Raises its failure, or TimeoutError after `timeout` seconds.
        Without one, as long as the disk takes; Ctrl-C ends it in the main thread.

        In another thread: a snapshot that overlaps with training becomes durable only when the
        main thread has run some Python, or an optimizer's step, after the copy. Whoever makes the
        main thread wait for this, without a timeout, waits for ever."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # The committing thread waits for a look of the main thread at what is staged.
        if self.wait_staged(timeout):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._done.wait(left)
        if not self._done.is_set():
            raise TimeoutError(f"the snapshot of step {self.step} is not durable after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._info is not None
        return self._info

    def _check_process(self) -> None:
        # The threads that would end the wait are the parent's.
        if os.getpid() != self._owner:
            raise ClosedError(
                f"the snapshot of step {self.step} belongs to the process that took it, not to a "
                "forked child"
            )

    def raise_failure(self) -> None:
        """Raise the failure of a snapshot that is done, unless it has been raised before."""
        if self.done() and self._error is not None and not self._told:
            self._told = True
            raise self._error


class Committer:
    """Commits one capture at a time, in the background. `take`, `wait_idle` and `close`
    belong to the training thread; `stats` may be called by any."""

    def __init__(
        self,
        repository: Repository,
        keep: Keep,
        best: Best | None,
        observers: Observers,
        backoff: Backoff,
    ) -> None:
        self._repository = repository
        self._keep = keep
        self._best = best
        self._observers = observers
        self.backoff = backoff
        """Looked at while no snapshot is in flight."""
        # Several: the one of the last capture may still tell the observers.
        self._threads = Threads("pysnap-commit")
        self.newest: Handle | None = None
        """The snapshot that was asked for last."""
        self.parent: str | None = None
        """Id of the snapshot from which the run goes on: the last durable one, or the one that was
        put back since. Looked at while no snapshot is in flight."""
        self._taking = False  # inside take()
        self._lock = threading.Lock()
        self._stats = Stats()  # guarded by _lock

    def busy(self) -> bool:
        """Whether a snapshot is in flight."""
        return self.newest is not None and not self.newest.done()

    def take(
        self,
        handle: Handle,
        begin: Callable[[], Capture],
        metadata: dict[str, Any],
        notes: Notes,
    ) -> None:
        """Capture, and commit in the background; blocks for the capture.

        A failure is the handle's, not the caller's, also where memory or threads are refused. What
        is raised here is not pysnap's: Ctrl-C, or another exception of somebody's `state_dict`.
        """
        capture: Capture | None = None
        # Ctrl-C may come at any line of this: whatever waits for the capture must be told.
        try:
            self._taking = True
            if self.backoff.wants_retry():
                with self._lock:
                    self._stats.retried += 1
            self.newest = handle
            # Before that, for what is torn down again when no thread starts costs memory, too.
            check_spare_memory()
            capture = begin()
            handle._capture = capture
            self._start(functools.partial(self._run, handle, capture, metadata, notes))
            capture.copy()
        except BaseException as error:
            if capture is not None:
                capture.abort()
            # The committing thread, if it has begun, is told by the capture.
            if handle._claim.acquire(blocking=False):
                self._fail(handle, error)
            if not isinstance(error, (Error, MemoryError, RefusedError)):
                handle._told = True
                raise
        finally:
            handle._stall = time.monotonic() - handle._start
            handle._staged.set()
            self._taking = False

    def _start(self, run: Callable[[], object]) -> None:
        self._threads.start(run)

    def wait_idle(self) -> None:
        """Wait until the snapshot in flight is durable or has failed. Raises Error where that one
        is just being taken by the caller, as in a handler of a signal that came meanwhile."""
        self._check_not_taking()
        if self.newest is not None:
            self.newest.gate()
            self.newest._done.wait()

    def wait_done(self, timeout: float) -> bool:
        """As `wait_idle`, but False after `timeout` seconds (and what the copy takes)."""
        self._check_not_taking()
        if self.newest is None:
            return True
        self.newest.gate()
        return self.newest._done.wait(timeout)

    def _check_not_taking(self) -> None:
        if self._taking:
            raise Error(
                "a snapshot is being taken, and cannot be waited for inside of that; in a signal "
                "handler set a flag, and save behind the step"
            )

    def is_current_thread(self) -> bool:
        """Whether the calling thread commits a snapshot."""
        return self._threads.has(threading.current_thread())

    def close(self) -> None:
        """Wait until the last snapshot is done and told."""
        if self.newest is not None:
            self.newest.gate()
        self._threads.join()

    def count_late(self) -> None:
        """A snapshot was due that cannot be taken yet."""
        with self._lock:
            self._stats.late += 1

    def stats(self) -> Stats:
        """A copy of the counts so far."""
        with self._lock:
            return replace(self._stats)

    def _run(
        self, handle: Handle, capture: Capture, metadata: dict[str, Any], notes: Notes
    ) -> None:
        if not handle._claim.acquire(blocking=False):
            return  # the training thread gave it up before this one had begun
        # By default it kills the process when a file grows past RLIMIT_FSIZE.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXFSZ})
        try:
            snapshot = self._commit(handle.step, capture, metadata, notes)
        except BaseException as error:
            try:
                if lacks_space(error):
                    self._make_room()
            finally:
                self._fail(handle, error)
            return
        try:
            handle._info = info = self._describe(handle, capture, snapshot, notes)
            self.backoff.succeeded()
            self._observers.note_durable(info)
            self._retain(snapshot)
        finally:
            handle._staged.set()
            handle._capture = None
            handle._done.set()
        self._observers.tell_durable(info)
        trace.write()

    def _commit(
        self, step: int, capture: Capture, metadata: dict[str, Any], notes: Notes
    ) -> Snapshot:
        partial: Path | None = None
        try:
            capture.let_pass()
            partial = self._repository.begin()
            sequence = self._repository.next_sequence()
            manifest = capture.write(partial, step=step, sequence=sequence, metadata=metadata)
            snapshot = self._repository.commit(partial, manifest, notes)
            self.parent = manifest.id
            return snapshot
        except BaseException:
            capture.abort()
            if partial is not None:
                self._repository.discard(partial)
            raise

    def _describe(
        self, handle: Handle, capture: Capture, snapshot: Snapshot, notes: Notes
    ) -> SnapshotInfo:
        now = time.monotonic() - handle._start
        metadata = snapshot.manifest.metadata
        info = SnapshotInfo(
            path=snapshot.path,
            step=handle.step,
            epoch=metadata["progress"]["epoch"],
            seconds=metadata["progress"]["seconds"],
            # NaN and infinity are texts there.
            metrics={name: float(value) for name, value in metadata["metrics"].items()},
            tags=notes.tags,
            late=handle.late,
            # The training thread may be on its way out of the capture.
            stall_seconds=handle._stall if handle._staged.is_set() else now,
            staged_seconds=capture.staged_at - handle._start,
            durable_seconds=now,
            raw_bytes=snapshot.manifest.stream,
            stored_bytes=snapshot.manifest.stored,
        )
        with self._lock:
            self._stats.durable += 1
            self._stats.stall_seconds += info.stall_seconds
            self._stats.raw_bytes += info.raw_bytes
            self._stats.stored_bytes += info.stored_bytes
            self._stats.last = info
        return info

    def _make_room(self) -> None:
        """On a full disk, remove what earlier removals left, and what the rule does not keep. What
        it keeps stays: it may go only when a newer one is durable."""
        self._repository.remove_rest()
        self._retain(None)

    def _retain(self, newest: Snapshot | None) -> None:
        """A snapshot that cannot be removed does not make the newest one a failure."""
        try:
            with trace.span("retention"):
                snapshots = self._repository.durable()
                held = self._repository.held()
                if newest is not None:
                    # One that somebody copied here may have a larger sequence number.
                    held |= {newest.path: "just taken"}
                for verdict in reversed(plan(snapshots, self._keep, best=self._best, held=held)):
                    if not verdict.kept:
                        self._remove(verdict)
        except Exception as error:
            _log.error("old snapshots could not be removed: %s", error)

    def _remove(self, verdict: Verdict) -> None:
        snapshot = verdict.snapshot
        try:
            removed = self._repository.delete(snapshot.path)
        except Error as error:
            _log.error("an old snapshot could not be removed: %s", error)
            return
        if removed:
            self._observers.events.add(
                "removed", step=snapshot.step, name=snapshot.path.name, reason=verdict.reason
            )

    def _fail(self, handle: Handle, error: BaseException) -> None:
        doing = f"the snapshot of step {handle.step} failed: "
        handle._error = error.behind(doing) if isinstance(error, Error) else error
        with self._lock:
            self._stats.failed += 1
        try:
            again = self.backoff.failed(error)
            failure = Failure(step=handle.step, error=error, retry_seconds=again)
            self._observers.note_failed(failure)
        finally:
            handle._staged.set()
            handle._capture = None
            handle._done.set()
        self._observers.tell_failed(failure)
