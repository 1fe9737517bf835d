"""What must be in a repository, by the harness's own book, which it keeps outside of it.

A snapshot that is asked for is an attempt; its number is the seed of the state that is stored, so
that every bit of what comes back is known.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import pysnap
from pysnap.repository import Listing, Snapshot, list_snapshots
from pysnap.verify import verify_snapshot

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import bits


@functools.cache
def state_of(number: int) -> dict[str, torch.Tensor]:
    """The state of an attempt; not to be changed."""
    generator = torch.Generator().manual_seed(number)
    return {
        "number": torch.tensor(number),
        "weight": torch.randn(96, 64, generator=generator),
        "moment": torch.randn(96, 64, generator=generator).to(torch.bfloat16),
        "table": torch.randint(0, 2**40, (512,), generator=generator),
    }


@functools.cache
def _bits_of(number: int) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in state_of(number).items()}


def is_state_of(state: dict[str, torch.Tensor], number: int) -> bool:
    """Whether it is that state, bit for bit."""
    return {name: bits(tensor) for name, tensor in state.items()} == _bits_of(number)


@dataclass(frozen=True)
class Attempt:
    """A snapshot that was asked for."""

    number: int
    step: int
    tagged: bool = False


def kept(attempts: Sequence[Attempt], last: int | None) -> set[int]:
    """What retention keeps of durable snapshots, oldest first, written down a second time."""
    newest_of_step = {attempt.step: attempt.number for attempt in attempts}
    current = [a.number for a in attempts if newest_of_step[a.step] == a.number]
    tagged = {attempt.number for attempt in attempts if attempt.tagged}
    return set(current if last is None else current[-last:]) | tagged


@dataclass
class Book:
    """What was asked for, and what `wait()` said about it."""

    last: int | None = None
    """The argument of Keep."""
    acked: list[Attempt] = field(default_factory=list)
    flying: Attempt | None = None
    failed: set[int] = field(default_factory=set)
    undecided: set[int] = field(default_factory=set)
    """Nobody knows whether they are there: whoever deleted them, or took them back, got no end."""

    def note(self, mark: str) -> None:
        """Take over a note that `Writer` made between two operations."""
        what, value = json.loads(mark)
        if what == "keep":
            self.last = value
        elif what == "asked":
            self.flying = Attempt(*value)
        elif what == "undecided":
            self.undecided.add(value)
        else:
            assert self.flying is not None and self.flying.number == value
            if what == "durable":
                self.acked.append(self.flying)
            else:
                self.failed.add(value)
            self.flying = None

    def bounds(self, present: set[int]) -> tuple[set[int], set[int]]:
        """What must be there and what may, in the light of what is."""
        before = kept(self.acked, self.last)
        if self.flying is None:
            return before - self.undecided, before | self.undecided
        after = kept([*self.acked, self.flying], self.last)
        committed = self.flying.number in present
        must = before & after if committed else before
        return must - self.undecided, (before | after if committed else before) | self.undecided


def examine(root: Path, book: Book) -> list[str]:
    """What a repository that was left at some moment has and must not have, or the reverse."""
    try:
        listing = list_snapshots(root)
    except pysnap.NotFoundError as error:
        return [f"acknowledged snapshots are gone: {error}"] if book.acked else []
    except pysnap.Error as error:
        return [f"it cannot be listed: {error}"]
    present, problems = read_all(listing)
    must, may = book.bounds(set(present))
    problems += [f"acknowledged, and not there: {number}" for number in sorted(must - set(present))]
    problems += [f"there, and may not be: {number}" for number in sorted(set(present) - may)]
    if listing.snapshots and not problems and next(iter(present)) != max(present):
        problems.append(f"the newest is {next(iter(present))}, not {max(present)}")
    return problems


def _read(snapshot: Snapshot) -> tuple[int, list[str]]:
    """Number of the attempt that a snapshot is of, and what is wrong with it."""
    problems = [f"{snapshot.path.name}: {what}" for what in verify_snapshot(snapshot.path).problems]
    try:
        state = pysnap.load(snapshot.path)["model"]
    except pysnap.Error as error:
        return -1, [*problems, f"{snapshot.path.name} cannot be loaded: {error}"]
    number = int(state["number"])
    if not is_state_of(state, number):
        problems.append(f"{snapshot.path.name} is not the state of attempt {number}")
    return number, problems


def read_all(listing: Listing) -> tuple[dict[int, Snapshot], list[str]]:
    """What is listed, newest first, by the number of its attempt, and what is wrong with it."""
    problems = [f"{path.name} is reported as damaged: {error}" for path, error in listing.damaged]
    present = {}
    for snapshot in listing.snapshots:
        number, found = _read(snapshot)
        problems += found
        present[number] = snapshot
    return present, problems


def examine_files(folder: Path, book: Book) -> list[str]:
    """The same of a directory in which `pysnap.save` has made one snapshot per attempt."""
    names = {name for name in os.listdir(folder) if not name.startswith(".")}
    problems = []
    for name in sorted(names):
        number, found = _read(Snapshot.open(folder / name))
        problems += found if number == int(name) else [f"{name} is attempt {number}", *found]
    must = {str(attempt.number) for attempt in book.acked}
    may = must | ({str(book.flying.number)} if book.flying else set())
    problems += [f"acknowledged, and not there: {name}" for name in sorted(must - names)]
    return problems + [f"there, and may not be: {name}" for name in sorted(names - may)]


def numbers(listing: Listing) -> list[int]:
    """The attempts of what is listed, newest first."""
    return [
        int(pysnap.load(snapshot.path, only=["model/number"])["model"]["number"])
        for snapshot in listing.snapshots
    ]


def go_on(root: Path, book: Book) -> list[str]:
    """What is wrong when a new process resumes there and takes one more snapshot."""
    before = [] if not (root / ".pysnap").exists() else numbers(list_snapshots(root))
    model = {name: torch.zeros_like(tensor) for name, tensor in state_of(0).items()}
    fresh = 1_000_000
    problems = []
    try:
        with pysnap.Snapshotter(root, model=model, keep=pysnap.Keep(last=book.last)) as snapshotter:
            resumed = snapshotter.resume()
            if (resumed is None) != (not before):
                problems.append(f"resume gave {resumed} where {before} are there")
            if resumed is not None and not is_state_of(model, before[0]):
                problems.append("what was resumed is not the newest state")
            step = snapshotter.progress.step + 1
            for name, tensor in state_of(fresh).items():
                model[name].copy_(tensor)
            with snapshotter.step():
                pass
            snapshotter.save().wait()
    except pysnap.Error as error:
        return [*problems, f"it cannot be gone on with: {error}"]
    problems += [f"{name} is left over" for name in leftovers(root)]
    listing = list_snapshots(root)
    after = numbers(listing)
    if not after or after[0] != fresh or listing.snapshots[0].step != step:
        problems.append(f"the new snapshot is not the newest of {after}")
    return problems + [f"{path.name}: {error}" for path, error in listing.damaged]


def leftovers(root: Path) -> list[str]:
    """What a writer that was killed left, and the next one must remove."""
    beginnings = (".partial-", ".trash-", ".pysnap-", ".latest-")
    return [name for name in os.listdir(root) if name.startswith(beginnings)]


def silence() -> None:
    """No log on the terminal: in a harness, thousands of failures are told."""
    logging.getLogger("pysnap").addHandler(logging.NullHandler())
    logging.getLogger("pysnap").propagate = False
