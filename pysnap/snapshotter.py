"""The service beside the training loop: takes snapshots when they are due and puts them back."""

from __future__ import annotations

import functools
import json
import logging
import math
import operator
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import torch

from pysnap import preflight, provenance, rng, trace
from pysnap._version import __version__
from pysnap.best import Best
from pysnap.cadence import Cadence
from pysnap.capture import Capture, Size, Stager
from pysnap.commit import Committer, Handle, Stats
from pysnap.config import Config
from pysnap.errors import (
    ClosedError,
    ConfigError,
    CorruptError,
    Error,
    MismatchError,
    NotFoundError,
    StorageError,
    TornError,
)
from pysnap.estimating import Growth, foresee
from pysnap.events import EventLog
from pysnap.gate import Gate
from pysnap.manifest import finite, plain_json
from pysnap.match import Terms, load_parts
from pysnap.measure import shown_seconds
from pysnap.memory import available_memory
from pysnap.notes import Notes, tagged
from pysnap.observers import Failure, Observers, ScalarWriter, SnapshotInfo
from pysnap.parts import States, as_part
from pysnap.preemption import Preempted, Preemption
from pysnap.progress import Progress
from pysnap.repository import Listing, Repository, Snapshot, tell_skipped
from pysnap.retention import Keep, check_best
from pysnap.retries import Backoff
from pysnap.schedule import Schedule
from pysnap.which import Which

_log = logging.getLogger("pysnap")

_Batch = TypeVar("_Batch")

_ON_OFF = {True: "on", False: "off"}
_OVERWRITTEN = "a damaged snapshot was read: live objects may be partly overwritten"


class Snapshotter:
    """Snapshots of a training run.

    `parts` are the objects that make up the run, by keyword: anything with `state_dict` and
    `load_state_dict`, or a dict, list, tensor or array that is filled in place. Random states and
    progress are part of every snapshot without being named.

    `every` is the cadence (`"200 steps"`, `"10m"`, `"1 epoch"`, `"1%"`, `"auto"`, `"off"`);
    `PYSNAP_EVERY` wins over it. `keep` is the retention. `best` (`"min val_loss"`,
    `"max accuracy by 0.001"`) names the metric of which an improvement, told by `report`, takes a
    snapshot. `overlap`, `host_memory`, `codec`, `workers`, `nice`, `on_error`, `preemption` and
    `grace` (seconds, or text such as `"2m"`) override the environment (see `pysnap.config`).

    `on_durable` is called with a `SnapshotInfo`, and `on_error`, where it is no text, with a
    `Failure`, in a background thread; `tensorboard`, anything with `add_scalar`, gets what each
    snapshot cost. `config` is the configuration of the run, plain JSON: what differs is told when
    the run is resumed. `metadata`, plain JSON, is stored for people.

    After a signal that `preemption` names, a snapshot is taken at the end of the step, and
    `Preempted` ends the run when it is durable, or when `grace` is over (see `docs/guide.md`).

    Methods belong to the training thread. In a forked child those that take a snapshot or put one
    back raise ClosedError.

    A step waits for the copy of host memory, and for the disk only where the state is larger than
    `host_memory`: if the disk takes nothing for 60 s, the snapshot is given up. What waits longer
    says so below; Ctrl-C ends it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        /,
        *,
        every: str | int | None = None,
        keep: Keep | None = None,
        best: str | None = None,
        overlap: bool | None = None,
        host_memory: int | str | None = None,
        codec: str | None = None,
        workers: int | None = None,
        nice: int | None = None,
        on_error: str | Callable[[Failure], object] | None = None,
        on_durable: Callable[[SnapshotInfo], object] | None = None,
        tensorboard: ScalarWriter | None = None,
        preemption: str | bool | None = None,
        grace: float | str | None = None,
        config: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        **parts: object,
    ) -> None:
        """Open the repository (made if it is not there), take its writer lock, look whether memory
        and disk hold what the rules ask for, and begin to prepare staging memory.

        Raises ConfigError for settings or parts that cannot be and for staging that memory does not
        hold, StateError for a part that cannot be stored, BusyError while another process writes
        there, StorageError for a path that cannot be used, a disk that is too small or where the
        system refuses threads, FormatError for a repository of another format.
        Waits for the disk, and for no other process.
        """
        settings = Config.resolve(
            every=None if every is None else str(every),
            overlap=overlap,
            host_memory=host_memory,
            codec=codec,
            workers=workers,
            nice=nice,
            on_error="warn" if callable(on_error) else on_error,
            preemption=_ON_OFF[preemption] if isinstance(preemption, bool) else preemption,
            grace=grace,
        )
        source = settings.sources["every"]
        cadence = Cadence.parse(settings.every, "every" if source == "argument" else source)
        self._best = None if best is None else Best.parse(best)
        keep = keep or Keep()
        check_best(keep, self._best)
        # Only the environment sets it; an argument is one of `resume`.
        self._which = (
            None if settings.resume is None else Which.parse(settings.resume, "PYSNAP_RESUME")
        )
        self._parts = {name: as_part(name, value) for name, value in parts.items()}
        self._states = States()
        self._raises = settings.on_error == "raise"
        self._description = provenance.describe() | {
            "config": plain_json(config or {}),
            "user": plain_json(metadata or {}),
        }
        self._reported: dict[str, float] = {}  # metrics of this moment
        self._owner = os.getpid()
        if tensorboard is not None and not callable(getattr(tensorboard, "add_scalar", None)):
            raise ConfigError(f"tensorboard is {tensorboard!r:.80}; it must have add_scalar")
        if settings.trace is not None:
            trace.begin(settings.trace)
        self.progress = Progress()
        self._tell_rule(Path(path).absolute(), cadence, settings)
        self._stager = Stager(settings)
        self._gate = Gate(self._parts.values() if settings.overlap else (), _waiter(self))
        try:
            size = self._stager.measure(self._state(), gate=self._gate, growth=self._growth())
            self._repository = Repository(Path(path))
            self._preflight(size, keep, cadence, settings)
            self._stager.reserve(size)
        except BaseException:
            self._gate.close()
            self._stager.close()
            raise
        self._events = EventLog(self._repository.root)
        self._preemption = Preemption(settings.preemption, settings.grace)
        observers = Observers(
            self._events,
            on_durable=on_durable,
            on_error=on_error if callable(on_error) else None,
            tensorboard=tensorboard,
            grace=settings.grace if self._preemption.active else None,
        )
        self._committer = Committer(
            self._repository, keep, self._best, observers, Backoff(cadence.seconds)
        )
        # For a Snapshotter that is dropped, and for the end of the interpreter, before modules are
        # torn down and after the committing thread, which is no daemon, has ended.
        self._finalizer = weakref.finalize(
            self,
            _release,
            self._committer,
            self._gate,
            self._stager,
            self._repository,
            self._events,
            self._preemption,
            self._owner,
        )

        self._step = _Step(self)
        self._resumed = False
        self._pending = False  # due, but it could not be taken yet
        self._safe_step = 0  # it was put back, or nothing is done yet
        self._mid_step = False  # an exception left a step half done
        self._clock_start = time.monotonic()  # progress.seconds is counted from here
        self._schedule = Schedule(cadence, mtbf=settings.mtbf, now=self._clock_start)
        self._events.add(
            "run",
            pid=self._owner,
            host=self._description["host"],
            command=self._description["command"],
            version=__version__,
            rule=str(cadence),
            source=source,
            keep=asdict(keep),
            best=best,
        )

    def step(self, *, samples: int = 0) -> _Step:
        """Context manager around one training step. At its end the step is counted, with the
        `samples` that it trained on, and a due snapshot taken.

        An exception in the body counts nothing and takes nothing.
        """
        self._step.samples = samples
        return self._step

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs that are left of `total`, beginning with the one in which the run stopped."""
        if not self._resumed:
            self._declare_epoch()
        while self.progress.epoch < total:
            yield self.progress.epoch
            self._finish_epoch()

    @overload
    def steps(self, total: int) -> Iterator[int]: ...

    @overload
    def steps(self, total: int, loader: Iterable[_Batch]) -> Iterator[_Batch]: ...

    def steps(self, total: int, loader: Iterable[Any] | None = None) -> Iterator[Any]:
        """What is left of `total` steps: their numbers, or the batches of `loader`, epoch after
        epoch, each of which `epochs` would give.

        Raises ConfigError for a loader that gives no batch in a whole epoch.
        """
        if loader is None:
            while self.progress.step < total:
                yield self.progress.step
                self._end_if_asked()
            return
        resumed = self._resumed
        for _ in self.epochs(sys.maxsize):
            if self.progress.step >= total:
                return
            empty = True
            for batch in loader:
                empty = False
                yield batch
                self._end_if_asked()
                if self.progress.step >= total:
                    return
            # The rest of the epoch in which the run stopped may be empty.
            if empty and not resumed:
                raise ConfigError(f"the loader gives no batch, so that {total} steps never end")
            resumed = False

    def resume(
        self,
        which: str | os.PathLike[str] = "newest",
        *,
        step: int | None = None,
        tag: str | None = None,
        strict: bool = True,
        only: Iterable[str] | None = None,
        rename: Mapping[str, str] | None = None,
        convert: bool = False,
        **parts: str,
    ) -> Snapshot | None:
        """Put a snapshot back into the parts; None, with nothing touched, where there is none yet.

        `which` is `"newest"`, `"best"`, `"off"`, `"step=N"`, `"tag=NAME"` or a snapshot's path;
        `step` and `tag` say the same; `PYSNAP_RESUME` wins over them. Of those that fit the rule,
        damaged ones are skipped with a warning. Waits for the snapshot in flight, and for the disk.

        The snapshot must fit the live objects in every object, name, shape and type. Ways past it:
        `strict=False` leaves what does not fit as it is live, and tells it in a warning; `only`
        names what is wanted, such as `["model"]`, `["model/encoder"]` (progress and random states
        are `"progress"` and `"rng"`); `rename` maps names in the snapshot to live ones, such as
        `{"model/backbone": "model/encoder"}`; `convert` converts tensors of another dtype; and
        `PART="restart"`, such as `loader="restart"`, leaves a part as it is live, a loader at the
        beginning of the epoch.

        Raises MismatchError, with nothing touched, if the snapshot does not fit (where a part of
        the program's own says so only when it is loaded, the message tells what was overwritten);
        CorruptError if snapshots exist but none is intact (the message says whether parts were
        touched); NotFoundError where the rule finds none; FormatError for one of another format;
        StorageError, with none skipped, where the process or the machine lacks descriptors or
        memory to look; ConfigError for arguments that cannot be.
        """
        self._check_open()
        rule = self._which or _rule(which, step, tag)
        terms = Terms.check(
            strict=strict,
            only=only,
            rename=rename,
            convert=convert,
            restart=parts,
            parts=self._parts,
        )
        if rule.kind == "off":
            _log.info("a fresh start: resume is off")
            return None
        self._committer.wait_idle()
        listing = self._repository.list()
        skipped = [] if rule.kind == "path" else listing.tell_damaged()
        touched = False
        for snapshot in self._candidates(rule, listing, skipped):
            try:
                self._restore(snapshot, terms)
            except (CorruptError, StorageError) as error:
                if error.says_nothing:
                    raise
                touched = True
                skipped.append(tell_skipped(snapshot.path, error))
                continue
            except MismatchError as error:
                if touched:
                    raise MismatchError(f"{error}\nbut before it, {_OVERWRITTEN}") from None
                raise
            _log.info("resumed from %s at step %d", snapshot.path, snapshot.step)
            self._events.add("resumed", step=snapshot.step, name=snapshot.path.name)
            self._safe_step = self.progress.step
            return snapshot
        if skipped:
            effect = _OVERWRITTEN if touched else "nothing was changed"
            raise CorruptError(
                f"{self._repository.root} holds snapshots, but none that resume may take "
                f"({rule}) is intact ({effect}): " + "; ".join(skipped)
            )
        _log.info("%s holds no snapshot yet: a fresh start", self._repository.root)
        return None

    def _candidates(self, rule: Which, listing: Listing, skipped: list[str]) -> list[Snapshot]:
        try:
            return rule.candidates(listing, self._best, self._repository.root)
        except NotFoundError as error:
            if not skipped:
                raise
            # It may be one of these.
            raise CorruptError(f"{error}; damaged are: {'; '.join(skipped)}") from None

    def save(self, *, tag: str | Iterable[str] = (), overlap: bool = False) -> Handle:
        """Take a snapshot now, after the one that is in flight is done; blocks for that, as long as
        the disk takes, and for the capture. Its failure comes from the handle. Retention keeps it
        while it has a tag.

        With `overlap`, what the registered optimizers alone change is copied until one of them
        steps, as for a snapshot that is due at the end of a step: nothing else may change it until
        then. Raises ConfigError for what is no tag.
        """
        self._check_open()
        notes = tagged(tag)
        self._schedule.pause()
        self._committer.wait_idle()
        return self._take(notes, overlap=overlap)

    def report(self, **metrics: float) -> bool:
        """Note the values of metrics at this moment. True if the one that `best` names has
        improved: then a snapshot is taken, as by `save`.

        Raises ConfigError for a value that is no number.
        """
        self._check_open()
        self._schedule.pause()
        for name, value in metrics.items():
            try:
                self._reported[name] = float(value)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"report({name}={value!r:.80}): a metric must be a number"
                ) from None
        self.progress.metrics |= self._reported
        values = {name: self._reported[name] for name in metrics}
        self._events.add("metrics", step=self.progress.step, values=finite(values))
        best = self._best
        if best is None or best.metric not in metrics:
            return False
        if self.progress.best_rule != str(best):
            # Of another metric: it says nothing.
            self.progress.best, self.progress.best_rule = None, str(best)
        value = self._reported[best.metric]
        if math.isnan(value):
            _log.warning("%s is not a number at step %d", best.metric, self.progress.step)
        if not best.improves(value, self.progress.best):
            return False
        self.progress.best = value
        self.save()
        return True

    def wait_ready(self) -> None:
        """Block until the staging memory that construction asked for is ready, or the system has
        refused more: for as long as it takes to touch it. Only a measurement needs this: a snapshot
        that comes earlier waits for what it needs."""
        self._check_open()
        self._stager.wait_reserved()

    def stats(self) -> Stats:
        """A copy of the counts so far."""
        return replace(self._committer.stats(), interval_seconds=self._schedule.interval)

    def close(self) -> None:
        """Take a snapshot that is still due, or again one that failed, wait until the last one is
        durable and release everything; safe to repeat.

        Waits as long as the disk and `on_durable` take; Ctrl-C ends that, and close() may be
        called again. With a dead disk the process cannot end either before the kernel gives its
        thread back: `Handle.wait(timeout)` tells that in time.

        Raises Preempted if a signal asked the run to end, else the failure of the snapshot that was
        asked for last.
        """
        if not self._finalizer.alive:
            return
        self._check_open()
        if not self._mid_step:
            self._take_last()
        self._committer.close()
        try:
            self._end()
        finally:
            self._events.add("closed", step=self.progress.step)
            self._finalizer()
        self._tell_failure()

    def _take_last(self) -> None:
        if self._preemption.request is not None:
            self._preemption.save(self._committer, self._is_safe, self._take)
            return
        self._committer.wait_idle()
        if self._pending or self._committer.backoff.wants_retry():
            self._take()

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Where the run was made to end is no middle of a step of this Snapshotter.
        self._mid_step |= error is not None and not self._preemption.ended()
        try:
            self.close()
        except (Error, Preempted):
            # The program's own exception is the one to show; the failure was logged when it came.
            if error is None:
                raise

    def _tell_rule(self, root: Path, cadence: Cadence, settings: Config) -> None:
        """The first line of the log: the rule in force, and where it came from."""
        rule = str(cadence)
        if cadence.auto:
            told = "" if settings.sources["mtbf"] == "default" else " of PYSNAP_MTBF"
            rule += f", at a failure every {shown_seconds(settings.mtbf)}{told}"
        _log.info("snapshots to %s: %s (from %s)", root, rule, settings.sources["every"])

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise ClosedError(
                "this Snapshotter belongs to the process that made it, not to a forked child"
            )
        if not self._finalizer.alive:
            raise ClosedError("this Snapshotter is closed")

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: self._states.of(part) for name, part in self._parts.items()}
        state["progress"] = self.progress.state()
        # Last: a state_dict may draw.
        state["rng"] = rng.capture()
        return state

    def _growth(self) -> Growth:
        """The state that fresh optimizers among the parts will make."""
        grown = [
            foresee(part)
            for part in self._parts.values()
            if isinstance(part, torch.optim.Optimizer)
        ]
        return functools.reduce(operator.add, grown, Growth({}))

    def _preflight(self, size: Size, keep: Keep, cadence: Cadence, settings: Config) -> None:
        try:
            preflight.check(
                self._repository,
                size,
                keep,
                cadence,
                encodes=settings.codec != "none",
                improvements=self._best is not None,
                free_memory=available_memory(),
                metadata=len(json.dumps(self._description)),
            )
        except BaseException:
            self._repository.close()
            raise

    def _finish_step(self, samples: int) -> None:
        self._check_open()
        self._mid_step = False
        self._reported = {}
        self.progress.step += 1
        self.progress.batch += 1
        self.progress.samples += samples
        now = time.monotonic()
        self.progress.seconds = now - self._clock_start
        if self._raises and not self._committer.busy():
            self._tell_failure()
        # Only behind a step: the next change is the optimizer's.
        self._take_if(self._schedule.after_step(self.progress.step, now), overlap=True)
        self._end_if_asked()

    def _finish_epoch(self) -> None:
        self._check_open()
        self.progress.epoch += 1
        self.progress.batch = 0
        self._declare_epoch()
        self._schedule.pause()
        self._take_if(self._schedule.after_epoch(self.progress.epoch), overlap=False)
        self._end_if_asked()

    def _declare_epoch(self) -> None:
        """Tell loaders that a new epoch begins (see loader.py); not said where a run goes on in the
        epoch of its snapshot."""
        for part in self._parts.values():
            begin_epoch = getattr(part, "begin_epoch", None)
            if begin_epoch is not None:
                begin_epoch()

    def _take_if(self, due: bool, *, overlap: bool) -> None:
        if self._preemption.asked():
            return  # what the end of the run takes is not in the way of the next step
        if self._committer.busy() or self._committer.backoff.holds():
            if due and not self._pending:
                self._pending = True
                self._committer.count_late()
        elif due or self._pending or self._committer.backoff.wants_retry():
            self._take(overlap=overlap)

    def _begin_step(self) -> None:
        # A loader may stand behind a batch that no step has seen: nothing can be taken here.
        if self._preemption.asked() and self._preemption.save(
            self._committer, self._is_safe, take=None
        ):
            self._end()
        self._preemption.enter()

    def _end_if_asked(self) -> None:
        """Where a run can be put back to: have the newest step durable, and end, if a signal asks
        for it."""
        if self._preemption.asked():
            self._preemption.save(self._committer, self._is_safe, self._take)
            self._end()

    def _end(self) -> None:
        self._preemption.end(self.progress.step, self._events)

    def _is_safe(self) -> bool:
        """Whether the last finished step is durable, or was never taken anew."""
        newest = self._committer.newest
        durable = newest.step if newest is not None and newest.durable() else self._safe_step
        return self.progress.step == durable

    def _take(self, notes: Notes | None = None, *, overlap: bool = False) -> Handle:
        previous = self._committer.newest
        if previous is not None and isinstance(previous.error, TornError):
            self._gate.give_up()
        handle = Handle(self.progress.step, late=self._pending)
        self._schedule.taken(handle, time.monotonic())
        self._pending = False

        def begin() -> Capture:
            return self._stager.begin(self._state(), gate=self._gate, overlap=overlap)

        self._committer.take(handle, begin, self._describe(), notes or Notes())
        return handle

    def _wait_at_gate(self) -> None:
        """An optimizer is about to change what may still have to be copied."""
        newest = self._committer.newest
        # A forked child has copies of the tensors.
        if newest is not None and os.getpid() == self._owner:
            newest.gate()

    def _describe(self) -> dict[str, Any]:
        progress = self.progress.state()
        progress["metrics"] = finite(self.progress.metrics)
        if progress["best"] is not None:
            progress |= finite({"best": progress["best"]})
        return self._description | {
            "devices": provenance.devices(),
            "parent": self._committer.parent,
            "progress": progress,
            "metrics": finite(self._reported),
        }

    def _tell_failure(self) -> None:
        """Raise the failure of the snapshot that was asked for last, once."""
        if self._committer.newest is not None:
            self._committer.newest.raise_failure()

    def _restore(self, snapshot: Snapshot, terms: Terms) -> None:
        rest = load_parts(snapshot, self._parts, terms, self._stager.engine)
        if "progress" in rest:
            self._go_on_at(rest["progress"], snapshot)
        for name, part in self._parts.items():
            # A loader whose position is not taken does not stand where progress does.
            restarts = name in terms.restart or ("progress" in rest and not terms.touches(name))
            begin_epoch = getattr(part, "begin_epoch", None)
            if restarts and begin_epoch is not None:
                begin_epoch()
                self.progress.batch = 0
        self._tell_config(snapshot)
        # Last: whatever is loaded before may draw.
        if "rng" in rest:
            rng.restore(rest["rng"])

    def _go_on_at(self, progress: object, snapshot: Snapshot) -> None:
        try:
            self.progress.load(progress)
        except ValueError as error:
            raise CorruptError(f"the progress in {snapshot.path} is not valid: {error}") from None
        self._clock_start = time.monotonic() - self.progress.seconds
        self._reported = dict(snapshot.metrics)
        self._committer.parent = snapshot.manifest.id
        self._resumed = True

    def _tell_config(self, snapshot: Snapshot) -> None:
        config = self._description["config"]
        differences = provenance.differences(snapshot.manifest.metadata.get("config", {}), config)
        if config and differences:
            _log.warning(
                "the configuration is not that of %s: %s", snapshot.path, "; ".join(differences)
            )


class _Step:
    """See `Snapshotter.step`. One object serves every step."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        # Weak, as in _waiter.
        self._snapshotter = weakref.ref(snapshotter)
        self.samples = 0

    def __enter__(self) -> None:
        snapshotter = self._snapshotter()
        if snapshotter is not None:
            snapshotter._begin_step()
        self._span = trace.span("step")
        self._span.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._span.__exit__(kind, error, traceback)
        snapshotter = self._snapshotter()
        if snapshotter is None:
            return
        snapshotter._preemption.leave()
        if kind is None:
            snapshotter._finish_step(self.samples)
        else:
            snapshotter._mid_step = True


def _waiter(snapshotter: Snapshotter) -> Callable[[], None]:
    # Weak: in a cycle, a Snapshotter that is dropped would keep its writer lock.
    owner = weakref.ref(snapshotter)

    def wait() -> None:
        alive = owner()
        if alive is not None:
            alive._wait_at_gate()

    return wait


def _rule(which: str | os.PathLike[str], step: int | None, tag: str | None) -> Which:
    """The one rule that the arguments of `resume` name."""
    if (which != "newest") + (step is not None) + (tag is not None) > 1:
        raise ConfigError("resume takes one of which, step and tag")
    if step is not None:
        return Which.parse(f"step={step}", "step")
    if tag is not None:
        return Which.parse(f"tag={tag}", "tag")
    return Which.parse(which, "which")


def _release(
    committer: Committer,
    gate: Gate,
    stager: Stager,
    repository: Repository,
    events: EventLog,
    preemption: Preemption,
    owner: int,
) -> None:
    gate.close()
    # In a forked child the engine's threads do not exist and the lock is closed already.
    if os.getpid() != owner:
        return

    def release() -> None:
        committer.close()
        stager.close()
        events.close()
        repository.close()
        trace.write()

    preemption.close()
    if committer.is_current_thread():
        # A Snapshotter in a reference cycle, collected by the thread that commits its snapshot.
        threading.Thread(target=release, name="pysnap-release").start()
    else:
        release()
