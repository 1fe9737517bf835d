"""Over an iterable dataset too, a run that is cut anywhere equals the run that is never cut."""

from __future__ import annotations

import gc
import multiprocessing
import random
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from test_loader import (
    Ids,
    Run,
    Snapshot,
    continued,
    draw,
    generator,
    global_state,
    moved,
    plain,
    seed_all,
    set_global_state,
)
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pysnap.errors import ConfigError, MismatchError
from pysnap.loader import ResumableLoader, _PassOver, resumable

# torch's advice for a machine that has fewer processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


# Data sets


class Numbers(IterableDataset[Any]):
    """The numbers below `size`, shared out among the workers."""

    def __init__(self, size: int = 7) -> None:
        self.size = size

    def shard(self) -> list[int]:
        worker = get_worker_info()
        numbers = list(range(self.size))
        return numbers if worker is None else numbers[worker.id :: worker.num_workers]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.shard())


class Everywhere(Numbers):
    """Is not shared out: with workers, more batches come than its length says."""

    def __len__(self) -> int:
        return self.size

    def shard(self) -> list[int]:
        return list(range(self.size))


class Uneven(Numbers):
    """The workers come to their ends one long after the other, and not in their order."""

    def shard(self) -> list[int]:
        worker = get_worker_info()
        assert worker is not None
        return [10 * worker.id + number for number in range((3, 8, 1)[worker.id])]


class Noisy(Numbers):
    """Draws from each global generator for each item, as random augmentation does."""

    def __iter__(self) -> Iterator[Any]:
        for number in self.shard():
            yield number, draw()


class DrawnAtFirst(Numbers):
    """Draws its order from all global generators when it is asked for the first item."""

    def __iter__(self) -> Iterator[Any]:
        numbers = self.shard()
        random.shuffle(numbers)
        numbers = np.random.permutation(numbers).tolist()
        for index in torch.randperm(len(numbers)).tolist():
            yield numbers[index]


class DrawnInIter(DrawnAtFirst):
    """Draws its order in __iter__ itself."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__()))


class Buffered(Numbers):
    """Draws from `rng` with each item which one of a buffer comes next."""

    rng: Any = random

    def __iter__(self) -> Iterator[Any]:
        numbers = iter(self.shard())
        buffer = list(islice(numbers, 3))
        while buffer:
            yield buffer.pop(self.rng.randrange(len(buffer)))
            buffer += islice(numbers, 1)


class OwnGenerator(Buffered):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)


class MadeInIter(Buffered):
    """Makes its generator when it is iterated, and keeps it."""

    def __iter__(self) -> Iterator[Any]:
        self.rng = random.Random(5)
        return super().__iter__()


class OfEpochs(Buffered):
    """Its order is a function of the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        self.rng = random.Random(self.epoch)
        return super().__iter__()


class Over(Numbers):
    """A data set over a data set."""

    def __init__(self, below: Numbers) -> None:
        self.below = below

    def __iter__(self) -> Iterator[Any]:
        return ((number, draw()) for number in self.below)


class Everything(Buffered):
    """Order and items are drawn from the generators that the worker has, or its trainer."""

    def __iter__(self) -> Iterator[Any]:
        return ((number, draw()) for number in super().__iter__())


def noisy_collate(items: list[Any]) -> list[Any]:
    return [items, random.random()]


class HasState(Numbers):
    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("not asked")


# The harness


Build = Callable[[int], DataLoader[Any]]


def train(run: Run, loader: Any, resumed: int | None) -> None:
    for epoch in run.epochs(resumed):
        for batch in loader:
            run.use(epoch, batch)
            run.point(epoch)
        run.point(epoch)
        run.use("end of", epoch)


class Saving(Run):
    """Takes a snapshot at every point, and goes on."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__(parts)
        self.cuts: list[tuple[int, Snapshot]] = []

    def point(self, epoch: int) -> None:
        states = [plain(part.state_dict()) for part in self.parts]
        self.cuts.append((len(self.trace), Snapshot(epoch, states, global_state())))


def saving(build: Build) -> Saving:
    seed_all(1)
    loader = resumable(build(1))
    run = Saving([loader])
    train(run, loader, None)
    return run


def check_cut_anywhere(build: Build) -> None:
    whole = saving(build)
    assert len(whole.cuts) >= 10
    for cut, (length, snapshot) in enumerate(whole.cuts):
        after = continued(build, snapshot, body=train)
        assert whole.trace[:length] + after.trace == whole.trace, f"cut at point {cut}"


def loader_of(data: Callable[[int], Numbers], **options: Any) -> Build:
    """`data` and `generator` get the seed of their process."""

    def build(seed: int) -> DataLoader[Any]:
        made = {key: item(seed) if key == "generator" else item for key, item in options.items()}
        return DataLoader(data(seed), **{"collate_fn": list, **made})

    return build


def numbers(seed: int) -> Numbers:
    return Numbers()


BUILDS: dict[str, Build] = {
    "in order": loader_of(numbers, batch_size=3),
    "whole batches": loader_of(lambda seed: Numbers(6), batch_size=3),
    "drop_last": loader_of(lambda seed: Noisy(), batch_size=3, drop_last=True),
    "batch_size=None": loader_of(
        lambda seed: DrawnAtFirst(4), batch_size=None, collate_fn=lambda item: [item]
    ),
    "noisy": loader_of(lambda seed: Noisy(), batch_size=3, collate_fn=noisy_collate),
    "noisy, generator": loader_of(lambda seed: Noisy(), batch_size=3, generator=generator),
    "drawn at first": loader_of(lambda seed: DrawnAtFirst(), batch_size=3),
    "drawn in iter": loader_of(lambda seed: DrawnInIter(), batch_size=3),
    "own generator": loader_of(OwnGenerator, batch_size=3),
    "made in iter": loader_of(lambda seed: MadeInIter(), batch_size=3),
    "own generator below": loader_of(lambda seed: Over(OwnGenerator(seed)), batch_size=3),
    "own state": loader_of(lambda seed: HasState(), batch_size=3),
}

WORKER_BUILDS: dict[str, Build] = {
    "shared out": loader_of(numbers, batch_size=2, num_workers=2),
    "not shared out": loader_of(lambda seed: Everywhere(3), batch_size=2, num_workers=2),
    "everything drawn": loader_of(
        lambda seed: Everything(),
        batch_size=2,
        num_workers=2,
        collate_fn=noisy_collate,
        generator=generator,
    ),
    "uneven": loader_of(lambda seed: Uneven(), batch_size=2, num_workers=3),
    "uneven, drop_last": loader_of(
        lambda seed: Uneven(), batch_size=2, num_workers=3, drop_last=True
    ),
    "workers, batch_size=None": loader_of(
        lambda seed: Everything(5),
        batch_size=None,
        num_workers=2,
        prefetch_factor=1,
        collate_fn=lambda item: [item],
    ),
    "persistent": loader_of(
        lambda seed: MadeInIter(), batch_size=2, num_workers=2, persistent_workers=True
    ),
}


# Cut and continued


@pytest.mark.parametrize("name", BUILDS)
def test_cut_anywhere(name: str) -> None:
    check_cut_anywhere(BUILDS[name])


@pytest.mark.parametrize("name", WORKER_BUILDS)
def test_cut_with_workers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_loader.EPOCHS", 2)
    check_cut_anywhere(WORKER_BUILDS[name])


@pytest.mark.parametrize("name", ["noisy", "own generator", "drawn at first"])
def test_cut_twice_anywhere(name: str) -> None:
    build = BUILDS[name]
    whole = saving(build)
    for cut, (length, snapshot) in enumerate(whole.cuts):
        for second in range(continued(build, snapshot, body=train).points):
            middle = continued(build, snapshot, second, train)
            assert middle.snapshot is not None
            after = continued(build, middle.snapshot, body=train)
            trace = whole.trace[:length] + middle.trace + after.trace
            assert trace == whole.trace, f"cuts {cut}, {second}"


def test_cut_twice_with_workers() -> None:
    build = WORKER_BUILDS["everything drawn"]
    whole = saving(build)
    length, snapshot = whole.cuts[2]
    middle = continued(build, snapshot, 1, train)
    assert middle.snapshot is not None
    after = continued(build, middle.snapshot, body=train)
    assert whole.trace[:length] + middle.trace + after.trace == whole.trace


@pytest.mark.parametrize("name", BUILDS)
def test_a_loaded_state_is_saved_unchanged(name: str) -> None:
    for _, snapshot in saving(BUILDS[name]).cuts:
        loader = resumable(BUILDS[name](99))
        loader.load_state_dict(snapshot.states[0])
        assert loader.state_dict() == snapshot.states[0]


@pytest.mark.parametrize("name", [*BUILDS, *WORKER_BUILDS])
def test_wrapped_equals_plain(name: str) -> None:
    """Neither wrapping nor saving at every point changes what is delivered and drawn."""
    build = {**BUILDS, **WORKER_BUILDS}[name]
    seed_all(1)
    bare = Run([])
    train(bare, build(1), None)
    assert saving(build).trace == bare.trace


def test_draws_between_iter_and_the_first_batch() -> None:
    loader = resumable(BUILDS["drawn at first"](1))
    batches = iter(loader)
    draw()
    next(batches)
    assert list(moved(loader, lambda: BUILDS["drawn at first"](99))) == list(batches)


def test_workers_that_are_spawned() -> None:
    """What replaces a part of the loader travels to a worker that inherits nothing."""

    def build(context: str) -> DataLoader[Any]:
        return DataLoader(
            Everything(),
            batch_size=2,
            num_workers=1,
            collate_fn=noisy_collate,
            multiprocessing_context=context,
        )

    seed_all(1)
    loader = resumable(build("fork"))
    batches = iter(loader)
    next(batches)
    state, rng = plain(loader.state_dict()), global_state()
    other = resumable(build("spawn"))
    other.load_state_dict(state)
    set_global_state(rng)
    assert list(other) == list(batches)


@pytest.mark.cuda
def test_a_dataset_that_draws_on_the_gpu() -> None:
    """Batches that are passed over draw there too, and pinned ones stay pinned."""

    class Gpu(Numbers):
        def __iter__(self) -> Iterator[Any]:
            return (torch.rand(1, device="cuda").cpu() for _ in range(self.size))

    def build(seed: int) -> DataLoader[Any]:
        return DataLoader(Gpu(), batch_size=2, pin_memory=True)

    torch.rand(1, device="cuda")
    loader = resumable(build(1))
    batches = iter(loader)
    next(batches)
    state, rng = plain(loader.state_dict()), global_state()
    rest = list(batches)
    other = resumable(build(1))
    other.load_state_dict(state)
    set_global_state(rng)
    again = list(other)
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))
    assert all(batch.is_pinned() for batch in again)


def test_a_batch_that_is_passed_over_is_made_and_not_handed_out() -> None:
    made: list[Any] = []
    collate = _PassOver(lambda items: made.append(items) or items, 2)
    assert [collate(items) for items in ([1], [2], [3], [4])] == [None, None, [3], [4]]
    assert made == [[1], [2], [3], [4]]


def test_what_is_passed_over_is_not_sent_by_the_workers() -> None:
    """All but a few at the end: no more than one a worker is in doubt."""
    loader = resumable(DataLoader(Numbers(40), batch_size=1, num_workers=2, collate_fn=list))
    batches = iter(loader)
    for _ in range(31):
        next(batches)
    other = resumable(DataLoader(Numbers(40), batch_size=1, num_workers=2, collate_fn=list))
    other.load_state_dict(plain(loader.state_dict()))
    received: list[Any] = []
    note = _note_received(received)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pysnap.loader._BatchDraws._note", note)
        assert list(other) == [[31], [32], [33], [34], [35], [36], [37], [38], [39]]
    assert received[:31] == [None] * 30 + [[30]]


def _note_received(received: list[Any]) -> Any:
    def note(draws: Any, item: Any) -> None:
        draws.record.drawn += 1
        received.append(item)

    return note


# Where an epoch ends


def test_after_the_loop() -> None:
    def build() -> DataLoader[Any]:
        return DataLoader(Numbers(5), batch_size=2, collate_fn=list)

    whole = [[0, 1], [2, 3], [4]]
    loader = resumable(build())
    assert list(loader) == whole
    assert list(moved(loader, build)) == whole
    loader.begin_epoch()
    assert list(loader) == whole
    other = moved(loader, build)
    assert list(other) == []
    assert list(other) == whole
    for _ in loader:
        break
    assert list(moved(loader, build)) == whole[1:]
    assert len(resumable(DataLoader(Everywhere(5), batch_size=2))) == 3


@pytest.mark.parametrize("resumed", [False, True])
def test_a_break_ends_the_workers(resumed: bool) -> None:
    def build() -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_size=2, num_workers=2)

    loader = resumable(build())
    before = set(multiprocessing.active_children())
    next(iter(loader))
    if resumed:
        loader = moved(loader, build)
        next(iter(loader))
    assert set(multiprocessing.active_children()) <= before
    assert loader.state_dict()["position"]["delivered"] == 1 + resumed


@pytest.mark.parametrize("data", [Numbers(), Ids()])
def test_a_loader_ends_with_its_last_reference(data: Any) -> None:
    """In a cycle, its workers would end within some later allocation, and torch waits for them."""
    loader = resumable(DataLoader(data, batch_size=2))
    assert len(list(loader)) == 4
    ended = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert ended() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "with_workers"])
def test_going_back_in_the_same_process(workers: int) -> None:
    seed_all(1)
    options = {"persistent_workers": True} if workers else {}
    loader = resumable(
        DataLoader(
            Everything() if workers else DrawnAtFirst(),
            batch_size=2,
            num_workers=workers,
            collate_fn=list,
            **options,
        )
    )
    untouched, rng_untouched = plain(loader.state_dict()), global_state()
    batches = iter(loader)
    first = [next(batches)]
    state, rng = plain(loader.state_dict()), global_state()
    rest = list(batches)
    loader.load_state_dict(state)
    set_global_state(rng)
    assert list(loader) == rest
    loader.load_state_dict(untouched)
    set_global_state(rng_untouched)
    assert list(loader) == first + rest


# Failures


class Fails(Numbers):
    """Raises once at each item of `at`, and can be asked for the next."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at = list(at)

    def __iter__(self) -> Iterator[Any]:
        return map(self.load, self.shard())

    def load(self, number: int) -> int:
        if number in self.at:
            self.at.remove(number)
            raise OSError("disk")
        return number


def failing(*at: int) -> ResumableLoader:
    return resumable(DataLoader(Fails(*at), batch_size=2, collate_fn=list))


def test_a_batch_that_failed_is_not_delivered() -> None:
    loader = failing(2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(OSError, match="disk"):
        next(batches)
    other = failing()
    other.load_state_dict(plain(loader.state_dict()))
    assert list(other) == [[2, 3], [4, 5], [6]]
    # As in a DataLoader, the item is gone.
    assert next(batches) == [3, 4]
    assert loader.state_dict()["position"]["delivered"] == 2
    other.load_state_dict(plain(loader.state_dict()))


def test_a_failure_in_what_is_passed_over_changes_nothing() -> None:
    loader = failing()
    batches = iter(loader)
    next(batches)
    next(batches)
    state = plain(loader.state_dict())
    other = failing(1)
    other.load_state_dict(state)
    seed_all(4)
    rng = torch.get_rng_state()
    with pytest.raises(OSError, match="disk"):
        iter(other)
    assert torch.equal(torch.get_rng_state(), rng)
    assert other.state_dict() == state
    assert list(other) == list(batches) == [[4, 5], [6]]


# Refused


def running(data: Any, batches: int = 2, **options: Any) -> dict[str, Any]:
    loader = resumable(DataLoader(data, batch_size=2, **options))
    held = iter(loader)
    for _ in range(batches):
        next(held)
    state: dict[str, Any] = plain(loader.state_dict())
    return state


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Numbers(), {"num_workers": 2}, "number of workers was 0, is 2"),
        (Numbers(), {"drop_last": True}, "drop_last was False, is True"),
        (Everywhere(), {}, "dataset length was None, is 7; dataset was 'Numbers', is 'Everywhere'"),
        (OwnGenerator(1), {}, r"generators was '', is 'dataset\.rng'"),
        (Ids(), {}, "number of workers was 0, is None"),
    ],
)
def test_a_changed_loader_is_refused(data: Any, options: dict[str, Any], message: str) -> None:
    loader = resumable(DataLoader(data, batch_size=2, **options))
    before = loader.state_dict()
    with pytest.raises(MismatchError, match=message):
        loader.load_state_dict(running(Numbers()))
    assert loader.state_dict() == before


@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "with_workers"])
def test_a_dataset_that_ends_early_is_refused(workers: int) -> None:
    loader = resumable(DataLoader(Numbers(3), batch_size=2, num_workers=workers))
    state = running(Numbers(9), batches=3, num_workers=workers)
    loader.load_state_dict(state)
    rng = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(MismatchError, match=r"Numbers .* batch 3; it ended after batch 2: giv"):
            iter(loader)
    assert torch.equal(torch.get_rng_state(), rng)
    assert loader.state_dict() == state


def test_a_forgotten_set_epoch_is_refused() -> None:
    data = OfEpochs()
    data.set_epoch(3)
    state = running(data, collate_fn=list)
    held = OfEpochs()
    loader = resumable(DataLoader(held, batch_size=2, collate_fn=list))
    loader.load_state_dict(state)
    with pytest.raises(MismatchError, match=r"OfEpochs .* was 3 and is 0: call set_epoch\(3\)"):
        iter(loader)
    held.set_epoch(3)
    whole = list(DataLoader(data, batch_size=2, collate_fn=list))
    assert list(loader) == whole[2:]


def test_a_dataset_may_count_its_epochs() -> None:
    """Its first epoch goes on; a later one is not that of a new data set, and is refused."""

    class Counts(OfEpochs):
        def __iter__(self) -> Iterator[Any]:
            self.epoch += 1
            return super().__iter__()

    data = Counts()
    loader = resumable(DataLoader(data, batch_size=2, collate_fn=list))
    batches = iter(loader)
    next(batches)
    other = resumable(DataLoader(Counts(), batch_size=2, collate_fn=list))
    other.load_state_dict(plain(loader.state_dict()))
    assert list(other) == list(batches)
    next(iter(loader))
    other = resumable(DataLoader(Counts(), batch_size=2, collate_fn=list))
    other.load_state_dict(plain(loader.state_dict()))
    with pytest.raises(MismatchError, match="its epoch was 1 and is 0"):
        iter(other)


def test_a_data_pipe_is_refused() -> None:
    pipes = pytest.importorskip("torch.utils.data.datapipes.iter")
    with pytest.raises(ConfigError, match="IterDataPipe"):
        resumable(DataLoader(pipes.IterableWrapper([1, 2])))
