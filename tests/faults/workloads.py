"""Real use of pysnap that writes a book as it goes: what the harnesses record, fail and kill."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from oracle import state_of
from shim import Shim

import pysnap
from pysnap import storage
from pysnap.errors import StorageError

REPOSITORY = Path("runs") / "gpt"
FILES = Path("files")

Note = Callable[[str, object], None]


class Writer:
    """A process with a Snapshotter. Before each snapshot it notes what it asks for, and after it
    what `wait()` said."""

    def __init__(
        self, folder: Path, note: Note, *, first: int = 1, last: int | None = None, workers: int = 1
    ) -> None:
        self._note = note
        self.error: BaseException | None = None
        """Why the last snapshot failed."""
        self._numbers = itertools.count(first)
        self._model = {name: tensor.clone() for name, tensor in state_of(0).items()}
        note("keep", last)
        self.snapshotter = pysnap.Snapshotter(
            folder / REPOSITORY,
            model=self._model,
            keep=pysnap.Keep(last=last),
            workers=workers,
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(pysnap.Error):
            self.snapshotter.close()

    def save(self, *, tag: str = "", advance: bool = True) -> int:
        """A step with a new state, and a snapshot of it; the attempt's number."""
        number = next(self._numbers)
        if advance:
            with self.snapshotter.step():
                self.fill(number)
        else:
            self.fill(number)
        self._note("asked", (number, self.snapshotter.progress.step, bool(tag)))
        handle = self.snapshotter.save(tag=tag or ())
        try:
            handle.wait()
        except Exception:
            self._note("failed", number)
        else:
            self._note("durable", number)
        self.error = handle.error
        return number

    def fill(self, number: int) -> None:
        """Make the state that of an attempt."""
        for name, tensor in state_of(number).items():
            self._model[name].copy_(tensor)


def new_repository(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note) as writer:
        writer.save()
        writer.save()


def retention(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note, last=2) as writer:
        for _ in range(4):
            writer.save()


def many_workers(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note, last=1, workers=4) as writer:
        for _ in range(3):
            writer.save()


def two_workers(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note, last=1, workers=2) as writer:
        for _ in range(2):
            writer.save()


def step_taken_again(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note, last=2) as writer:
        writer.save()
        writer.save()
        writer.save(advance=False)
        writer.snapshotter.resume(step=1)
        writer.save()
        writer.save()


def tags(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note, last=1) as writer:
        writer.save(tag="first")
        writer.save()
        writer.save(tag="third")
        writer.save()


def failed_between(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note, last=2) as writer:
        writer.save()
        for kind in ("fdatasync", "write", "pwrite", "close"):
            shim.fault("fail", errno.EIO, kind=kind, pattern="*/.partial-*")
            writer.save()
            shim.clear_faults()
        writer.save()
        writer.save()


def outcome_unknown(folder: Path, note: Note, shim: Shim) -> None:
    """The last sync of a commit fails, once, and again where it is cleaned up. All is kept: the
    next step may try the failed snapshot again, which would replace the first."""
    with Writer(folder, note) as writer:
        writer.save()
        for count in (1, 2):
            if count == 2:
                # That it was taken back is not synced either.
                note("undecided", 3)
            shim.fault("fail", errno.EIO, kind="fsync", pattern=f"*/{REPOSITORY}", count=count)
            writer.save()
            shim.clear_faults()
    with Writer(folder, note, first=4) as writer:
        writer.save()


def opened_again(folder: Path, note: Note, shim: Shim) -> None:
    with Writer(folder, note, last=2) as writer:
        writer.save()
        writer.save()
    with Writer(folder, note, first=3, last=2) as writer:
        writer.snapshotter.resume()
        writer.save()
        writer.save()


def dead_writers(folder: Path, note: Note, shim: Shim) -> None:
    """Writers that end where they must not, each followed by one that cleans up."""
    root = folder / REPOSITORY
    with Writer(folder, note, last=1) as writer:
        writer.save()
        partial = root / ".partial-00000000000000000000000000000000"
        storage.make_directory(partial)
        storage.write_file(partial / "0.pack", bytes(20_000))
    with Writer(folder, note, first=2, last=1) as writer, _ends_in_a_deletion():
        note("undecided", 1)
        writer.save()
    with Writer(folder, note, first=3, last=1) as writer:
        writer.save()


class _ends_in_a_deletion:
    """Retention gets as far as the rename and not to the sync behind it, as if it were killed."""

    def __enter__(self) -> None:
        self._sync = storage.sync_directory
        storage.sync_directory = self._stop

    def __exit__(self, *_: object) -> None:
        storage.sync_directory = self._sync

    def _stop(self, path: Path) -> None:
        if any(name.startswith(".trash-") for name in storage.list_directory(path)):
            raise StorageError(errno.EINTR, "the writer is killed here", str(path))
        self._sync(path)


def half_made_repository(folder: Path, note: Note, shim: Shim) -> None:
    """A writer ends when it has made the directories, and the next one finds them."""
    root = folder / REPOSITORY
    root.mkdir(parents=True)
    with Writer(folder, note) as writer:
        writer.save()


def streams_through(folder: Path, note: Note, shim: Shim) -> None:
    """A state that is larger than the staging memory."""
    model = {name: tensor.clone() for name, tensor in state_of(1).items()}
    note("keep", None)
    with pysnap.Snapshotter(
        folder / REPOSITORY, model=model, host_memory="32KiB", keep=pysnap.Keep(last=None)
    ) as snapshotter:
        with snapshotter.step():
            pass
        note("asked", (1, 1))
        snapshotter.save().wait()
        note("durable", 1)


def files(folder: Path, note: Note, shim: Shim) -> None:
    """Snapshots without a loop, in a directory that the user has made durable."""
    (folder / FILES).mkdir()
    storage.sync_directory(folder)
    for number in (1, 2, 3):
        note("asked", (number, number))
        pysnap.save(folder / FILES / f"{number}", {"model": state_of(number)})
        note("durable", number)


WORKLOADS: dict[str, Callable[[Path, Note, Shim], None]] = {
    workload.__name__: workload
    for workload in (
        *(new_repository, retention, many_workers, two_workers, step_taken_again, tags),
        *(
            failed_between,
            outcome_unknown,
            opened_again,
            dead_writers,
            half_made_repository,
            streams_through,
        ),
        files,
    )
}


def marks_to(shim: Shim) -> Note:
    """Notes go between the operations of the shim's log."""

    def note(what: str, value: object) -> None:
        shim.mark(json.dumps([what, value]))

    return note
