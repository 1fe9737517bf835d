"""The service beside the training loop: takes snapshots when they are due, in the background, and puts them back."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from pysnap import rng, tree
from pysnap._version import __version__
from pysnap.cadence import Cadence
from pysnap.capture import Capture, Stager
from pysnap.config import Config
from pysnap.errors import ClosedError, CorruptError, Error, FormatError, MismatchError, StorageError
from pysnap.layout import Leaf
from pysnap.parts import Stateful, as_part, load_parts
from pysnap.repository import Repository, Snapshot, discard
from pysnap.retention import Keep, removable

_log = logging.getLogger("pysnap")


@dataclass
class Progress:
    """Where training stands: steps done in all, the epoch it is in, steps done in this epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class SnapshotInfo:
    """A durable snapshot and what it cost."""

    path: Path
    step: int
    stall_seconds: float
    """How long the training thread was blocked."""
    durable_seconds: float
    """From the beginning of the capture until it was durable."""
    raw_bytes: int
    stored_bytes: int


@dataclass
class Stats:
    """Counts since the Snapshotter was made."""

    durable: int = 0
    failed: int = 0
    late: int = 0
    """Due while another was in flight, and taken when that was durable."""
    stall_seconds: float = 0.0
    raw_bytes: int = 0
    stored_bytes: int = 0
    last: SnapshotInfo | None = None


class Handle:
    """One snapshot that was asked for. Thread safe."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._staged = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._info: SnapshotInfo | None = None

    def done(self) -> bool:
        """Whether it is durable or has failed."""
        return self._done.is_set()

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until the state is captured (or the snapshot has failed); False after `timeout` seconds."""
        return self._staged.wait(timeout)

    def wait(self, timeout: float | None = None) -> SnapshotInfo:
        """Wait until it is durable. Raises its failure, or TimeoutError after `timeout` seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"the snapshot of step {self.step} is not durable after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._info is not None
        return self._info


class Snapshotter:
    """Snapshots of a training run.

    `parts` are the objects that make up the run, by keyword: anything with `state_dict` and `load_state_dict`, or a dict, list, tensor or array
    that is filled in place. Random states and progress are part of every snapshot without being named.

    `every` is the cadence (`"200 steps"`, `"10m"`, `"1 epoch"`, `"off"`); `PYSNAP_EVERY` wins over it. `keep` is the retention.
    `host_memory`, `codec`, `workers`, `on_error` and `nice` override the settings of the environment (see `pysnap.config`). `on_durable` is called with
    a `SnapshotInfo` in a background thread; `metadata` is stored for people and must be plain JSON.

    Methods belong to the training thread. In a forked child it is inert: calls raise ClosedError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        /,
        *,
        every: str | int | None = None,
        keep: Keep | None = None,
        host_memory: int | str | None = None,
        codec: str | None = None,
        workers: int | None = None,
        nice: int | None = None,
        on_error: str | None = None,
        on_durable: Callable[[SnapshotInfo], None] | None = None,
        metadata: dict[str, Any] | None = None,
        **parts: object,
    ) -> None:
        """Open the repository (made if it is not there), take its writer lock and begin to prepare staging memory.

        Raises ConfigError for settings or parts that cannot be, BusyError while another process writes there, StorageError for a path that
        cannot be used, FormatError for a repository of another format.
        """
        self._config = Config.resolve(
            every=None if every is None else str(every),
            host_memory=host_memory, codec=codec, workers=workers, nice=nice, on_error=on_error,
        )  # fmt: skip
        source = self._config.sources["every"]
        self._cadence = Cadence.parse(self._config.every, source if source.startswith("PYSNAP") else "every")
        self._keep = keep or Keep()
        self._parts: dict[str, Stateful] = {name: as_part(name, value) for name, value in parts.items()}
        self._on_durable = on_durable
        self._metadata = metadata or {}
        self._owner = os.getpid()
        self._repository = Repository(Path(path))
        try:
            self._stager = Stager(self._config)
        except BaseException:
            self._repository.close()
            raise
        # At interpreter exit the committing thread, which is no daemon, is waited for first; then this runs.
        self._finalizer = weakref.finalize(self, _release, self._stager, self._repository, self._owner)
        self._stager.reserve(self._estimate())

        self.progress = Progress()
        self._step = _Step(self)
        self._in_flight: Handle | None = None
        self._newest: Handle | None = None
        self._pending = False  # due, but another is in flight
        self._raised: Handle | None = None  # the failure that on_error="raise" has told
        self._last_start = time.monotonic()
        self._lock = threading.Lock()
        self._stats = Stats()  # guarded by _lock
        _log.info("snapshots to %s: %s (from %s)", self._repository.root, self._cadence, source)

    # The loop

    def step(self) -> _Step:
        """Context manager around one training step. At its end the step is counted and a due snapshot taken.

        An exception in the body counts nothing and takes nothing.
        """
        return self._step

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are left of `total`, beginning with the one in which the run stopped."""
        while self.progress.epoch < total:
            yield self.progress.epoch
            self._finish_epoch()

    def resume(self) -> Snapshot | None:
        """Put the newest intact snapshot back into the parts; None, with nothing touched, where there is none yet.

        Damaged snapshots are skipped with a warning. Raises MismatchError, with nothing touched, if the snapshot does not fit; CorruptError if snapshots
        exist but none is intact (the message says whether parts were touched); FormatError for one of another format.
        """
        self._check_open()
        self._wait_idle()
        listing = self._repository.list()
        skipped = []
        for path, error in listing.damaged:
            if isinstance(error, FormatError):
                raise error
            skipped.append(f"{path.name}: {error}")
            _log.warning("skipping a snapshot that cannot be read: %s", error)
        touched = False
        for snapshot in listing.snapshots:
            try:
                rest = load_parts(snapshot, self._parts)
                self._restore_progress(snapshot, rest)
            except (CorruptError, StorageError) as error:
                touched = True
                skipped.append(f"{snapshot.path.name}: {error}")
                _log.warning("skipping a damaged snapshot: %s", error)
                continue
            _log.info("resumed from %s at step %d", snapshot.path, snapshot.step)
            return snapshot
        if skipped:
            effect = "live objects were partly overwritten" if touched else "nothing was changed"
            raise CorruptError(f"{self._repository.root} holds snapshots, but none is intact ({effect}): " + "; ".join(skipped))
        _log.info("%s holds no snapshot yet: a fresh start", self._repository.root)
        return None

    # Snapshots

    def save(self) -> Handle:
        """Take a snapshot now, after the one that is in flight is done; blocks for the capture. Its failure comes from the handle."""
        self._check_open()
        self._wait_idle()
        return self._take()

    def wait_ready(self) -> None:
        """Block until the staging memory that was reserved is ready; for benchmarks, as the first snapshot needs no waiting."""
        self._stager.wait_reserved()

    def stats(self) -> Stats:
        """A copy of the counts so far."""
        with self._lock:
            return Stats(**vars(self._stats))

    def close(self) -> None:
        """Wait until the last snapshot is durable and release everything; safe to repeat. Raises its failure."""
        if not self._finalizer.alive:
            return
        self._check_open()
        self._wait_idle()
        self._finalizer()
        if self._newest is not None and self._newest is not self._raised:
            self._newest.wait()

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Error:
            # The program's own exception is the one to show; the failure was logged when it happened.
            if error is None:
                raise

    # Inside

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise ClosedError("this Snapshotter belongs to the process that made it, not to a forked child")
        if not self._finalizer.alive:
            raise ClosedError("this Snapshotter is closed")

    def _wait_idle(self) -> None:
        if self._in_flight is not None:
            self._in_flight._done.wait()
            self._in_flight = None

    def _estimate(self) -> int:
        """Bytes of a snapshot, with the state that fresh optimizers will have (at most two tensors per parameter in torch.optim's common ones)."""
        size = 0
        for part in self._parts.values():
            found: list[int] = []

            def put(_path: str, leaf: Leaf, found: list[int] = found) -> int:
                found.append(leaf.nbytes)
                return 0

            state = part.state_dict()
            tree.encode(state, put)
            size += sum(found)
            if isinstance(part, torch.optim.Optimizer) and not found:
                parameters = [parameter for group in part.param_groups for parameter in group["params"]]
                size += sum(2 * parameter.nbytes for parameter in parameters)
        return size

    def _finish_step(self) -> None:
        self._check_open()
        self.progress.step += 1
        self.progress.batch += 1
        self._tell_failure()
        self._take_if(self._cadence.due_after_step(self.progress.step, time.monotonic() - self._last_start))

    def _finish_epoch(self) -> None:
        self._check_open()
        self.progress.epoch += 1
        self.progress.batch = 0
        for part in self._parts.values():
            begin_epoch = getattr(part, "begin_epoch", None)
            if begin_epoch is not None:
                begin_epoch()
        self._take_if(self._cadence.due_after_epoch(self.progress.epoch))

    def _take_if(self, due: bool) -> None:
        if self._in_flight is not None and self._in_flight.done():
            self._in_flight = None
        if self._in_flight is not None:
            if due and not self._pending:
                self._pending = True
                with self._lock:
                    self._stats.late += 1
        elif due or self._pending:
            self._take()

    def _take(self) -> Handle:
        start = time.monotonic()
        self._last_start = start
        self._pending = False
        handle = Handle(self.progress.step)
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"progress": vars(self.progress).copy(), "rng": rng.capture()}
        capture = self._stager.begin(state)
        self._in_flight = self._newest = handle
        sequence = self._repository.next_sequence()
        thread = threading.Thread(
            target=self._commit, args=(handle, capture, sequence, start), name="pysnap-commit", daemon=False
        )
        try:
            thread.start()
            capture.copy()
        except BaseException as error:
            capture.abort()
            if not thread.is_alive():
                self._failed(handle, error)
                handle._staged.set()
                handle._done.set()
            raise
        finally:
            handle._stall = time.monotonic() - start
            handle._staged.set()
        return handle

    def _commit(self, handle: Handle, capture: Capture, sequence: int, start: float) -> None:
        """The committing thread: the packs, the manifest, the rename; then retention, then the callback."""
        try:
            snapshot = self._write(handle.step, capture, sequence)
            handle._staged.wait()
            handle._info = SnapshotInfo(
                path=snapshot.path,
                step=handle.step,
                stall_seconds=handle._stall,
                durable_seconds=time.monotonic() - start,
                raw_bytes=snapshot.manifest.stream,
                stored_bytes=snapshot.manifest.stored,
            )
            self._count(handle._info)
            self._retain()
        except BaseException as error:
            self._failed(handle, error)
        finally:
            handle._done.set()
        if handle._info is not None and self._on_durable is not None:
            try:
                self._on_durable(handle._info)
            except Exception:
                _log.exception("on_durable failed for the snapshot of step %d", handle.step)

    def _write(self, step: int, capture: Capture, sequence: int) -> Snapshot:
        partial: Path | None = None
        try:
            partial = self._repository.begin()
            manifest = capture.write(partial, step=step, sequence=sequence, metadata=self._describe())
            return self._repository.commit(partial, manifest)
        except BaseException:
            capture.abort()
            if partial is not None:
                discard(partial)
            raise

    def _retain(self) -> None:
        """A snapshot that cannot be removed does not make the one that was just taken a failure."""
        try:
            for snapshot in removable(self._repository.list().snapshots, self._keep):
                self._repository.delete(snapshot.path)
        except Error as error:
            _log.error("old snapshots could not be removed: %s", error)

    def _describe(self) -> dict[str, Any]:
        return {
            "versions": {
                "pysnap": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "host": platform.node(),
            "progress": vars(self.progress).copy(),
            "user": self._metadata,
        }

    def _count(self, info: SnapshotInfo) -> None:
        with self._lock:
            self._stats.durable += 1
            self._stats.stall_seconds += info.stall_seconds
            self._stats.raw_bytes += info.raw_bytes
            self._stats.stored_bytes += info.stored_bytes
            self._stats.last = info

    def _failed(self, handle: Handle, error: BaseException) -> None:
        handle._error = error
        with self._lock:
            self._stats.failed += 1
        _log.error("the snapshot of step %d failed: %s", handle.step, error)

    def _tell_failure(self) -> None:
        newest = self._newest
        if self._config.on_error == "raise" and newest is not None and newest.done() and newest is not self._raised:
            self._raised = newest if newest._error is not None else self._raised
            if newest._error is not None:
                raise newest._error

    def _restore_progress(self, snapshot: Snapshot, rest: dict[str, Any]) -> None:
        try:
            progress, states = rest["progress"], rest["rng"]
            self.progress = Progress(**progress)
        except (KeyError, TypeError) as error:
            raise MismatchError(f"{snapshot.path} was not taken by a Snapshotter (it lacks {error}); read it with pysnap.load") from None
        rng.restore(states)


class _Step:
    """See `Snapshotter.step`. One object serves every step."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        # Weak: a strong reference would be a cycle, and keep the writer lock of a Snapshotter that is dropped.
        self._snapshotter = weakref.ref(snapshotter)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        snapshotter = self._snapshotter()
        if kind is None and snapshotter is not None:
            snapshotter._finish_step()


def _release(stager: Stager, repository: Repository, owner: int) -> None:
    # In a forked child the engine's threads do not exist and the lock is closed already.
    if os.getpid() == owner:
        stager.close()
        repository.close()
