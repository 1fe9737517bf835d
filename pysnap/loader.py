"""Data loaders that go on at the batch at which a snapshot was taken.

`resumable(DataLoader(...))` gives a plain DataLoader, over a map-style or an iterable dataset,
`state_dict()` and `load_state_dict()`. It delivers the same batches and draws the same random
numbers as the DataLoader itself. A StatefulDataLoader of torchdata has both methods already;
`as_part` corrects what they leave out.

**What the state holds.** The position is the number of batches delivered to the caller in the
current epoch; batches that were only prefetched do not count. With it go the random states from
which the sampler drew this epoch's order, the present states of the generators that the loader
and its samplers own, and a fingerprint of the loader. The global generators of Python, NumPy and
torch are not in it: whoever saves the state saves them, *after* `state_dict()`, and restores them.

**How it goes on.** The first `iter()` after `load_state_dict()` lets the sampler draw again what
it had drawn, from the random states that it had then, loads nothing of what was delivered, and
puts every random state back. A checksum of the drawn indices shows whether the sampler repeated
itself; if it did not, `iter()` raises MismatchError. So a sampler has to be a function of its
arguments, of `set_epoch`, and of random generators: the global ones, or such as are attributes of
it. Other state that a sampler keeps from one epoch to the next is its owner's to save.

**An IterableDataset** has no indices to pass over, so that the first `iter()` makes the delivered
batches again and drops them: it costs the reading of what is passed over, by as many workers. They
are made under the random states that they were made under, in workers from the same seeds, and by
calls of the same functions in the same order. So the rest is exact:

- with workers, whatever draws random numbers there, the order, the items or `collate_fn`;
- without workers, what the dataset draws before its first item, or from generators of its own
  (its attributes, or made in `__iter__`), and the random augmentation of items. An order that is
  drawn in mid-epoch from a generator that training draws from too is not repeated, and no checksum
  shows it: the items would have to be equal, augmentation included.

Other state that the dataset keeps is its owner's to save, and so is what persistent workers keep
from one epoch to the next, which is also their random generators: after the first epoch with such
workers, what draws from these is not repeated. The order of batches depends on the number of
workers, which therefore may not change. A dataset with a `state_dict` of its own that is expensive
to pass over needs the StatefulDataLoader of torchdata.

**When an epoch is over.** Three rules, by the place at which the snapshot is taken:

1. *Inside the loop over the loader.* The next `iter()` yields the rest of the epoch, which after
   the last batch is nothing at all; the `iter()` after it is the next epoch.
2. *After the loop, where epochs are declared by `begin_epoch()`* (`Snapshotter.epochs()` does it).
   The loop belongs to the declared epoch until the next one is declared. A run that goes on in the
   same epoch therefore passes over the loop once (an empty rest) and goes on behind it. A loop that
   began inside the loop over another resumable loader, as a validation every thousand steps does,
   begins anew: the run goes on in the outer loop, and will need the inner one whole.
3. *After the loop, without declared epochs.* The epoch is over: the next `iter()` is the next one.

Whoever declares epochs calls `begin_epoch()` on every part that has it whenever the epoch counter
moves on, the first epoch of a fresh run included, and before any snapshot that records the new
number; but not when a run goes on in the epoch of a loaded snapshot. A plain
`for epoch in range(first, n)` starts at the interrupted epoch if the snapshot was taken inside the
inner loop, and at the epoch after it if it was taken behind the inner loop.

A `break` leaves the position where it is: until the next `iter()` or `begin_epoch()`, a snapshot
goes on behind the last delivered batch.

Batches are exact with any number of workers. Random numbers that a map-style *dataset* draws are
exact without workers; in worker processes they are seeded anew for the rest of an interrupted
epoch, and after a resume with persistent workers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import operator
import random
import threading
import weakref
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from pysnap.devices import cuda_in_use
from pysnap.errors import ConfigError, FormatError, MismatchError

__all__ = ["ResumableLoader", "StatefulLoaderPart", "as_part", "resumable"]

_FORMAT = 1
_IDLE, _RUNNING, _ENDED = "idle", "running", "ended"

_log = logging.getLogger("pysnap")


# Random states


@dataclass(frozen=True)
class _Source:
    """One random generator, read and written as bytes."""

    get: Callable[[], bytes]
    set: Callable[[bytes], object]


_Sources = dict[str, _Source]


def _torch_source(
    get: Callable[[], torch.Tensor], put: Callable[[torch.Tensor], object]
) -> _Source:
    return _Source(
        lambda: get().numpy().tobytes(),
        # from_numpy makes a CPU tensor whatever the default device is.
        lambda state: put(torch.from_numpy(np.frombuffer(state, dtype=np.uint8).copy())),
    )


def _python_source(
    get: Callable[[], tuple[Any, ...]], put: Callable[[tuple[Any, ...]], None]
) -> _Source:
    def write(state: bytes) -> None:
        version, words, gauss = json.loads(state)
        put((version, tuple(words), gauss))

    return _Source(lambda: json.dumps(get()).encode(), write)


def _numpy_source(get: Callable[[], Any], put: Callable[[Any], object]) -> _Source:
    return _Source(
        lambda: json.dumps(get(), default=lambda value: value.tolist()).encode(),
        lambda state: put(json.loads(state)),
    )


def _global_sources() -> _Sources:
    sources = {
        "torch": _torch_source(torch.get_rng_state, torch.set_rng_state),
        "python": _python_source(random.getstate, random.setstate),
        "numpy": _numpy_source(lambda: np.random.get_state(legacy=False), np.random.set_state),
    }
    device = torch.get_default_device()
    if device.type == "cuda":
        sources["torch.cuda"] = _torch_source(
            lambda: torch.cuda.get_rng_state(device),
            lambda state: torch.cuda.set_rng_state(state, device),
        )
    return sources


def _source_of(value: object) -> _Source | None:
    """The source that `value` is; None where it is not a random generator with a state."""
    if isinstance(value, torch.Generator):
        return _torch_source(value.get_state, value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _python_source(value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        legacy = value
        return _numpy_source(lambda: legacy.get_state(legacy=False), legacy.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator

        def write(state: Any) -> None:
            bits.state = state

        return _numpy_source(lambda: bits.state, write)
    return None


def _cuda_sources() -> _Sources:
    """The generator of every CUDA device; none before the first use of CUDA."""
    if not cuda_in_use():
        return {}

    def source(index: int) -> _Source:
        return _torch_source(
            lambda: torch.cuda.get_rng_state(index),
            lambda state: torch.cuda.set_rng_state(state, index),
        )

    return {f"cuda:{index}": source(index) for index in range(torch.cuda.device_count())}


def _owned_sources(loader: DataLoader[Any], *also: str) -> _Sources:
    """The generators that `loader`, its samplers and its attributes `also` have, by dotted name."""
    sources: _Sources = {}
    seen: set[int] = set()

    def visit(name: str, value: object) -> None:
        if id(value) in seen:
            return
        source = _source_of(value)
        if source is not None:
            seen.add(id(value))
            sources[name] = source
        elif isinstance(value, (Sampler, IterableDataset)) or name.rpartition(".")[2] in (
            "sampler",
            "batch_sampler",
        ):
            seen.add(id(value))
            for attribute, held in getattr(value, "__dict__", {}).items():
                visit(f"{name}.{attribute}", held)

    for name in ("generator", "batch_sampler", "sampler", *also):
        visit(name, getattr(loader, name))
    return sources


def _owned_by(loader: DataLoader[Any]) -> Callable[[], _Sources]:
    """What gives the generators of `loader` and, of an iterable dataset, those it has by now.

    One that the dataset makes when it is iterated is left out: it is made again.
    """
    if not isinstance(loader.dataset, IterableDataset):
        return lambda: _owned_sources(loader)
    known = frozenset(_owned_sources(loader, "dataset"))

    def owned() -> _Sources:
        sources = _owned_sources(loader, "dataset")
        return {name: source for name, source in sources.items() if name in known}

    return owned


def _read(sources: _Sources) -> dict[str, bytes]:
    return {name: source.get() for name, source in sources.items()}


def _write(sources: _Sources, states: Mapping[str, bytes]) -> None:
    for name, state in states.items():
        try:
            sources[name].set(state)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise MismatchError(
                f"the saved state of the data loader's random generator '{name}' cannot be set "
                f"({type(error).__name__}: {error}); build the loader and its samplers as they "
                "were, or resume without the loader"
            ) from error


@contextlib.contextmanager
def _kept(sources: _Sources) -> Iterator[None]:
    """Whatever is drawn inside, `sources` are afterwards what they were before."""
    before = _read(sources)
    try:
        yield
    finally:
        _write(sources, before)


# What a pass over the data draws


def _canonical(index: Any) -> object:
    """`index` reduced to what is equal in every process: a repr may hold an address."""
    if index is None or isinstance(index, (bool, str, bytes, float)):
        return index
    if isinstance(index, (list, tuple)):
        return [_canonical(item) for item in index]
    if isinstance(index, (torch.Tensor, np.ndarray, np.generic)):
        return index.tolist()
    if isinstance(index, SupportsIndex):
        return operator.index(index)
    return type(index).__name__


def _digest(index: Any, digest: int) -> int:
    """CRC-32 over everything drawn so far; `index` is one index or a batch of them."""
    try:
        return zlib.crc32(array("q", index if type(index) in (list, tuple) else (index,)), digest)
    except (TypeError, ValueError, OverflowError):
        return zlib.crc32(repr(_canonical(index)).encode(), digest)


@dataclass(frozen=True)
class _Position:
    """Where an epoch stands, and how to draw again what was drawn in it."""

    delivered: int  # batches
    drawn: int  # index batches; more than were delivered where workers prefetch
    exhausted: bool  # the sampler has said that it has no more
    digest: int  # of all that was drawn; 0 for an iterable dataset
    random: dict[str, bytes]  # before iter(sampler)
    random_first: dict[str, bytes] | None  # what differs at the first draw; None: nothing drawn
    epoch: int | None  # the `epoch` of the sampler or the iterable dataset


@dataclass
class _Record:
    """How far a pass has come, and how to repeat it.

    It does not hold the iterator: workers must end when a `break` abandons that.
    """

    random: dict[str, bytes]
    random_first: dict[str, bytes] | None = None
    requests: int = 0
    drawn: int = 0
    exhausted: bool = False
    digest: int = 0


class _Draws(Iterator[Any]):
    """One pass over the index sampler, with what it takes to repeat it up to any point."""

    def __init__(self, drawn_from: Iterable[Any], sources: _Sources) -> None:
        self._sources = sources
        self.record = _Record(_read(sources))
        self._drawn_from = iter(drawn_from)
        self._ahead: deque[Any] = deque()

    @classmethod
    def repeat(cls, drawn_from: Iterable[Any], sources: _Sources, position: _Position) -> _Draws:
        """The pass as it was at `position`; every source stays as it was before the call.

        `drawn` or `digest` differs from that of `position` if it was not possible to repeat it.
        """
        with _kept(sources):
            _write(sources, position.random)
            draws = cls(drawn_from, sources)
            draws.record.random_first = position.random_first
            if position.random_first is not None:
                _write(sources, {**position.random, **position.random_first})
            for item in islice(draws._drawn_from, position.drawn):
                draws._note(item)
                if draws.record.drawn > position.delivered:
                    draws._ahead.append(item)
            draws.record.exhausted = position.exhausted
        return draws

    def __next__(self) -> Any:
        if not self._ahead and not self.record.exhausted:
            self._draw()
        # Not before: a draw that failed is not answered, and what comes next takes its place.
        self.record.requests += 1
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft()

    def _draw(self) -> None:
        record = self.record
        if record.random_first is None:
            now = _read(self._sources)
            record.random_first = {
                name: now[name] for name in now if now[name] != record.random[name]
            }
        try:
            item = next(self._drawn_from)
        except StopIteration:
            record.exhausted = True
            return
        self._note(item)
        self._ahead.append(item)

    def _note(self, item: Any) -> None:
        self.record.drawn += 1
        self.record.digest = _digest(item, self.record.digest)


class _BatchDraws(_Draws):
    """One pass over the batches themselves: an iterable dataset has no indices to draw."""

    def _note(self, item: Any) -> None:
        # No digest: what is drawn at random in a batch need not repeat for the order to repeat.
        self.record.drawn += 1


class _PassOver:
    """Stands in for the `collate_fn` of an iterable dataset that passes over delivered batches.

    The first `batches` of a process are made as they were, for the sake of the random numbers that
    `collate` draws, and are then dropped where they are: only None travels to the trainer.
    """

    def __init__(self, collate: Callable[[Any], Any], batches: int) -> None:
        self._collate = collate
        self._batches = batches

    def __call__(self, items: Any) -> Any:
        batch = self._collate(items)
        if self._batches == 0:
            return batch
        self._batches -= 1
        return None


class _Recorder:
    """Stands in for the index sampler of a DataLoader and keeps the latest pass over it."""

    def __init__(self, sampler: Any, sources: Callable[[], _Sources]) -> None:
        self.sampler = sampler
        self._sources = sources
        self.prepared: _Draws | None = None  # handed out in place of a new pass
        self.latest: _Draws | None = None

    def new_pass(self) -> _Draws:
        return _Draws(self.sampler, self._sources())

    def repeated_pass(self, position: _Position) -> _Draws:
        return _Draws.repeat(self.sampler, self._sources(), position)

    def __iter__(self) -> Iterator[Any]:
        self.latest = self.new_pass() if self.prepared is None else self.prepared
        return self.latest

    def __len__(self) -> int:
        return len(self.sampler)


# The loader


class _Epoch:
    """An epoch that this process iterates."""

    def __init__(
        self, record: _Record, *, delivered: int, nested: bool, sampler_epoch: int | None
    ) -> None:
        self.nested = nested
        self.delivered = delivered
        self._record = record
        self._sampler_epoch = sampler_epoch
        # A DataLoader asks for one more index with every batch, whatever it asked for at first,
        # and also with a batch that it then fails to load.
        self._ahead = record.requests - delivered

    def count(self) -> None:
        """Notes that a batch was delivered."""
        self.delivered = self._record.requests - self._ahead

    def position(self) -> _Position:
        record = self._record
        return _Position(
            delivered=self.delivered,
            drawn=record.drawn,
            exhausted=record.exhausted,
            digest=record.digest,
            random=record.random,
            random_first=record.random_first,
            epoch=self._sampler_epoch,
        )


class _Batches(Iterator[Any]):
    """The iterator that the caller holds; counts what it delivers."""

    def __init__(self, owner: ResumableLoader, epoch: _Epoch, batches: Iterator[Any]) -> None:
        self._owner = owner
        self._epoch: _Epoch | None = epoch  # None: ended
        self._batches = batches
        self._entered = False
        self._began = next(_moments)

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            if self._epoch is not None:
                self._owner._end(self._epoch)
                self._epoch = None
            raise
        if self._epoch is not None:
            self._entered = True
            self._epoch.count()
            self._owner._deliver(self._epoch)
        return batch

    def encloses(self, other: ResumableLoader) -> bool:
        """Whether a loop over `other` that begins now begins inside the loop over this one."""
        # Not yet entered are the others of zip(a, b), which run side by side. One that began before
        # the epoch of the other was left by a `break`, and somebody still holds it.
        return (
            self._owner is not other
            and self._epoch is not None
            and self._entered
            and self._began > other._declared_at
        )


# Numbers what happens to loaders, in order.
_moments = count()
# The iterators in use. It keeps none alive: one that a `break` abandons is gone from it.
_in_use: weakref.WeakSet[_Batches] = weakref.WeakSet()
_in_use_lock = threading.Lock()


class ResumableLoader:
    """A DataLoader that saves its position and goes on there; made by `resumable`.

    Iterate it in place of the DataLoader. `iter()` begins a new epoch, or goes on in the one whose
    state was loaded; it then raises MismatchError if the sampler or the iterable dataset does not
    repeat the order of that epoch. The position counts what was delivered to the one who iterates:
    whoever fetches batches ahead of the training step must subtract them. One thread at a time.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        _check(loader)
        self.loader = loader
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._is_iterable = isinstance(loader.dataset, IterableDataset)
        self._owned = owned = _owned_by(loader)
        # Not a method: in a cycle with this object, workers would outlive it.
        self._sources: Callable[[], _Sources] = lambda: {**_global_sources(), **owned()}
        self._recorder = _Recorder(sampler, self._sources)
        self._phase = _IDLE
        self._epoch: _Epoch | None = None  # the one that iter() began last
        self._rest: _Position | None = None  # loaded, and not gone on with yet
        self._empty_rest = False
        self._declared = False
        self._declared_at = next(_moments)
        self._workers: Any = None  # the iterator that owns the persistent workers
        self._had_workers = False  # in the run whose state was loaded

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        return self.loader.batch_size

    @property
    def drop_last(self) -> bool:
        return self.loader.drop_last

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        return self.loader.batch_sampler

    @property
    def num_workers(self) -> int:
        return self.loader.num_workers

    def __len__(self) -> int:
        """Batches of a whole epoch, also where only the rest of one is left."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self._empty_rest:
            self._empty_rest = False
            _log.info("the data loader passes over an epoch that was complete when it was saved")
            return iter(())
        with _in_use_lock:
            nested = any(batches.encloses(self) for batches in _in_use)
        rest = self._rest
        # Asked before: an iterable dataset may count its epochs in __iter__.
        epoch = _epoch_of(self.loader)
        inner, record = self._iterate_batches(rest) if self._is_iterable else self._iterate(rest)
        self._rest = None
        self._epoch = _Epoch(
            record,
            delivered=0 if rest is None else rest.delivered,
            nested=nested,
            sampler_epoch=epoch,
        )
        self._phase = _RUNNING
        batches = _Batches(self, self._epoch, inner)
        with _in_use_lock:
            _in_use.add(batches)
        return batches

    def begin_epoch(self) -> None:
        """Declares that the next `iter()` is a new epoch, and drops the position, finished or not.

        An iterator that is still in use is not disturbed: its next batch is the position again.
        """
        self._declared = True
        self._declared_at = next(_moments)
        self._phase = _IDLE
        self._rest = None
        self._empty_rest = False

    def state_dict(self) -> dict[str, Any]:
        """The position: dict, str, bytes, int, bool and None, nested. Draws no random number."""
        position = self._rest
        if position is None and self._phase == _RUNNING and self._epoch is not None:
            position = self._epoch.position()
        return {
            "format": _FORMAT,
            "fingerprint": self._fingerprint(),
            "declared": self._declared,
            "workers": self._had_workers or self._workers is not None,
            "generators": _read(self._owned()),
            "phase": self._phase,
            "position": None if position is None else asdict(position),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises what `load_state_dict` would raise for a loader that is not as it was."""
        _check_format(state)
        self._compare(_entry(state, "fingerprint", dict))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the position of `state` and sets the generators that the loader owns.

        The next `iter()` goes on there. Raises FormatError for a state of another version, and
        MismatchError, which names every difference, for a loader that is not as it was; nothing
        has been changed then. The number of workers may differ, except for an iterable dataset.
        """
        self.check_state_dict(state)
        declared = _entry(state, "declared", bool)
        workers = _entry(state, "workers", bool)
        generators = _entry(state, "generators", dict)
        phase = _entry(state, "phase", str)
        position = _entry(state, "position", dict, type(None))
        rest = None if position is None else _position_from(position)
        if phase not in (_IDLE, _RUNNING, _ENDED) or (phase == _RUNNING) != (rest is not None):
            raise _unreadable("phase", phase)

        _write(self._owned(), generators)
        self._declared = declared
        self._declared_at = next(_moments)
        # Those of this process have run on from another position.
        self._workers = None
        self._had_workers = workers
        self._phase = phase
        self._rest = rest
        self._empty_rest = phase == _ENDED
        self._epoch = None

    def _iterate(self, rest: _Position | None) -> tuple[Iterator[Any], _Record]:
        """The DataLoader's iterator over a new pass, or over what `rest` leaves of one."""
        recorder = self._recorder
        clone = copy.copy(self.loader)
        # DataLoader refuses the plain assignment.
        vars(clone)["sampler" if clone.batch_sampler is None else "batch_sampler"] = recorder
        clone._iterator = self._workers
        recorder.latest = None
        if rest is not None:
            recorder.prepared = self._repeat(rest)
        elif self._had_workers and clone.persistent_workers and self._workers is None:
            # The saved run has its workers by now, and draws nothing to start them.
            recorder.prepared = recorder.new_pass()
        if recorder.prepared is not None:
            prepared = recorder.prepared.record
            # A DataLoader draws a seed for its workers; here not from a generator of the run.
            seed = zlib.crc32(prepared.random["torch"], prepared.drawn)
            clone.generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        try:
            batches = iter(clone)
        finally:
            recorder.prepared = None
        if recorder.latest is None:
            raise ConfigError(
                f"{type(self.loader).__name__} does not take its indices from its sampler, so "
                "pysnap.resumable cannot follow it; give the class state_dict and load_state_dict"
            )
        self._workers = clone._iterator
        return batches, recorder.latest.record

    def _iterate_batches(self, rest: _Position | None) -> tuple[Iterator[Any], _Record]:
        """The same over an iterable dataset, which makes again what of `rest` was delivered."""
        sources = self._sources()
        clone = copy.copy(self.loader)
        clone._iterator = self._workers
        draws: _Draws
        if rest is not None:
            draws = self._repeat_batches(clone, sources, rest)
        elif self._had_workers and clone.persistent_workers and self._workers is None:
            # As in _iterate: the saved run draws nothing here.
            with _kept(sources):
                draws = _BatchDraws(clone, sources)
        else:
            draws = _BatchDraws(clone, sources)
        self._workers = clone._iterator
        return draws, draws.record

    def _repeat(self, rest: _Position) -> _Draws:
        draws = self._recorder.repeated_pass(rest)
        if (draws.record.drawn, draws.record.digest) != (rest.drawn, rest.digest):
            raise _not_repeated(
                f"the sampler {type(self._recorder.sampler).__name__}",
                rest,
                _other_epoch(self.loader, rest)
                or "build it as it was; if it draws during the epoch from a random generator "
                "that others draw from too, give it one of its own",
            )
        return draws

    def _repeat_batches(self, clone: DataLoader[Any], sources: _Sources, rest: _Position) -> _Draws:
        name = f"the dataset {type(clone.dataset).__name__}"
        reason = _other_epoch(clone, rest)
        if reason is not None:
            raise _not_repeated(name, rest, reason)
        _log.info("the data loader reads %d batches again to pass over them", rest.delivered)
        # The workers take turns, so that each has delivered so many, unless it came to its end.
        batches = rest.delivered // max(1, clone.num_workers)
        clone.collate_fn = _PassOver(clone.collate_fn, batches)
        # Indices are drawn on the host; a dataset may draw anywhere.
        with _kept(_cuda_sources()):
            draws = _BatchDraws.repeat(clone, sources, rest)
        if draws.record.drawn != rest.drawn:
            reason = f"it ended after batch {draws.record.drawn}: give it the data that it had"
            raise _not_repeated(name, rest, reason)
        return draws

    def _deliver(self, epoch: _Epoch) -> None:
        if epoch is self._epoch:
            self._phase = _RUNNING

    def _end(self, epoch: _Epoch) -> None:
        if epoch is self._epoch:
            self._phase = _ENDED if self._declared and not epoch.nested else _IDLE
            self._epoch = None

    def _fingerprint(self) -> dict[str, Any]:
        loader = self.loader
        common = {
            "dataset length": _length(loader.dataset),
            "batch size": loader.batch_size,
            "drop_last": loader.drop_last,
            "generators": ", ".join(self._owned()),
        }
        if self._is_iterable:
            # Not the number of batches: a DataLoader that was asked for it may warn of it later.
            return {
                **common,
                "dataset": type(loader.dataset).__name__,
                "number of workers": loader.num_workers,
            }
        return {
            **common,
            "sampler": type(loader.sampler).__name__,
            "batch sampler": type(loader.batch_sampler).__name__,
            "number of batches": _length(loader),
        }

    def _compare(self, before: dict[str, Any]) -> None:
        now = self._fingerprint()
        differences = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in dict.fromkeys([*now, *before])
            if before.get(name) != now.get(name)
        ]
        if differences:
            raise MismatchError(
                f"the data loader does not fit its saved state: {'; '.join(differences)}; "
                "build it as it was, or resume without it"
            )


def resumable(loader: DataLoader[Any]) -> ResumableLoader:
    """`loader` with `state_dict()` and `load_state_dict()`: iterate the result in its place.

    Takes a DataLoader over a map-style dataset with any sampler, batch size and number of workers,
    or over an IterableDataset, where going on costs the reading of what was delivered: the module
    states what is exact. Raises ConfigError for what cannot go on exactly: an IterDataPipe,
    `in_order=False`, a subclass that iterates in its own way.
    """
    return ResumableLoader(loader)


def _check(loader: object) -> None:
    name = type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise ConfigError(f"pysnap.resumable takes a torch DataLoader, not a {name}")
    if hasattr(loader, "state_dict"):
        raise ConfigError(f"{name} has a state_dict of its own: use it without pysnap.resumable")
    # A torch without data pipes has no loader over one.
    if isinstance(loader.dataset, getattr(torch.utils.data, "IterDataPipe", ())):
        raise ConfigError(
            "pysnap.resumable cannot follow an IterDataPipe, which has a state and seeds of its "
            "own: make it an IterableDataset, or use StatefulDataLoader of "
            "torchdata.stateful_dataloader, which pysnap takes as it is"
        )
    # torch before 2.6 has no in_order.
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        raise ConfigError(
            "a DataLoader with in_order=False has an order that cannot be repeated: "
            "leave in_order out to make it resumable"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"{name} iterates in its own way, which pysnap.resumable cannot follow: give the class "
            "state_dict and load_state_dict, or use a plain DataLoader"
        )


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _epoch_of(loader: DataLoader[Any]) -> int | None:
    """What set_epoch told the sampler or the iterable dataset, where that is kept as `epoch`."""
    is_iterable = isinstance(loader.dataset, IterableDataset)
    told = (loader.dataset,) if is_iterable else (loader.batch_sampler, loader.sampler)
    for value in told:
        epoch = getattr(value, "epoch", None)
        if type(epoch) is int:
            return epoch
    return None


def _other_epoch(loader: DataLoader[Any], rest: _Position) -> str | None:
    """What to do about an epoch that is not the one of `rest`; None where it is."""
    epoch = _epoch_of(loader)
    if epoch == rest.epoch:
        return None
    return f"its epoch was {rest.epoch} and is {epoch}: call set_epoch({rest.epoch})"


def _not_repeated(what: str, rest: _Position, reason: str) -> MismatchError:
    return MismatchError(
        f"{what} does not repeat the order of the saved epoch, so that it cannot go on after batch "
        f"{rest.delivered}; {reason}"
    )


# Reading a state


def _unreadable(name: str, value: object) -> MismatchError:
    return MismatchError(
        f"the data loader's saved state has no readable '{name}' ({value!r:.40}): it was saved by "
        "something else, so resume without the loader"
    )


def _entry(state: Mapping[str, Any], name: str, *kinds: type) -> Any:
    value = state.get(name) if isinstance(state, Mapping) else state
    if type(value) not in kinds:
        raise _unreadable(name, value)
    return value


def _check_format(state: Mapping[str, Any]) -> None:
    version = _entry(state, "format", int)
    if version != _FORMAT:
        raise FormatError(
            f"the data loader's saved state has format {version}, and this version of pysnap "
            f"reads format {_FORMAT}: load it with the version that wrote it"
        )


def _position_from(state: Mapping[str, Any]) -> _Position:
    position = _Position(
        delivered=_entry(state, "delivered", int),
        drawn=_entry(state, "drawn", int),
        exhausted=_entry(state, "exhausted", bool),
        digest=_entry(state, "digest", int),
        random=_entry(state, "random", dict),
        random_first=_entry(state, "random_first", dict, type(None)),
        epoch=_entry(state, "epoch", int, type(None)),
    )
    if not 0 <= position.delivered <= position.drawn:
        raise _unreadable("delivered", position.delivered)
    return position


# torchdata


class StatefulLoaderPart:
    """What stands for a StatefulDataLoader of torchdata in a snapshot; its owner iterates it as is.

    The loader's own state finds the batch. But (torchdata 0.11) the iterator that goes on draws a
    seed from the global generator or from `loader.generator` when it is made, which moves all that
    is drawn later, and a state taken after the loop yields a whole epoch. So `load_state_dict`
    makes that iterator at once (its workers start then) and puts the random states back, and the
    three rules of this module hold, except that a loop inside another loop is not recognised: do
    not register a validation loader that is iterated inside the training loop.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._declared = False
        self._dropped: object = None  # the pass that begin_epoch() found

    def begin_epoch(self) -> None:
        """Declares that the next `iter()` of the loader is a new epoch."""
        self._declared = True
        if self._loader._initial_iter_for_state_dict:
            # The next iter() takes an iterator that is made already, with the position in it.
            self._make(self._loader.state_dict(), new_epoch=True)
        self._dropped = self._pass()

    def state_dict(self) -> dict[str, Any]:
        """The loader's own state, None before the first iter(), and what it leaves out."""
        loader = self._loader
        # Asked before the first iter(), the loader would make its iterator: a seed, and workers.
        begun = loader._iterator is not None or loader.next_iter_state is not None
        state = loader.state_dict() if begun else None
        dropped = self._dropped is not None and self._dropped is self._pass()
        finished = state is not None and bool(state["_iterator_finished"])
        return {
            "format": _FORMAT,
            "loader": state,
            "declared": self._declared,
            "new_epoch": dropped or (finished and not self._declared),
            "generators": _read(_owned_sources(self._loader)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Gives the loader its state, makes its iterator, and sets the generators that it owns."""
        _check_format(state)
        inner = _entry(state, "loader", dict, type(None))
        declared = _entry(state, "declared", bool)
        new_epoch = _entry(state, "new_epoch", bool)
        generators = _entry(state, "generators", dict)
        if inner is None:
            self._loader.load_state_dict({})
        else:
            self._make(inner, new_epoch=new_epoch)
        _write(_owned_sources(self._loader), generators)
        self._declared = declared
        self._dropped = self._pass() if new_epoch else None

    def _make(self, state: dict[str, Any], *, new_epoch: bool) -> None:
        """Lets the loader make the iterator that its next iter() returns; no random state moves."""
        with _kept({**_global_sources(), **_owned_sources(self._loader)}):
            # From a finished position iter() begins an epoch; another one has a rest, maybe empty.
            self._loader.load_state_dict({**state, "_iterator_finished": new_epoch})
            self._loader.state_dict()

    def _pass(self) -> object:
        """The sampler iterator in use; every iter() makes one, over persistent workers too."""
        return getattr(self._loader._iterator, "_sampler_iter", None)


def as_part(value: Any) -> Any:
    """What stands for `value` in a snapshot: for a StatefulDataLoader its StatefulLoaderPart."""
    modules = [base.__module__ for base in type(value).__mro__]
    if any(name.startswith("torchdata.stateful_dataloader") for name in modules):
        return StatefulLoaderPart(value)
    return value
