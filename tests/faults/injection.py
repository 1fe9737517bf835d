"""Every file operation of opening, resuming, saving, committing and deleting fails in every way,
and training goes on (README.md section 4)."""

from __future__ import annotations

import errno
import fnmatch
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oracle import Attempt, Book, go_on, is_state_of, kept, read_all, state_of
from shim import FOREVER, Operation, Shim
from workloads import REPOSITORY, Writer

import pysnap
from pysnap.repository import list_snapshots
from pysnap.verify import verify_snapshot

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS)
_LAST = 2
_STEPS = 3
_DELAY = 2000
_ASKED_AGAIN = frozenset(
    {"open", "read", "pread", "write", "pwrite", "fsync", "fdatasync", "fallocate", "ftruncate"}
)
"""Kinds of operations that are done again when a signal interrupts them."""


@dataclass(frozen=True)
class Injection:
    """A fault of the shim."""

    action: str
    argument: int = 0
    kind: str | None = None
    first: int = 1
    count: int = 1

    def __str__(self) -> str:
        what = os.strerror(self.argument) if self.action == "fail" else self.action
        often = "for ever from" if self.count == FOREVER else "at"
        return f"{what} {often} {self.kind or 'operation'} {self.first}"


def injections(
    operations: list[Operation], *, everything: bool
) -> Iterator[tuple[Operation, Injection]]:
    """Faults for every operation of a run without faults, with that operation; without
    `everything`, EIO for each, and the other errors in turn."""
    seen: dict[str, int] = {}
    before = ""
    others = itertools.cycle(ERRORS[1:])
    for number, operation in enumerate(operations, 1):
        kind = operation.kind
        seen[kind] = seen.get(kind, 0) + 1
        same, before = before == str(operation), str(operation)
        if kind == "readdir" and same:
            continue
        for error in ERRORS if everything else (errno.EIO,):
            yield operation, Injection("fail", error, first=number)
        for error in ERRORS if everything else (next(others),):
            yield operation, Injection("fail", error, first=number, count=FOREVER)
        for error in ERRORS if everything else (next(others),):
            yield operation, Injection("fail", error, kind=kind, first=seen[kind], count=FOREVER)
        yield operation, Injection("fail", errno.EINTR, first=number)
        if kind in ("write", "pwrite"):
            yield operation, Injection("short", first=number)
            yield operation, Injection("short", kind=kind, first=seen[kind], count=FOREVER)
            yield operation, Injection("zero", first=number)
            yield operation, Injection("zero", first=number, count=FOREVER)
        if everything:
            yield operation, Injection("delay", _DELAY, first=number)


class _Told(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Trial:
    """Something that is done below a directory, under one fault."""

    def __init__(self, shim: Shim, folder: Path) -> None:
        self._shim = shim
        self._folder = folder
        self._told = _Told()
        self._problems: list[str] = []
        self._errors: list[BaseException] = []

    def rehearse(self) -> list[Operation]:
        """The operations of a run without faults."""
        self._prepare()
        self._shim.start(self._folder)
        self._work()
        self._shim.stop()
        assert not self._errors and not self._told.lines, (self._errors, self._told.lines)
        return self._shim.log()

    def under(self, injection: Injection) -> list[str]:
        """What went wrong."""
        self._prepare()
        logger = logging.getLogger("pysnap")
        logger.addHandler(self._told)
        self._shim.start(self._folder)
        self._shim.fault(
            injection.action,
            injection.argument,
            kind=injection.kind,
            first=injection.first,
            count=injection.count,
        )
        try:
            self._work()
        finally:
            self._shim.stop()
            logger.removeHandler(self._told)
        for error in self._errors:
            if not isinstance(error, pysnap.Error):
                self._problems.append(f"{error!r} is no error of pysnap")
        if injection.action in ("delay", "short") and self._errors:
            self._problems.append(f"it failed: {self._errors}")
        self._check_told(injection)
        self._check(injection)
        return self._problems

    def _prepare(self) -> None:
        self._folder.mkdir()

    def _work(self) -> None:
        """Under the shim; clears the fault when it must have done its worst."""
        raise NotImplementedError

    def _check(self, injection: Injection) -> None:
        """What is there afterwards."""
        raise NotImplementedError

    def _check_told(self, injection: Injection) -> None:
        """Whoever looks at the errors and the log finds what the file system said."""
        if injection.action != "fail":
            return
        if injection.argument == errno.EINTR:
            self._check_asked_again()
            return
        failed = [
            operation
            for operation in _without_second_looks(self._shim.log())
            if operation.error == injection.argument and not self._is_harmless(operation)
        ]
        if not failed:
            return
        text = "\n".join([*map(str, self._errors), *self._told.lines])
        if os.strerror(injection.argument) not in text:
            self._problems.append(f"nobody is told of {failed[0]}; but: {text!r}")

    def _check_asked_again(self) -> None:
        """An interruption is no failure where a signal may well come while the disk is waited
        for."""
        for operation in self._shim.log():
            if operation.error == errno.EINTR and operation.kind in _ASKED_AGAIN and self._errors:
                self._problems.append(f"{operation} was not done again: {self._errors}")

    def _is_harmless(self, operation: Operation) -> bool:
        """Whether nobody needs to know: a link or text for people, faster reading, the end of
        reading."""
        name = os.path.basename(operation.path)
        return (
            operation.kind == "mmap"
            or "latest" in name
            or (name == ".writer" and operation.kind in ("chmod", "ftruncate", "pwrite", "close"))
            or (operation.kind == "close" and fnmatch.fnmatch(operation.path, "*/step-*/*.pack"))
        )


class File(Trial):
    """A snapshot without a loop, written and loaded."""

    def __init__(self, shim: Shim, folder: Path) -> None:
        super().__init__(shim, folder)
        self._path = folder / "step-1"
        self._written = False

    def _work(self) -> None:
        try:
            pysnap.save(self._path, state_of(1))
            self._written = True
            if not is_state_of(pysnap.load(self._path), 1):
                self._problems.append("another state was loaded")
        except Exception as error:
            self._errors.append(error)

    def _check(self, injection: Injection) -> None:
        there = os.path.lexists(self._path)
        if there != self._written and (self._written or injection.count != FOREVER):
            self._problems.append(f"written: {self._written}, there: {there}")
        for error in self._errors:
            if str(self._folder) not in str(error):
                self._problems.append(f"the error names no path: {error}")
        if not there:
            pysnap.save(self._path, state_of(1))
        if verify_snapshot(self._path).problems or not is_state_of(pysnap.load(self._path), 1):
            self._problems.append("what is there is not whole")


class Run(Trial):
    """A training run in a repository with two snapshots, or in none."""

    def __init__(self, shim: Shim, folder: Path, template: Path | None) -> None:
        super().__init__(shim, folder)
        self._root = folder / REPOSITORY
        self._template = template
        self._book = Book(last=_LAST)
        self._resumed_newest = False

    def _prepare(self) -> None:
        super()._prepare()
        if self._template is not None:
            self._root.parent.mkdir()
            shutil.copytree(self._template, self._root, symlinks=True)
            self._book.acked = [Attempt(1, 1), Attempt(2, 2)]

    def _note(self, what: str, value: object) -> None:
        if what == "asked":
            assert isinstance(value, tuple)
            self._book.flying = Attempt(*value)
        elif what == "durable":
            assert self._book.flying is not None
            self._book.acked.append(self._book.flying)
        elif what == "failed":
            assert isinstance(value, int)
            self._book.failed.add(value)

    def _work(self) -> None:
        writer = self._open(1)
        if writer is not None:
            with writer:
                self._resume(writer)
                for _ in range(_STEPS):
                    self._step(writer)
                self._repair(writer)
            return
        self._shim.clear_faults()
        writer = self._open(1)
        if writer is None:
            self._problems.append(f"it cannot be opened again: {self._errors[-1]}")
            return
        with writer:
            self._resume(writer)
            self._repair(writer)

    def _resume(self, writer: Writer) -> None:
        try:
            resumed = writer.snapshotter.resume()
        except Exception as error:
            self._errors.append(error)
            return
        if resumed is None and self._template is not None:
            self._problems.append("training began anew")
        self._resumed_newest = resumed is not None and resumed.step == 2

    def _open(self, first: int) -> Writer | None:
        try:
            return Writer(self._folder, self._note, first=first + len(self._book.acked), last=_LAST)
        except Exception as error:
            self._errors.append(error)
            return None

    def _step(self, writer: Writer) -> None:
        """Nothing that fails in the background may end the loop."""
        try:
            writer.save()
        except Exception as error:
            self._problems.append(f"the loop was stopped by {error!r}")
        if writer.error is not None:
            self._errors.append(writer.error)
            self._check_error(writer)

    def _check_error(self, writer: Writer) -> None:
        step = writer.snapshotter.progress.step
        error = writer.error
        if not isinstance(error, pysnap.StorageError):
            self._problems.append(f"the handle tells {error!r}")
        elif f"step {step}" not in str(error) or str(self._root) not in str(error):
            self._problems.append(f"the error names no path or step: {error}")
        elif not any(f"step {step}" in line for line in self._told.lines):
            self._problems.append(f"the log does not tell the failure of step {step}")

    def _repair(self, writer: Writer) -> None:
        """The cause is gone: the next snapshot works, without a restart."""
        self._shim.clear_faults()
        writer.save()
        if writer.error is not None:
            self._problems.append(f"the next snapshot does not work: {writer.error}")

    def _check(self, injection: Injection) -> None:
        listing = list_snapshots(self._root)
        present, problems = read_all(listing)
        self._problems += problems
        wanted = kept(self._book.acked, _LAST)
        self._problems += [f"lost: {number}" for number in sorted(wanted - set(present))]
        # With no end of errors, a snapshot of which nobody knows cannot be taken back.
        unknown = self._book.failed if injection.count == FOREVER else set()
        extra = set(present) - wanted - unknown
        self._problems += [f"there, and should not be: {number}" for number in sorted(extra)]
        book = Book(last=_LAST, acked=[Attempt(n, s.step) for n, s in reversed(present.items())])
        self._problems += go_on(self._root, book)

    def _is_harmless(self, operation: Operation) -> bool:
        """Also what was read again and was not missed, and looks at how much space there is."""
        name = os.path.basename(operation.path)
        reread = "/step-" in operation.path and (
            name == "manifest.json" or operation.kind in ("stat", "opendir", "readdir")
        )
        measuring = (operation.kind == "stat" and self._root.is_relative_to(operation.path)) or (
            operation.kind == "unlink" and name.startswith(".pysnap-")
        )
        return super()._is_harmless(operation) or measuring or (reread and self._resumed_newest)


def _without_second_looks(log: list[Operation]) -> Iterator[Operation]:
    """Python's file objects look again at what has just been looked at, and do without."""
    kinds: dict[int, str] = {}  # of the last operation on each descriptor, whoever came between
    for operation in log:
        again = operation.kind == "stat" and kinds.get(operation.descriptor) == "stat"
        if operation.descriptor >= 0:
            kinds[operation.descriptor] = operation.kind
        if not again:
            yield operation


def make_template(folder: Path) -> Path:
    """A repository with two snapshots."""
    with Writer(folder, lambda what, value: None, last=_LAST) as writer:
        writer.save()
        writer.save()
    return folder / REPOSITORY
