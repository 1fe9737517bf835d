"""A run that is cut anywhere and goes on in new objects equals the run that is never cut."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pysnap.errors import ConfigError, Error, FormatError, MismatchError
from pysnap.loader import ResumableLoader, StatefulLoaderPart, as_part, resumable

EPOCHS = 3

# torchdata 0.11 calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital':UserWarning")


# Data sets and samplers


class Ids(Dataset[int]):
    def __init__(self, size: int = 7) -> None:
        self.size = size
        self.loaded = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.loaded += 1
        return index


class Noisy(Ids):
    """Draws from each global generator for each sample, as random augmentation does."""

    def __getitem__(self, index: int) -> Any:
        return (index, *draw())


class SelfDrawn(Sampler[int]):
    """Draws each index when it is asked for it, from the generator that it owns."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __iter__(self) -> Iterator[int]:
        for _ in range(7):
            yield self.rng()

    def __len__(self) -> int:
        return 7


class PythonDrawn(SelfDrawn):
    def __init__(self, seed: int) -> None:
        self.mine = random.Random(seed)
        super().__init__(lambda: self.mine.randrange(7))


class NumpyDrawn(SelfDrawn):
    def __init__(self, bits: Any) -> None:
        self.mine = np.random.Generator(bits)
        super().__init__(lambda: int(self.mine.integers(7)))


class LegacyNumpyDrawn(SelfDrawn):
    def __init__(self, seed: int) -> None:
        self.mine = np.random.RandomState(seed)
        super().__init__(lambda: int(10 * self.mine.normal()) % 7)


class DrawnInIter(Sampler[int]):
    """Draws the order in __iter__ itself, from two global generators."""

    def __iter__(self) -> Iterator[int]:
        order = np.random.permutation(7).tolist()
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 7


class Reversed(Sampler[int]):
    """A sampler over a sampler."""

    def __init__(self, below: Sampler[int]) -> None:
        self.below = below

    def __iter__(self) -> Iterator[int]:
        return iter(list(self.below)[::-1])

    def __len__(self) -> int:
        return 7


class NoSampler:
    """An iterable that is not of torch's class."""

    def __init__(self, seed: int) -> None:
        self.order = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(7, generator=self.order).tolist()

    def __len__(self) -> int:
        return 7


class UnevenBatches(Sampler[list[int]]):
    """A batch sampler that has its own generator, no sampler below it, and fills one list."""

    def __init__(self, seed: int) -> None:
        self.order = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in torch.randperm(7, generator=self.order).tolist():
            batch.append(index)
            if len(batch) > index % 3:
                yield batch
                batch.clear()
        if batch:
            yield batch

    def __len__(self) -> int:
        return 4


# The harness: a training loop that can be cut, and the restart


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def global_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda


def set_global_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    torch.cuda.set_rng_state_all(state[3])


def plain(value: Any) -> Any:
    """A copy by way of the types that a snapshot's tree holds; any other fails."""
    if value is None or type(value) in (bool, int, str, bytes):
        return value
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    raise AssertionError(f"{type(value)} in the state")


@dataclass
class Snapshot:
    epoch: int
    states: list[Any]
    rng: tuple[Any, ...]


class Cut(Exception):
    pass


class Run:
    """One process: its trace, and the snapshot that it takes at cut point number `cut`."""

    def __init__(self, parts: list[Any], cut: int | None = None, copy: Any = plain) -> None:
        self.parts = parts
        self.trace: list[Any] = []
        self.cut = cut
        self.points = 0
        self.snapshot: Snapshot | None = None
        self._copy = copy

    def point(self, epoch: int) -> None:
        if self.points == self.cut:
            states = [self._copy(part.state_dict()) for part in self.parts]
            self.snapshot = Snapshot(epoch, states, global_state())
            raise Cut
        self.points += 1

    def restore(self, snapshot: Snapshot) -> None:
        for part, state in zip(self.parts, snapshot.states, strict=True):
            part.load_state_dict(state)
        set_global_state(snapshot.rng)

    def epochs(self, resumed: int | None) -> Iterator[int]:
        """What Snapshotter.epochs() does."""
        for epoch in range(resumed or 0, EPOCHS):
            if epoch != resumed:
                for part in self.parts:
                    part.begin_epoch()
                self.point(epoch)
            yield epoch

    def use(self, *what: Any) -> None:
        """A training step."""
        self.trace.append((what, draw()))


Body = Callable[[Run, Any, "int | None"], None]
Build = Callable[[int], DataLoader[Any]]


def train(run: Run, loader: Any, resumed: int | None) -> None:
    for epoch in run.epochs(resumed):
        set_epoch = getattr(loader.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        for batch in loader:
            run.use(epoch, np.asarray(batch).tolist())
            run.point(epoch)
        run.point(epoch)
        run.use("end of", epoch)


def uncut(build: Build, body: Body = train) -> Run:
    seed_all(1)
    loader = resumable(build(1))
    run = Run([loader])
    body(run, loader, None)
    return run


def cut_run(build: Build, cut: int, body: Body = train) -> tuple[list[Any], Snapshot]:
    seed_all(1)
    loader = resumable(build(1))
    run = Run([loader], cut)
    with pytest.raises(Cut):
        body(run, loader, None)
    assert run.snapshot is not None
    return run.trace, run.snapshot


def continued(build: Build, snapshot: Snapshot, cut: int | None = None, body: Body = train) -> Run:
    seed_all(99)
    loader = resumable(build(99))
    run = Run([loader], cut)
    run.restore(snapshot)
    with pytest.raises(Cut) if cut is not None else contextlib.nullcontext():
        body(run, loader, snapshot.epoch)
    return run


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributed(seed: int) -> DataLoader[Any]:
    data = Ids(13)
    sampler: Sampler[int] = DistributedSampler(data, num_replicas=2, rank=1, seed=7)
    return DataLoader(data, batch_size=3, sampler=sampler, collate_fn=list)


def with_shared_generator(seed: int) -> DataLoader[Any]:
    """The data set draws from the generator from which loader and sampler draw."""
    shared = generator(seed)

    class Jitter(Ids):
        def __getitem__(self, index: int) -> Any:
            return index, torch.rand(1, generator=shared).item()

    return DataLoader(Jitter(), batch_size=2, shuffle=True, generator=shared, collate_fn=list)


def loader_of(make: Callable[[int], dict[str, Any]], data: type[Ids] = Ids) -> Build:
    return lambda seed: DataLoader(data(), collate_fn=list, **make(seed))


BUILDS: dict[str, Build] = {
    "in order": loader_of(lambda seed: {"batch_size": 3}),
    "shuffle": loader_of(lambda seed: {"batch_size": 3, "shuffle": True}),
    "shuffle, whole batches": loader_of(lambda seed: {"batch_size": 7, "shuffle": True}),
    "shuffle, generator": loader_of(
        lambda seed: {"batch_size": 2, "shuffle": True, "generator": generator(seed)}
    ),
    "drop_last": loader_of(
        lambda seed: {
            "batch_size": 3,
            "shuffle": True,
            "drop_last": True,
            "generator": generator(seed),
        }
    ),
    "batch_size=None": lambda seed: DataLoader(Ids(), batch_size=None, shuffle=True),
    "two generators": loader_of(
        lambda seed: {
            "batch_size": 2,
            "sampler": RandomSampler(Ids(), generator=generator(seed)),
            "generator": generator(seed + 1),
        }
    ),
    # Draws 32 at a time, so it draws in the middle of the epoch as well.
    "replacement": loader_of(
        lambda seed: {
            "batch_size": 13,
            "sampler": RandomSampler(
                Ids(), replacement=True, num_samples=70, generator=generator(seed)
            ),
        }
    ),
    "subset": loader_of(lambda seed: {"batch_size": 2, "sampler": SubsetRandomSampler([5, 1, 3])}),
    "weighted": loader_of(
        lambda seed: {"batch_size": 2, "sampler": WeightedRandomSampler([1, 2, 3, 4], 5)}
    ),
    "list as sampler": loader_of(lambda seed: {"batch_size": 2, "sampler": [3, 1, 2]}),
    "distributed": distributed,
    "own random.Random": loader_of(lambda seed: {"batch_size": 2, "sampler": PythonDrawn(seed)}),
    "own RandomState": loader_of(lambda seed: {"batch_size": 2, "sampler": LegacyNumpyDrawn(seed)}),
    "own PCG64": loader_of(
        lambda seed: {"batch_size": 2, "sampler": NumpyDrawn(np.random.PCG64(seed))}
    ),
    "own Philox": loader_of(
        lambda seed: {"batch_size": 2, "sampler": NumpyDrawn(np.random.Philox(seed))}
    ),
    "sampler over sampler": loader_of(
        lambda seed: {
            "batch_size": 2,
            "sampler": Reversed(RandomSampler(Ids(), generator=generator(seed))),
        }
    ),
    "iterable as sampler": loader_of(lambda seed: {"batch_size": 2, "sampler": NoSampler(seed)}),
    "drawn in iter": loader_of(lambda seed: {"batch_size": 2, "sampler": DrawnInIter()}),
    "batch sampler": loader_of(lambda seed: {"batch_sampler": UnevenBatches(seed)}),
    "nested batch sampler": loader_of(
        lambda seed: {
            "batch_sampler": BatchSampler(
                RandomSampler(Ids(), generator=generator(seed)), 3, drop_last=True
            )
        }
    ),
    "noisy": loader_of(lambda seed: {"batch_size": 3, "shuffle": True}, Noisy),
    "noisy, generator": loader_of(
        lambda seed: {"batch_size": 2, "shuffle": True, "generator": generator(seed)}, Noisy
    ),
    "shared generator": with_shared_generator,
}

WORKER_BUILDS: dict[str, Build] = {
    # RandomSampler draws once more when it ends, which is while batches are under way.
    "workers": loader_of(
        lambda seed: {
            "batch_size": 2,
            "shuffle": True,
            "drop_last": True,
            "generator": generator(seed),
            "num_workers": 2,
        }
    ),
    "workers, replacement": loader_of(
        lambda seed: {
            "batch_size": 4,
            "num_workers": 2,
            "sampler": RandomSampler(
                Ids(), replacement=True, num_samples=36, generator=generator(seed)
            ),
            "prefetch_factor": 1,
        }
    ),
    "persistent workers": loader_of(
        lambda seed: {
            "batch_size": 2,
            "sampler": DrawnInIter(),
            "num_workers": 2,
            "persistent_workers": True,
        }
    ),
}


# Cut and continued


@pytest.mark.parametrize("name", BUILDS)
def test_cut_anywhere(name: str) -> None:
    build = BUILDS[name]
    whole = uncut(build)
    for cut in range(whole.points):
        before, snapshot = cut_run(build, cut)
        after = continued(build, snapshot)
        assert before + after.trace == whole.trace, f"cut at point {cut}"


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["in order", "subset", "weighted"])
def test_cut_anywhere_with_cuda_as_default_device(name: str) -> None:
    """The loader's seed and the sampler's order are drawn from the device's generator then."""
    torch.set_default_device("cuda")
    try:
        test_cut_anywhere(name)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", WORKER_BUILDS)
def test_cut_with_workers(name: str) -> None:
    build = WORKER_BUILDS[name]
    whole = uncut(build)
    for cut in range(0, whole.points, 3 if whole.points > 20 else 1):
        before, snapshot = cut_run(build, cut)
        after = continued(build, snapshot)
        assert before + after.trace == whole.trace, f"cut at point {cut}"


@pytest.mark.parametrize("name", ["shuffle, generator", "batch sampler", "noisy"])
def test_cut_twice_anywhere(name: str) -> None:
    build = BUILDS[name]
    whole = uncut(build)
    for cut in range(whole.points):
        before, snapshot = cut_run(build, cut)
        left = continued(build, snapshot)
        for second in range(left.points):
            middle = continued(build, snapshot, second)
            assert middle.snapshot is not None
            after = continued(build, middle.snapshot)
            assert before + middle.trace + after.trace == whole.trace, f"cuts {cut}, {second}"


@pytest.mark.parametrize("name", BUILDS)
def test_a_loaded_state_is_saved_unchanged(name: str) -> None:
    for cut in range(uncut(BUILDS[name]).points):
        _, snapshot = cut_run(BUILDS[name], cut)
        loader = resumable(BUILDS[name](99))
        loader.load_state_dict(snapshot.states[0])
        assert loader.state_dict() == snapshot.states[0]


@pytest.mark.parametrize("name", [*BUILDS, *WORKER_BUILDS])
def test_wrapped_equals_plain(name: str) -> None:
    """Neither wrapping nor saving at every point changes what is delivered and drawn."""

    class Saving(Run):
        def point(self, epoch: int) -> None:
            for part in self.parts:
                part.state_dict()

    build = {**BUILDS, **WORKER_BUILDS}[name]
    seed_all(1)
    bare = Run([])
    train(bare, build(1), None)
    seed_all(1)
    loader = resumable(build(1))
    saving = Saving([loader])
    train(saving, loader, None)
    assert saving.trace == bare.trace == uncut(build).trace


def test_number_of_workers_may_change() -> None:
    """Two workers have drawn ahead; none goes on, and the other way round."""

    def build(workers: int) -> DataLoader[Any]:
        return DataLoader(Ids(20), batch_size=2, shuffle=True, num_workers=workers)

    for first, second in ((2, 0), (0, 2)):
        seed_all(1)
        loader = resumable(build(first))
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state, rng = plain(loader.state_dict()), global_state()
        rest = [batch.tolist() for batch in batches]
        following = [batch.tolist() for batch in loader]

        other = resumable(build(second))
        other.load_state_dict(state)
        set_global_state(rng)
        assert [batch.tolist() for batch in other] == rest
        assert [batch.tolist() for batch in other] == following


class Augmented(Ids):
    """Draws in the worker that loads a sample."""

    def __getitem__(self, index: int) -> Any:
        return index, torch.rand(1).item()


def test_workers_of_a_resumed_epoch_draw_anew_and_repeat_nothing() -> None:
    """The batches are exact; what a map-style dataset draws in workers is not, and must not be
    what was drawn at the beginning of the epoch."""

    def build() -> ResumableLoader:
        return resumable(DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=2))

    def drawn(batches: Any) -> tuple[list[int], set[float]]:
        pairs = [batch for batch in batches]
        return (
            [int(index) for ids, _ in pairs for index in ids],
            {float(value) for _, values in pairs for value in values},
        )

    torch.manual_seed(1)
    whole_ids, whole_values = drawn(build())
    torch.manual_seed(1)
    first = build()
    batches = iter(first)
    begun_ids, begun_values = drawn(next(batches) for _ in range(2))
    state = first.state_dict()
    second = build()
    second.load_state_dict(state)
    rest_ids, rest_values = drawn(second)
    assert begun_ids + rest_ids == whole_ids and begun_values < whole_values
    assert len(rest_values) == len(rest_ids) and not rest_values & whole_values


def test_skipping_a_million_samples_loads_none() -> None:
    data = Ids(1_000_000)
    seed_all(1)
    loader = resumable(DataLoader(data, batch_size=100_000, shuffle=True))
    batches = iter(loader)
    # Ten batches, nine of them delivered without loading them.
    fetch = batches._batches._dataset_fetcher.fetch  # type: ignore[attr-defined]  # torch's own
    batches._batches._dataset_fetcher.fetch = len  # type: ignore[attr-defined]  # torch's own
    assert [next(batches) for _ in range(9)] == [100_000] * 9
    state = plain(loader.state_dict())
    batches._batches._dataset_fetcher.fetch = fetch  # type: ignore[attr-defined]  # torch's own
    last = next(batches)

    data.loaded = 0
    other = resumable(DataLoader(data, batch_size=100_000, shuffle=True))
    other.load_state_dict(state)
    rest = iter(other)
    assert data.loaded == 0
    assert torch.equal(next(rest), last)
    assert data.loaded == 100_000
    assert list(rest) == []


# Where an epoch ends


def delivered(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def moved(loader: ResumableLoader, build: Callable[[], DataLoader[Any]]) -> ResumableLoader:
    """The loader in a new process."""
    other = resumable(build())
    other.load_state_dict(plain(loader.state_dict()))
    return other


def seven() -> DataLoader[Any]:
    return DataLoader(Ids(), batch_size=3)


WHOLE = [[0, 1, 2], [3, 4, 5], [6]]


def test_before_the_first_batch_the_epoch_is_whole() -> None:
    loader = resumable(seven())
    assert delivered(moved(loader, seven)) == WHOLE
    batches = iter(loader)
    assert delivered(moved(loader, seven)) == WHOLE
    assert delivered(batches) == WHOLE


@pytest.mark.parametrize("declared", [False, True])
def test_after_the_last_batch_the_rest_is_empty(declared: bool) -> None:
    loader = resumable(seven())
    if declared:
        loader.begin_epoch()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    other = moved(loader, seven)
    assert delivered(other) == []
    assert delivered(other) == WHOLE


def test_after_the_loop_a_declared_epoch_has_an_empty_rest_once() -> None:
    loader = resumable(seven())
    loader.begin_epoch()
    assert delivered(loader) == WHOLE
    other = moved(loader, seven)
    third = moved(other, seven)
    assert delivered(other) == []
    assert delivered(moved(other, seven)) == []
    assert delivered(other) == WHOLE
    third.begin_epoch()
    assert delivered(third) == WHOLE


def test_after_the_loop_an_undeclared_epoch_is_over() -> None:
    loader = resumable(seven())
    assert delivered(loader) == WHOLE
    assert delivered(moved(loader, seven)) == WHOLE


def test_begin_epoch_drops_an_unfinished_position() -> None:
    loader = resumable(seven())
    next(iter(loader))
    loader.begin_epoch()
    assert delivered(moved(loader, seven)) == WHOLE
    other = moved(loader, seven)
    next(iter(other))
    third = moved(other, seven)
    third.begin_epoch()
    assert delivered(third) == WHOLE


def test_an_iterator_outlives_begin_epoch() -> None:
    loader = resumable(seven())
    batches = iter(loader)
    next(batches)
    loader.begin_epoch()
    next(batches)
    assert delivered(moved(loader, seven)) == WHOLE[2:]


def test_break_and_a_new_loop() -> None:
    loader = resumable(seven())
    for _ in loader:
        break
    assert delivered(moved(loader, seven)) == WHOLE[1:]
    first = iter(loader)
    second = iter(loader)
    next(second)
    next(second)
    next(first)  # an older iterator: not the position
    assert delivered(moved(loader, seven)) == WHOLE[2:]
    assert delivered(first) == WHOLE[1:]
    assert delivered(moved(loader, seven)) == WHOLE[2:]


def plain_loop(run: Run, loader: Any, resumed: int | None) -> None:
    """No declared epochs: it goes on in the interrupted epoch, or behind the loop in the next."""
    for epoch in range(resumed or 0, EPOCHS):
        for batch in loader:
            run.use(epoch, np.asarray(batch).tolist())
            run.point(epoch)
        run.point(epoch + 1)


def loop_with_break(run: Run, loader: Any, resumed: int | None) -> None:
    for epoch in run.epochs(resumed):
        for batch in loader:
            run.use(epoch, np.asarray(batch).tolist())
            if 3 in np.asarray(batch):
                break
            run.point(epoch)


@pytest.mark.parametrize("body", [plain_loop, loop_with_break])
@pytest.mark.parametrize("name", ["shuffle", "shuffle, generator", "noisy", "replacement"])
def test_other_loops_cut_anywhere(name: str, body: Body) -> None:
    build = BUILDS[name]
    whole = uncut(build, body)
    for cut in range(whole.points):
        before, snapshot = cut_run(build, cut, body)
        after = continued(build, snapshot, body=body)
        assert before + after.trace == whole.trace, f"cut at point {cut}"


def test_loop_inside_a_loop_begins_anew() -> None:
    """Training goes on in the outer loop, and validates again on the whole set."""
    outer, inner = resumable(seven()), resumable(seven())
    outer.begin_epoch()
    inner.begin_epoch()
    for _ in outer:
        assert delivered(inner) == WHOLE
        assert delivered(moved(inner, seven)) == WHOLE
        break
    assert delivered(inner) == WHOLE  # behind the outer loop
    assert delivered(moved(inner, seven)) == []


def test_loops_one_after_the_other() -> None:
    def body(run: Run, loaders: Any, resumed: int | None) -> None:
        for epoch in run.epochs(resumed):
            for loader in loaders:
                for batch in loader:
                    run.use(epoch, batch.tolist())
                    run.point(epoch)
            run.point(epoch)

    check_several(body)


def test_loops_side_by_side() -> None:
    def body(run: Run, loaders: Any, resumed: int | None) -> None:
        for epoch in run.epochs(resumed):
            for a, b in zip(*loaders, strict=False):
                run.use(epoch, a.tolist(), b.tolist())
                run.point(epoch)
            run.point(epoch)

    check_several(body)


def check_several(body: Body) -> None:
    """Two loaders of different length, in both orders, that share a generator and a data set."""
    for sizes in ((2, 3), (3, 2)):

        def run(
            seed: int, cut: int | None, snapshot: Snapshot | None, sizes: tuple[int, int] = sizes
        ) -> Run:
            seed_all(seed)
            shared = generator(seed)
            loaders = [
                resumable(DataLoader(Ids(), batch_size=size, shuffle=True, generator=shared))
                for size in sizes
            ]
            result = Run(list(loaders), cut)
            if snapshot is not None:
                result.restore(snapshot)
            with contextlib.suppress(Cut):
                body(result, loaders, None if snapshot is None else snapshot.epoch)
            return result

        whole = run(1, None, None)
        assert whole.points > 10
        for cut in range(whole.points):
            before = run(1, cut, None)
            after = run(99, None, before.snapshot)
            assert before.trace + after.trace == whole.trace, f"cut at point {cut}"


# What disturbs an iteration


def test_going_back_in_the_same_process() -> None:
    seed_all(1)
    loader = resumable(DataLoader(Ids(), batch_size=2, shuffle=True))
    batches = iter(loader)
    next(batches)
    state, rng = plain(loader.state_dict()), global_state()
    rest = delivered(batches)
    abandoned = iter(loader)
    loader.load_state_dict(state)
    set_global_state(rng)
    next(abandoned)
    assert loader.state_dict() == state
    assert delivered(loader) == rest


def test_an_iterator_from_before_a_load_is_not_the_position() -> None:
    loader = resumable(seven())
    before = plain(loader.state_dict())
    abandoned = iter(loader)
    next(abandoned)
    loader.load_state_dict(before)
    next(abandoned)
    assert loader.state_dict() == before
    assert delivered(abandoned) == WHOLE[2:]
    assert loader.state_dict() == before

    loader.begin_epoch()
    abandoned = iter(loader)
    assert delivered(loader) == WHOLE
    ended = loader.state_dict()
    assert delivered(abandoned) == WHOLE
    assert loader.state_dict() == ended


def test_draws_between_iter_and_the_first_batch() -> None:
    def start() -> tuple[ResumableLoader, Iterator[Any]]:
        seed_all(1)
        loader = resumable(DataLoader(Ids(), batch_size=2, shuffle=True))
        batches = iter(loader)
        draw()
        next(batches)
        return loader, batches

    loader, batches = start()
    other = moved(loader, lambda: DataLoader(Ids(), batch_size=2, shuffle=True))
    assert delivered(other) == delivered(batches)


class Fails(Ids):
    """Raises `error` once, at index 3."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def __getitem__(self, index: int) -> int:
        if index == 3 and self.error is not None:
            error, self.error = self.error, None
            raise error
        return index


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_a_batch_that_failed_is_not_delivered(error: BaseException) -> None:
    loader = resumable(DataLoader(Fails(error), batch_size=2))
    batches = iter(loader)
    next(batches)
    with pytest.raises(type(error)):
        next(batches)

    def build() -> DataLoader[Any]:
        return DataLoader(Ids(), batch_size=2)

    assert delivered(moved(loader, build)) == [[2, 3], [4, 5], [6]]
    assert next(batches).tolist() == [4, 5]  # as in a DataLoader, the failed batch is gone
    assert delivered(moved(loader, build)) == [[6]]


# Refused


BASE: dict[str, Any] = {"batch_size": 2, "shuffle": True}
CHANGES: dict[str, tuple[Callable[[], DataLoader[Any]], list[str]]] = {
    "data": (
        lambda: DataLoader(Ids(9), **BASE),
        ["dataset length was 7, is 9", "number of batches was 4, is 5"],
    ),
    "batch size": (
        lambda: DataLoader(Ids(), batch_size=3, shuffle=True),
        ["batch size was 2, is 3", "number of batches was 4, is 3"],
    ),
    "drop_last": (
        lambda: DataLoader(Ids(), drop_last=True, **BASE),
        ["drop_last was False, is True"],
    ),
    "sampler": (
        lambda: DataLoader(Ids(), batch_size=2),
        ["sampler was 'RandomSampler', is 'SequentialSampler'"],
    ),
    "batch sampler": (
        lambda: DataLoader(Ids(), batch_size=None, shuffle=True),
        ["batch sampler was 'BatchSampler', is 'NoneType'"],
    ),
    "generator": (
        lambda: DataLoader(Ids(), generator=generator(1), **BASE),
        ["generators was '', is 'generator'"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_loader_is_refused(name: str) -> None:
    build, messages = CHANGES[name]
    loader = resumable(DataLoader(Ids(), **BASE))
    next(iter(loader))
    other = resumable(build())
    before = other.state_dict()
    with pytest.raises(MismatchError) as caught:
        other.load_state_dict(plain(loader.state_dict()))
    for message in messages:
        assert message in str(caught.value)
    assert other.state_dict() == before


def test_another_order_is_refused() -> None:
    loader = resumable(DataLoader(Ids(), batch_size=2, sampler=[6, 5, 4, 3]))
    next(iter(loader))
    other = resumable(DataLoader(Ids(), batch_size=2, sampler=[6, 4, 5, 3]))
    state = plain(loader.state_dict())
    other.load_state_dict(state)
    rng = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(
            MismatchError, match=r"BatchSampler does not .* after batch 1; build it"
        ):
            iter(other)
    assert torch.equal(torch.get_rng_state(), rng)
    assert other.state_dict() == state


def test_an_order_that_ends_early_is_refused() -> None:
    loader = resumable(DataLoader(Ids(), batch_sampler=UnevenBatches(1)))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    other = resumable(DataLoader(Ids(), batch_sampler=UnevenBatches(1)))
    state = plain(loader.state_dict())
    state["position"]["drawn"] = state["position"]["delivered"] = 100
    other.load_state_dict(state)
    with pytest.raises(MismatchError, match="after batch 100"):
        iter(other)


def test_forgotten_set_epoch_is_refused() -> None:
    def build() -> tuple[ResumableLoader, DistributedSampler[int]]:
        sampler: DistributedSampler[int] = DistributedSampler(Ids(13), num_replicas=2, rank=0)
        return resumable(DataLoader(Ids(13), batch_size=2, sampler=sampler)), sampler

    loader, sampler = build()
    sampler.set_epoch(3)
    next(iter(loader))
    sampler.set_epoch(4)  # for the next epoch, before the snapshot
    other, other_sampler = build()
    other.load_state_dict(plain(loader.state_dict()))
    with pytest.raises(MismatchError, match=r"its epoch was 3 and is 0: call set_epoch\(3\)"):
        iter(other)
    other_sampler.set_epoch(3)
    assert len(delivered(other)) == 3


def test_a_sampler_that_shares_its_generator_with_training_is_refused() -> None:
    """It draws each index from torch's generator, and so does the step in between."""

    def build(seed: int) -> DataLoader[Any]:
        sampler = SelfDrawn(lambda: int(torch.randint(7, ())))
        return DataLoader(Ids(), batch_size=1, sampler=sampler, collate_fn=list)

    _, snapshot = cut_run(build, 4)
    with pytest.raises(MismatchError, match="give it one of its own"):
        continued(build, snapshot)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


class OwnIterator(DataLoader[int]):
    def __iter__(self) -> Any:
        return super().__iter__()


class OwnState(DataLoader[int]):
    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([1, 2], "takes a torch DataLoader, not a list"),
        *(
            # From torch 2.6 on.
            [(DataLoader(Ids(), num_workers=1, in_order=False), "in_order")]
            if "in_order" in inspect.signature(DataLoader).parameters
            else []
        ),
        (OwnIterator(Ids()), "OwnIterator iterates in its own way"),
        (OwnState(Ids()), "OwnState has a state_dict of its own"),
    ],
)
def test_what_cannot_go_on_exactly_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resumable(loader)


def test_a_loader_that_ignores_its_sampler_is_refused() -> None:
    class Elsewhere(DataLoader[int]):
        def _get_iterator(self) -> Any:
            return iter([])

    with pytest.raises(ConfigError, match="Elsewhere does not take its indices"):
        iter(resumable(Elsewhere(Ids())))


def test_another_state_is_refused() -> None:
    loader = resumable(seven())
    good = plain(loader.state_dict())
    next(iter(loader))
    running = plain(loader.state_dict())
    position = running["position"]
    bad: list[tuple[Any, type[Error]]] = [
        ({}, MismatchError),
        ([], MismatchError),
        ({**good, "format": 2}, FormatError),
        ({**good, "format": "1"}, MismatchError),
        ({**good, "phase": "running"}, MismatchError),
        ({**good, "phase": "over"}, MismatchError),
        ({**good, "position": position}, MismatchError),
        ({**good, "generators": None}, MismatchError),
        ({**running, "position": {**position, "delivered": 2}}, MismatchError),
        ({**running, "position": {**position, "delivered": -1}}, MismatchError),
        ({**running, "position": {**position, "random": b""}}, MismatchError),
    ]
    for state, error in bad:
        with pytest.raises(error):
            loader.load_state_dict(state)
        assert loader.state_dict() == running
    for name, value in (("torch", b"short"), ("python", b"{}"), ("numpy", b"[1]"), ("more", b"")):
        states = {**position["random"], name: value}
        loader.load_state_dict({**running, "position": {**position, "random": states}})
        with pytest.raises(MismatchError, match=f"random generator '{name}'"):
            iter(loader)


def test_the_entries_of_a_state_stay() -> None:
    """A state of an older version can be loaded as long as they do."""
    loader = resumable(DataLoader(Ids(), batch_size=2, shuffle=True))
    next(iter(loader))
    state = loader.state_dict()
    assert state["format"] == 1
    names = ["declared", "fingerprint", "format", "generators", "phase", "position", "workers"]
    assert sorted(state) == names
    names = ["delivered", "digest", "drawn", "epoch", "exhausted", "random", "random_first"]
    assert sorted(state["position"]) == names
    assert state["fingerprint"] == {
        "dataset length": 7,
        "batch size": 2,
        "drop_last": False,
        "sampler": "RandomSampler",
        "batch sampler": "BatchSampler",
        "number of batches": 4,
        "generators": "",
    }


def test_passes_on_what_a_data_loader_has() -> None:
    loader = DataLoader(Ids(), batch_size=2, shuffle=True, drop_last=True)
    wrapped = resumable(loader)
    assert wrapped.loader is loader
    assert wrapped.dataset is loader.dataset
    assert wrapped.sampler is loader.sampler
    assert wrapped.batch_sampler is loader.batch_sampler
    assert (wrapped.batch_size, wrapped.drop_last, wrapped.num_workers) == (2, True, 0)
    assert len(wrapped) == len(loader) == 3


# StatefulDataLoader


STATEFUL: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffle": {"shuffle": True},
    "generator": {"shuffle": True, "generator": generator},
    "workers": {"shuffle": True, "num_workers": 2},
    "persistent workers": {
        "shuffle": True,
        "generator": generator,
        "num_workers": 2,
        "persistent_workers": True,
    },
}


def copied(value: Any) -> Any:
    """As `plain`, with the tensors that torchdata's states hold."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return plain(value)


def stateful(options: dict[str, Any], seed: int, data: Any = None) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    options = {key: item(seed) if callable(item) else item for key, item in options.items()}
    data = Ids() if data is None else data
    return module.StatefulDataLoader(data, batch_size=3, collate_fn=list, **options)


def stateful_run(
    options: dict[str, Any],
    seed: int,
    *,
    cut: int | None = None,
    snapshot: Snapshot | None = None,
    body: Body = train,
    data: Any = None,
) -> Run:
    seed_all(seed)
    loader = stateful(options, seed, data)
    run = Run([as_part(loader)], cut, copied)
    if snapshot is not None:
        run.restore(snapshot)
    with contextlib.suppress(Cut):
        body(run, loader, None if snapshot is None else snapshot.epoch)
    return run


@pytest.mark.parametrize("name", STATEFUL)
def test_stateful_loader_cut_anywhere(name: str) -> None:
    options = STATEFUL[name]
    whole = stateful_run(options, 1)
    assert whole.points == 15
    for cut in range(whole.points):
        before = stateful_run(options, 1, cut=cut)
        after = stateful_run(options, 99, snapshot=before.snapshot)
        assert before.trace + after.trace == whole.trace, f"cut at point {cut}"


def test_stateful_loader_cut_twice_anywhere() -> None:
    options = STATEFUL["generator"]
    whole = stateful_run(options, 1)
    for cut in range(whole.points):
        before = stateful_run(options, 1, cut=cut)
        left = stateful_run(options, 99, snapshot=before.snapshot)
        for second in range(left.points):
            middle = stateful_run(options, 99, snapshot=before.snapshot, cut=second)
            after = stateful_run(options, 98, snapshot=middle.snapshot)
            trace = before.trace + middle.trace + after.trace
            assert trace == whole.trace, f"cuts {cut}, {second}"


def test_stateful_loader_over_a_stream() -> None:
    whole = stateful_run({}, 1, data=Stream())
    for cut in range(whole.points):
        before = stateful_run({}, 1, cut=cut, data=Stream())
        after = stateful_run({}, 99, snapshot=before.snapshot, data=Stream())
        assert before.trace + after.trace == whole.trace, f"cut at point {cut}"


@pytest.mark.parametrize("name", ["shuffle", "generator"])
def test_stateful_loader_in_a_plain_loop(name: str) -> None:
    whole = stateful_run(STATEFUL[name], 1, body=plain_loop)
    for cut in range(whole.points):
        before = stateful_run(STATEFUL[name], 1, cut=cut, body=plain_loop)
        after = stateful_run(STATEFUL[name], 99, snapshot=before.snapshot, body=plain_loop)
        assert before.trace + after.trace == whole.trace, f"cut at point {cut}"


def test_stateful_loader_begin_epoch_drops_the_position() -> None:
    loader = stateful({}, 1)
    part = StatefulLoaderPart(loader)
    part.begin_epoch()
    next(iter(loader))

    def other() -> tuple[Any, StatefulLoaderPart]:
        fresh = stateful({}, 1)
        loaded = StatefulLoaderPart(fresh)
        loaded.load_state_dict(copied(part.state_dict()))
        return fresh, loaded

    rng = torch.get_rng_state()
    assert list(other()[0]) == WHOLE[1:]
    fresh, loaded = other()
    loaded.begin_epoch()
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(fresh) == WHOLE
    part.begin_epoch()
    fresh, loaded = other()
    assert loaded.state_dict()["new_epoch"]
    assert list(fresh) == WHOLE
    next(iter(loader))
    assert list(other()[0]) == WHOLE[1:]


def test_stateful_loader_is_not_started_by_saving() -> None:
    loader = stateful({"shuffle": True, "num_workers": 2}, 1)
    rng = torch.get_rng_state()
    state = copied(StatefulLoaderPart(loader).state_dict())
    assert loader._iterator is None
    assert torch.equal(torch.get_rng_state(), rng)
    used = stateful({"shuffle": True}, 1)
    assert len(list(used)) == 3
    StatefulLoaderPart(used).load_state_dict(state)
    assert used._iterator is None
    assert len(list(used)) == 3


def test_stateful_loader_that_its_owner_has_loaded() -> None:
    first, second, third = (stateful({}, 1) for _ in range(3))
    next(iter(first))
    second.load_state_dict(copied(first.state_dict()))
    state = copied(StatefulLoaderPart(second).state_dict())
    StatefulLoaderPart(third).load_state_dict(state)
    assert list(third) == list(second) == WHOLE[1:]


def test_only_a_stateful_loader_needs_a_stand_in() -> None:
    loader = resumable(seven())
    assert as_part(loader) is loader
    assert isinstance(as_part(stateful({}, 1)), StatefulLoaderPart)
    with pytest.raises(ConfigError, match="state_dict of its own"):
        resumable(stateful({}, 1))


def test_another_state_is_refused_by_a_stateful_loader() -> None:
    part = StatefulLoaderPart(stateful({}, 1))
    for state in ({}, {"format": 1}, seven):
        with pytest.raises(MismatchError):
            part.load_state_dict(state)  # type: ignore[arg-type]  # not a state


def test_an_iterator_that_a_break_left_and_somebody_holds_encloses_nothing() -> None:
    """An epoch was repeated after a resume: a held iterator of another loader looked like a loop
    around it."""
    other, loader = resumable(DataLoader(Ids())), resumable(DataLoader(Ids(), batch_size=2))
    held = iter(other)
    next(held)
    loader.begin_epoch()
    assert len(list(loader)) == 4
    resumed = resumable(DataLoader(Ids(), batch_size=2))
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    assert next(held) is not None
