"""The service beside the training loop: takes snapshots when they are due and puts them back."""

from __future__ import annotations

import logging
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from pysnap import rng
from pysnap._version import __version__
from pysnap.cadence import Cadence
from pysnap.capture import Capture, Stager
from pysnap.commit import Committer, Handle, SnapshotInfo, Stats
from pysnap.config import Config
from pysnap.errors import (
    ClosedError,
    CorruptError,
    Error,
    MismatchError,
    StorageError,
)
from pysnap.manifest import plain_json
from pysnap.match import load_parts
from pysnap.parts import as_part
from pysnap.repository import Repository, Snapshot, tell_skipped
from pysnap.retention import Keep

_log = logging.getLogger("pysnap")

_OVERWRITTEN = "a damaged snapshot was read: live objects may be partly overwritten"


@dataclass
class Progress:
    """Where training stands: steps done in all, the epoch it is in, steps done in this epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Snapshotter:
    """Snapshots of a training run.

    `parts` are the objects that make up the run, by keyword: anything with `state_dict` and
    `load_state_dict`, or a dict, list, tensor or array that is filled in place. Random states and
    progress are part of every snapshot without being named.

    `every` is the cadence (`"200 steps"`, `"10m"`, `"1 epoch"`, `"off"`); `PYSNAP_EVERY` wins over
    it. `keep` is the retention. `host_memory`, `codec`, `workers`, `nice` and `on_error` override
    the environment (see `pysnap.config`). `on_durable` is called with a `SnapshotInfo` in a
    background thread. `metadata`, plain JSON, is stored for people.

    Methods belong to the training thread. In a forked child those that take a snapshot or put one
    back raise ClosedError.
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
        """Open the repository (made if it is not there), take its writer lock and begin to prepare
        staging memory.

        Raises ConfigError for settings or parts that cannot be, StateError for a part that cannot
        be stored, BusyError while another process writes there, StorageError for a path that cannot
        be used, FormatError for a repository of another format.
        """
        config = Config.resolve(
            every=None if every is None else str(every),
            host_memory=host_memory,
            codec=codec,
            workers=workers,
            nice=nice,
            on_error=on_error,
        )
        source = config.sources["every"]
        self._cadence = Cadence.parse(config.every, "every" if source == "argument" else source)
        self._parts = {name: as_part(name, value) for name, value in parts.items()}
        self._raises = config.on_error == "raise"
        self._metadata = plain_json(metadata or {})
        self._owner = os.getpid()
        self.progress = Progress()
        self._stager = Stager(config)
        try:
            self._stager.prepare(self._state(), growth=self._growth())
            self._repository = Repository(Path(path))
        except BaseException:
            self._stager.close()
            raise
        self._committer = Committer(self._repository, keep or Keep(), on_durable)
        # For a Snapshotter that is dropped, and for the end of the interpreter, before modules are
        # torn down and after the committing thread, which is no daemon, has ended.
        self._finalizer = weakref.finalize(
            self, _release, self._committer, self._stager, self._repository, self._owner
        )

        self._step = _Step(self)
        self._resumed = False
        self._pending = False  # due, but another is in flight
        self._mid_step = False  # an exception left a step half done
        self._last_start = time.monotonic()
        _log.info("snapshots to %s: %s (from %s)", self._repository.root, self._cadence, source)

    def step(self) -> _Step:
        """Context manager around one training step. At its end the step is counted and a due
        snapshot taken.

        An exception in the body counts nothing and takes nothing.
        """
        return self._step

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are left of `total`, beginning with the one in which the run stopped."""
        if not self._resumed:
            self._declare_epoch()
        while self.progress.epoch < total:
            yield self.progress.epoch
            self._finish_epoch()

    def resume(self) -> Snapshot | None:
        """Put the newest intact snapshot back into the parts; None, with nothing touched, where
        there is none yet.

        Damaged snapshots are skipped with a warning. Raises MismatchError, with nothing touched, if
        the snapshot does not fit; CorruptError if snapshots exist but none is intact (the message
        says whether parts were touched); FormatError for one of another format.
        """
        self._check_open()
        self._committer.wait_idle()
        listing = self._repository.list()
        skipped = listing.tell_damaged()
        touched = False
        for snapshot in listing.snapshots:
            try:
                self._restore(snapshot)
            except (CorruptError, StorageError) as error:
                touched = True
                skipped.append(tell_skipped(snapshot.path, error))
                continue
            except MismatchError as error:
                if touched:
                    raise MismatchError(f"{error}\nbut before it, {_OVERWRITTEN}") from None
                raise
            self._resumed = True
            _log.info("resumed from %s at step %d", snapshot.path, snapshot.step)
            return snapshot
        if skipped:
            effect = _OVERWRITTEN if touched else "nothing was changed"
            raise CorruptError(
                f"{self._repository.root} holds snapshots, but none is intact ({effect}): "
                + "; ".join(skipped)
            )
        _log.info("%s holds no snapshot yet: a fresh start", self._repository.root)
        return None

    def save(self) -> Handle:
        """Take a snapshot now, after the one that is in flight is done; blocks for that and for the
        capture. Its failure comes from the handle."""
        self._check_open()
        self._committer.wait_idle()
        return self._take()

    def wait_ready(self) -> None:
        """Block until the staging memory that construction asked for is ready. Only a measurement
        needs this: a snapshot that comes earlier waits for what it needs."""
        self._check_open()
        self._stager.wait_reserved()

    def stats(self) -> Stats:
        """A copy of the counts so far."""
        return self._committer.stats()

    def close(self) -> None:
        """Take a snapshot that is still due, wait until the last one is durable and release
        everything; safe to repeat.

        Raises the failure of the snapshot that was asked for last.
        """
        if not self._finalizer.alive:
            return
        self._check_open()
        if self._pending and not self._mid_step:
            self._committer.wait_idle()
            self._take()
        self._committer.close()
        self._finalizer()
        self._tell_failure()

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mid_step |= error is not None
        try:
            self.close()
        except Error:
            # The program's own exception is the one to show; the failure was logged when it came.
            if error is None:
                raise

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise ClosedError(
                "this Snapshotter belongs to the process that made it, not to a forked child"
            )
        if not self._finalizer.alive:
            raise ClosedError("this Snapshotter is closed")

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        state["progress"] = asdict(self.progress)
        # Last: a state_dict may draw.
        state["rng"] = rng.capture()
        return state

    def _growth(self) -> int:
        """Bytes that fresh optimizers will add: two tensors for each parameter at most, in the
        common ones of torch.optim."""
        parameters = [
            parameter
            for part in self._parts.values()
            if isinstance(part, torch.optim.Optimizer) and not part.state
            for group in part.param_groups
            for parameter in group["params"]
        ]
        return sum(2 * parameter.nbytes for parameter in parameters)

    def _finish_step(self) -> None:
        self._check_open()
        self._mid_step = False
        self.progress.step += 1
        self.progress.batch += 1
        if self._raises and not self._committer.busy():
            self._tell_failure()
        elapsed = time.monotonic() - self._last_start
        self._take_if(self._cadence.due_after_step(self.progress.step, elapsed))

    def _finish_epoch(self) -> None:
        self._check_open()
        self.progress.epoch += 1
        self.progress.batch = 0
        self._declare_epoch()
        self._take_if(self._cadence.due_after_epoch(self.progress.epoch))

    def _declare_epoch(self) -> None:
        """Tell loaders that a new epoch begins (see loader.py); not said where a run goes on in the
        epoch of its snapshot."""
        for part in self._parts.values():
            begin_epoch = getattr(part, "begin_epoch", None)
            if begin_epoch is not None:
                begin_epoch()

    def _take_if(self, due: bool) -> None:
        if not self._committer.busy():
            if due or self._pending:
                self._take()
        elif due and not self._pending:
            self._pending = True
            self._committer.count_late()

    def _take(self) -> Handle:
        handle = Handle(self.progress.step)
        self._last_start = time.monotonic()
        self._pending = False
        self._committer.take(handle, self._begin, self._describe())
        return handle

    def _begin(self) -> Capture:
        return self._stager.begin(self._state())

    def _describe(self) -> dict[str, Any]:
        return {
            "versions": {
                "pysnap": __version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "host": platform.node(),
            "progress": asdict(self.progress),
            "user": self._metadata,
        }

    def _tell_failure(self) -> None:
        """Raise the failure of the snapshot that was asked for last, once."""
        if self._committer.newest is not None:
            self._committer.newest.raise_failure()

    def _restore(self, snapshot: Snapshot) -> None:
        rest = load_parts(snapshot, self._parts)
        progress = rest["progress"]
        if type(progress) is not dict or set(progress) != set(vars(self.progress)):
            raise CorruptError(f"the progress in {snapshot.path} is not valid: {progress!r}")
        for name, value in progress.items():
            setattr(self.progress, name, value)
        # Last: whatever is loaded before may draw.
        rng.restore(rest["rng"])


class _Step:
    """See `Snapshotter.step`. One object serves every step."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        # Weak: in a cycle, a Snapshotter that is dropped would keep its writer lock.
        self._snapshotter = weakref.ref(snapshotter)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        snapshotter = self._snapshotter()
        if snapshotter is None:
            return
        if kind is None:
            snapshotter._finish_step()
        else:
            snapshotter._mid_step = True


def _release(committer: Committer, stager: Stager, repository: Repository, owner: int) -> None:
    # In a forked child the engine's threads do not exist and the lock is closed already.
    if os.getpid() == owner:
        committer.close()
        stager.close()
        repository.close()
