"""audit(): programs that repeat themselves pass; for the others the cause is named."""

from __future__ import annotations

import copy
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Noisy, Run, assert_same
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import pysnap


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an audit puts its snapshot."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


class Program(Run):
    """A run that trains one step at a call; `own` is what a user adds to the loss."""

    def __init__(self, own: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self.own = own
        self.calls = 0

    def step(self) -> None:
        self.calls += 1
        self.train_on(next(iter(self.loader)))

    def train_on(self, batch: torch.Tensor) -> None:
        loss = (self.model(batch) - batch).square().mean() * (1 + self.own())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()

    def everything(self) -> dict[str, Any]:
        return {**self.state(), "loader": self.loader.state_dict()}


class Part:
    """A state that two functions get and set."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self.state_dict = get
        self.load_state_dict = put


def kinds(audit: pysnap.Audit) -> set[str]:
    return {difference.kind for difference in audit.differences}


def counter() -> Callable[[], int]:
    """Counts its calls, where no snapshot sees it."""
    count = 0

    def call() -> int:
        nonlocal count
        count += 1
        return count

    return call


# Programs that repeat themselves


def test_a_deterministic_program_passes() -> None:
    program = Program()
    audit = pysnap.audit(program.step, **program.parts)
    assert audit.same and audit == pysnap.Audit(3, ())
    assert program.calls == 6
    assert str(audit).startswith("deterministic: ") and "steps: 3" in str(audit)


def test_a_step_may_be_whole_epochs() -> None:
    program = Program()

    def step() -> None:
        for _ in range(2):
            for batch in program.loader:
                program.train_on(batch)

    assert pysnap.audit(step, steps=2, **program.parts).same


def test_a_program_in_the_middle_of_training_passes() -> None:
    program = Program()
    for _ in range(4):
        program.step()
    assert pysnap.audit(program.step, **program.parts).same


@pytest.mark.filterwarnings("ignore:'set_vital':UserWarning")
def test_a_loader_of_torchdata_passes() -> None:
    program = Program()
    loader = StatefulDataLoader(Noisy(22), batch_size=4, shuffle=True)
    parts = {**program.parts, "loader": loader}
    assert pysnap.audit(lambda: program.train_on(next(iter(loader))), **parts).same


def test_every_kind_of_value_is_compared_by_its_bits() -> None:
    values: dict[str, Any] = {"count": 0}

    def step() -> None:
        values["count"] += 1
        values["nan"] = math.nan
        values["plain"] = [(), {}, {1, 2}, b"x", None, np.float32(1), {0: 1, "0": 2}]
        values["tensors"] = [
            torch.empty(0, 3),
            torch.tensor(math.nan),
            torch.ones(2, 3, 4).transpose(0, 2),
            torch.ones(2, dtype=torch.complex64).conj(),
            torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        ]
        values["arrays"] = [np.empty((0, 2)), np.array("2026-01-01", "M8[D]"), np.array(["a"])]
        values["strided"] = [torch.arange(6)[::2], np.arange(6)[::2]]

    assert pysnap.audit(step, values=values).same
    assert values == {"count": 0}


# Programs that do not


@pytest.mark.parametrize("library", ["torch", "python", "numpy"])
def test_a_generator_of_ones_own_has_to_be_registered(library: str) -> None:
    torch_generator = torch.Generator()
    torch_generator.seed()
    python_generator = random.Random()
    numpy_generator = np.random.default_rng()
    draw: dict[str, Callable[[], float]] = {
        "torch": lambda: torch.rand((), generator=torch_generator).item(),
        "python": python_generator.random,
        "numpy": numpy_generator.random,
    }
    parts: dict[str, object] = {
        "torch": torch_generator,
        "python": Part(python_generator.getstate, python_generator.setstate),
        "numpy": Part(
            lambda: numpy_generator.bit_generator.state,
            lambda state: setattr(numpy_generator.bit_generator, "state", state),
        ),
    }
    program = Program(draw[library])
    audit = pysnap.audit(program.step, **program.parts)
    assert not audit.same and audit.steps == 1
    assert kinds(audit) == {"tensor"}
    assert "random generator of your own" in str(audit)

    assert pysnap.audit(program.step, **program.parts, noise=parts[library]).same


def test_a_counter_that_was_not_registered() -> None:
    program = Program(counter())
    audit = pysnap.audit(program.step, **program.parts)
    first = audit.differences[0]
    assert (first.path, first.kind) == ("model/0.weight", "tensor")
    assert first.what == "float32[16, 6], other bits"
    text = str(audit)
    assert "after step 1" in text and "model/0.weight" in text
    assert f"and {len(audit.differences) - 1} more (tensor: " in text
    assert "counter" in text and "use_deterministic_algorithms" in text


def test_an_optimizer_that_was_not_registered() -> None:
    program = Program()
    del (parts := program.parts)["optimizer"]
    audit = pysnap.audit(program.step, **parts)
    assert audit.differences[0].path.startswith("model/") and "an optimizer" in str(audit)


def test_a_scheduler_that_was_not_registered_shows_in_the_learning_rate() -> None:
    program = Program()
    del (parts := program.parts)["scheduler"]
    audit = pysnap.audit(program.step, **parts)
    first = audit.differences[0]
    assert (first.path, first.kind) == ("optimizer/param_groups/0/lr", "value")
    assert first.what == "0.002 in the first run, 0.005 in the second"


def test_a_loader_with_a_generator_of_its_own_that_was_not_registered() -> None:
    program = Program()
    samples = TensorDataset(torch.randn(22, 6))
    loader: Any = DataLoader(samples, batch_size=4, shuffle=True, generator=torch.Generator())
    del (parts := program.parts)["loader"]

    def step() -> None:
        program.train_on(next(iter(loader))[0])

    audit = pysnap.audit(step, **parts)
    assert kinds(audit) == {"tensor"} and "a loader" in str(audit)

    loader = pysnap.resumable(loader)
    assert pysnap.audit(step, **parts, loader=loader).same


def test_an_iterator_that_began_before_the_step() -> None:
    program = Program()
    batches = iter(program.loader)
    audit = pysnap.audit(lambda: program.train_on(next(batches)), steps=2, **program.parts)
    assert audit.differences[0].kind == "random state"
    assert "iterator over a loader that began before the step" in str(audit)


def test_another_number_of_draws_is_told_before_what_follows_from_it() -> None:
    own = random.Random(1)
    program = Program(lambda: torch.rand(own.randrange(1, 100)).sum().item())
    audit = pysnap.audit(program.step, **program.parts)
    first = audit.differences[0]
    assert (first.path, first.kind) == ("rng/torch", "random state")
    assert "tensor" in kinds(audit)
    assert "a different number of times" in str(audit)


def test_another_number_of_batches_is_told_as_the_position_of_the_loader() -> None:
    loader = pysnap.resumable(DataLoader(TensorDataset(torch.arange(40.0)), shuffle=True))
    total = torch.zeros(())
    calls = counter()

    def step() -> None:
        for _, (batch,) in zip(range(calls()), loader, strict=False):
            total.add_(batch.sum())

    audit = pysnap.audit(step, steps=1, total=total, loader=loader)
    first = audit.differences[0]
    assert (first.path, first.kind) == ("loader/position/delivered", "loader position")
    assert audit.differences[-1].path == "total"
    assert "The loader stands elsewhere" in str(audit)


def test_what_the_system_draws() -> None:
    program = Program(lambda: int.from_bytes(os.urandom(4), "little") / 2**32)
    audit = pysnap.audit(program.step, **program.parts)
    assert audit.steps == 1 and kinds(audit) == {"tensor"}


def test_a_difference_in_the_second_step_alone_is_found_there() -> None:
    progress = {"step": 0}
    calls = counter()

    def own() -> float:
        progress["step"] += 1
        return calls() if progress["step"] == 2 else 0

    program = Program(own)
    audit = pysnap.audit(program.step, steps=4, **program.parts, own=progress)
    assert not audit.same and audit.steps == 2
    assert "after step 2" in str(audit)
    assert program.calls == 4 + 2


def test_a_buffer_that_no_state_dict_holds() -> None:
    class Average(torch.nn.Module):
        mean: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6), persistent=False)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            self.mean = 0.9 * self.mean + 0.1 * batch.detach().mean(0)
            return batch - self.mean

    program = Program()
    program.model.insert(0, Average())
    audit = pysnap.audit(program.step, **program.parts)
    assert kinds(audit) == {"tensor"} and "non-persistent buffer" in str(audit)


def test_gradients_that_a_step_leaves_behind() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(3)).sum().backward()
        optimizer.step()

    audit = pysnap.audit(step, model=model, optimizer=optimizer)
    assert not audit.same and "gradients" in str(audit)


@pytest.mark.parametrize(
    ("make", "kind", "what"),
    [
        (lambda n: torch.full((2, 3), n).T, "tensor", "int64[3, 2], other bits"),
        (lambda n: torch.tensor(n, dtype=torch.bfloat16), "tensor", "bfloat16[], other bits"),
        (lambda n: torch.zeros(n), "tensor", "float32[1] in the first run, float32[2] in the s"),
        (lambda n: np.array(n, ">i4"), "tensor", ">i4[], other bits"),
        (lambda n: np.full((2, 3), n, "M8[D]").T, "tensor", "<M8[D][3, 2], other bits"),
        (lambda n: torch.Generator().manual_seed(n), "random state", "a torch.Generator, other"),
        (lambda n: 0.0 if n == 1 else -0.0, "value", "0.0 in the first run, -0.0 in the second"),
        (lambda n: n == 1, "value", "True in the first run, False in the second"),
        (lambda n: {"0": 0, 0: n}, "value", "1 in the first run, 2 in the second"),
        (lambda n: {0: n, "0": 0}, "value", "1 in the first run, 2 in the second"),
        (lambda n: {f"a{n}": 5}, "value", "5 in the first run, missing in the second"),
        (lambda n: [{}] * n, "value", "missing in the first run, {} in the second"),
        (lambda n: f"{'a' * 99}{n}{'b' * 99}", "value", "'aaaaaaaaaaaa...bbbbbbbbbbbbb', other"),
    ],
)
def test_a_change_of_every_kind_of_value_is_found(
    make: Callable[[int], object], kind: str, what: str
) -> None:
    values: dict[str, object] = {}
    calls = counter()
    audit = pysnap.audit(lambda: values.update(x=make(calls())), steps=1, values=values)
    first = audit.differences[0]
    assert first.path.startswith("values/x") and first.kind == kind
    assert first.what.startswith(what)
    assert str(first) in str(audit)


def test_a_part_that_is_not_put_back_is_found_before_the_first_step() -> None:
    count = {"a": 0}
    part = Part(lambda: dict(count), lambda state: None)
    audit = pysnap.audit(lambda: count.update(a=count["a"] + 1), part=part)
    assert audit.steps == 0 and not audit.same
    assert audit.differences == (
        pysnap.Difference("part/a", "value", "0 in the first run, 3 in the second"),
    )
    assert "before the first step" in str(audit) and "load_state_dict" in str(audit)


# What an audit leaves behind


def test_training_goes_on_as_if_there_had_been_no_audit(tmp_path: Path) -> None:
    def losses(audited: bool) -> Iterator[tuple[int, str]]:
        program = Program(counter() if audited else lambda: 0.0)
        if audited:
            assert not pysnap.audit(program.step, **program.parts).same
            program.own = lambda: 0.0
        with pysnap.Snapshotter(tmp_path / str(audited), **program.parts) as snapshotter:
            yield from program.train(snapshotter, epochs=2)

    assert list(losses(True)) == list(losses(False))


@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("own", [lambda: 0.0, counter()], ids=["same", "different"])
def test_the_state_is_as_before(own: Callable[[], float], trained: int, temporary: Path) -> None:
    program = Program(own)
    for _ in range(trained):
        program.step()
    noise = torch.Generator().manual_seed(3)
    before = copy.deepcopy(program.everything())
    pysnap.audit(program.step, **program.parts, noise=noise)
    assert_same(program.everything(), before)
    assert_same(noise.get_state(), torch.Generator().manual_seed(3).get_state())
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("kind", [ValueError, StopIteration, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_exception_of_the_step_is_raised_and_the_state_is_as_before(
    call: int, kind: type[BaseException], temporary: Path
) -> None:
    program = Program()
    before = copy.deepcopy(program.everything())

    def step() -> None:
        program.step()
        if program.calls == call:
            raise kind("mine")

    with pytest.raises(kind, match="mine"):
        pysnap.audit(step, **program.parts)
    assert program.calls == call
    assert_same(program.everything(), before)
    assert not list(temporary.iterdir())


def test_what_a_snapshot_could_not_hold_is_refused(temporary: Path) -> None:
    values: dict[str, object] = {"a": 1}
    with pytest.raises(pysnap.StateError, match="hook") as raised:
        pysnap.audit(lambda: values.update(hook=print), values=values)
    assert '"values/hook"' in str(raised.value.__context__)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(("name", "value"), [("PYSNAP_EVERY", "1"), ("PYSNAP_RESUME", "off")])
def test_what_the_environment_says_of_the_run_is_not_for_an_audit(
    name: str, value: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    program = Program()
    before = copy.deepcopy(program.everything())
    seen: list[int] = []

    def step() -> None:
        program.step()
        seen.append(len(list(temporary.glob("*/*"))))

    assert pysnap.audit(step, **program.parts).same
    assert seen == [1] * 6
    assert_same(program.everything(), before)


# Arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pysnap.audit(None, values={}), "step is a NoneType"),  # type: ignore[arg-type]  # that is the test
        (lambda: pysnap.audit(print), "without parts"),
        (lambda: pysnap.audit(print, steps=0, values={}), "steps is 0"),
        (lambda: pysnap.audit(print, steps=True, values={}), "steps is True"),
        (lambda: pysnap.audit(print, steps="3", values={}), "steps is '3'"),  # type: ignore[arg-type]  # that is the test
        (lambda: pysnap.audit(print, values=3), "values is a int"),
        (lambda: pysnap.audit(print, rng={}), "'rng' is a name of pysnap's own"),
    ],
)
def test_arguments_that_cannot_be(
    call: Callable[[], object], message: str, temporary: Path
) -> None:
    with pytest.raises(pysnap.ConfigError, match=message):
        call()
    assert not list(temporary.iterdir())


def test_a_part_may_be_called_step() -> None:
    assert pysnap.audit(lambda: None, step={"a": 1}).same
