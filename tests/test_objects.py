"""Objects that people register: each goes on after a resume as if it had never stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import pysnap


class Program:
    """Parts, a step of training, and what of them must be the same; made anew in each process."""

    def __init__(self) -> None:
        self.net = self.model()
        self.optimizer = torch.optim.AdamW(self.trainable(), lr=0.05)
        self.set_up()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 4))

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def set_up(self) -> None:
        """What else a program has."""

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.net(torch.randn(6, 4)).square().mean()
        return loss

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def parts(self) -> dict[str, Any]:
        return {"model": self.net, "optimizer": self.optimizer}

    def result(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}


class BatchNorm(Program):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 4))


class Buffers(Program):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scale", torch.rand(4), persistent=False)
            self.seen: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += len(x)
            out: torch.Tensor = self.linear(x) * self.seen.sqrt()
            return out

    def model(self) -> nn.Module:
        return self.Net()


class Tied(Program):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            self.outer = nn.Linear(4, 4, bias=False)
            self.outer.weight = self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.outer(torch.tanh(self.inner(x)))
            return out

    def model(self) -> nn.Module:
        return self.Net()

    def result(self) -> dict[str, Any]:
        assert self.net.inner.weight is self.net.outer.weight
        return super().result()


class PartlyShared(Program):
    """Two buffers that are views of one storage and overlap by half."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            storage = torch.rand(6)
            self.register_buffer("low", storage[:4])
            self.register_buffer("high", storage[2:])
            self.low: torch.Tensor
            self.high: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.low += 0.1
            out: torch.Tensor = self.linear(x) * self.high
            return out

    def model(self) -> nn.Module:
        return self.Net()


class Frozen(Program):
    def model(self) -> nn.Module:
        net = super().model()
        next(net.parameters()).requires_grad_(False)
        return net


class Parametrized(Program):
    def model(self) -> nn.Module:
        weighted = parametrizations.weight_norm(nn.Linear(4, 8))
        spectral = parametrizations.spectral_norm(nn.Linear(8, 4))
        return nn.Sequential(weighted, spectral)


class Adapter(Program):
    """A low-rank adapter beside a frozen layer; the adapter alone is saved."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)  # the same base weights in every process
            self.base = nn.Linear(4, 4).requires_grad_(False)
            self.adapter = nn.ModuleDict(
                {"a": nn.Linear(4, 2, bias=False), "b": nn.Linear(2, 4, bias=False)}
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.base(x) + self.adapter["b"](self.adapter["a"](x))
            return out

    def model(self) -> nn.Module:
        return self.Net()

    def parts(self) -> dict[str, Any]:
        return {"adapter": self.net.adapter, "optimizer": self.optimizer}


class ExtraState(Program):
    class Net(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    def model(self) -> nn.Module:
        return self.Net(4, 4)


class Compiled(Program):
    def model(self) -> nn.Module:
        return torch.compile(super().model(), backend="eager")  # type: ignore[return-value]  # it is a module


class Parallel(Program):
    def model(self) -> nn.Module:
        return nn.DataParallel(super().model())


class Averaged(Program):
    """An exponential moving average of the weights, and a schedule that goes with it."""

    def set_up(self) -> None:
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.schedule = SWALR(self.optimizer, swa_lr=0.01, anneal_epochs=3)
        if callable(self.schedule.state_dict().get("anneal_func")):
            pytest.skip("SWALR of this torch saves a function, as 2.4 does")

    def step(self) -> None:
        super().step()
        self.ema.update_parameters(self.net)
        self.schedule.step()

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"ema": self.ema, "schedule": self.schedule}


class Scaled(Program):
    """A gradient scaler that has skipped a step and grows."""

    def set_up(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.loss()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scaler.get_scale() < 2.0**119 else 2.0**10)

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"scaler": self.scaler}


class TwoOptimizers(Program):
    def set_up(self) -> None:
        weights = [p for p in self.net.parameters() if p.dim() == 2]
        biases = [p for p in self.net.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True)  # type: ignore[assignment]  # another one
        self.second = torch.optim.Adagrad(biases, lr=0.1)
        self.count = 0

    def step(self) -> None:
        # The second one steps every other time, on the gradients of that time alone.
        self.second.zero_grad()
        super().step()
        self.count += 1
        if self.count % 2 == 0:
            self.second.step()

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"second": self.second, "own": Counted(self)}


class Counted:
    """Anything with state_dict and load_state_dict."""

    def __init__(self, program: TwoOptimizers) -> None:
        self._program = program

    def state_dict(self) -> dict[str, int]:
        return {"count": self._program.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._program.count = state["count"]


class TensorRate(Program):
    """The learning rate is a tensor, and amsgrad has one more of the size of the weights."""

    def set_up(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=torch.tensor(0.05), amsgrad=True, foreach=False
        )


class LateGroup(Program):
    """A group of parameters that is added at the third step; a program that goes on behind it adds
    the group itself."""

    def set_up(self) -> None:
        self.net.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net[3].requires_grad_().parameters(), lr=0.05)  # type: ignore[index]  # a Sequential
        self.steps = {"done": 0}

    def grow(self) -> None:
        self.optimizer.add_param_group(
            {"params": list(self.net[0].requires_grad_().parameters()), "lr": 0.01}  # type: ignore[index]  # a Sequential
        )

    def step(self) -> None:
        if self.steps["done"] == 2:
            self.grow()
        self.steps["done"] += 1
        super().step()

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"steps": self.steps}

    def result(self) -> dict[str, Any]:
        return {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}


class Nested(Program):
    """Plain nested values."""

    def set_up(self) -> None:
        self.extra: dict[str, Any] = {
            "history": [],
            "best": (0, None),
            "by name": {"a": torch.zeros(2, dtype=torch.bfloat16)},
        }

    def step(self) -> None:
        super().step()
        self.extra["history"].append(self.loss().item())
        self.extra["best"] = (len(self.extra["history"]), min(self.extra["history"]))
        self.extra["by name"]["a"] += 1

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"extra": self.extra}

    def result(self) -> dict[str, Any]:
        return {"extra": self.extra, "model": self.net.state_dict()}


PROGRAMS: list[type[Program]] = [
    Adapter,
    Averaged,
    BatchNorm,
    Buffers,
    TensorRate,
    Compiled,
    ExtraState,
    Frozen,
    Nested,
    Parallel,
    Parametrized,
    PartlyShared,
    Scaled,
    Tied,
    TwoOptimizers,
]


def run(program: Program, snapshotter: pysnap.Snapshotter, steps: int) -> None:
    for _ in range(steps):
        with snapshotter.step():
            program.step()


@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.__name__)
def test_it_goes_on_as_if_it_had_never_stopped(tmp_path: Path, kind: type[Program]) -> None:
    torch.manual_seed(0)
    first = kind()
    with pysnap.Snapshotter(tmp_path, **first.parts()) as snapshotter:
        run(first, snapshotter, 3)
        snapshotter.save().wait()
        run(first, snapshotter, 3)
    torch.manual_seed(99)
    second = kind()
    with pysnap.Snapshotter(tmp_path, **second.parts()) as snapshotter:
        snapshotter.resume()
        # Its own copy of what the model does not save.
        if isinstance(second, Buffers):
            second.net.scale = first.net.scale
        run(second, snapshotter, 3)
    assert_same(second.result(), first.result())


def test_a_group_that_was_added_later_must_be_there_at_the_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = LateGroup()
    with pysnap.Snapshotter(tmp_path, **first.parts()) as snapshotter:
        run(first, snapshotter, 4)
        snapshotter.save().wait()
        run(first, snapshotter, 3)
    torch.manual_seed(99)
    second = LateGroup()
    with pysnap.Snapshotter(tmp_path, **second.parts()) as snapshotter:
        with pytest.raises(pysnap.MismatchError, match=r"\[2\] parameters +\[2, 2\]"):
            snapshotter.resume()
        second.grow()
        snapshotter.resume()
        run(second, snapshotter, 3)
    assert_same(second.result(), first.result())


def test_a_buffer_that_is_not_persistent_is_its_owners_to_make(tmp_path: Path) -> None:
    net = Buffers().net
    with pysnap.Snapshotter(tmp_path, model=net) as snapshotter:
        snapshotter.save().wait()
    assert set(pysnap.load(tmp_path)["model"]) == {"linear.weight", "linear.bias", "seen"}


def test_gradients_are_not_part_of_a_snapshot(tmp_path: Path) -> None:
    """They belong to a step, and a snapshot lies between two."""
    program = Program()
    with pysnap.Snapshotter(tmp_path, **program.parts()) as snapshotter:
        run(program, snapshotter, 1)
        snapshotter.save().wait()
        gradients = copy.deepcopy([parameter.grad for parameter in program.net.parameters()])
        snapshotter.resume()
    assert_same([parameter.grad for parameter in program.net.parameters()], gradients)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "sequence": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_made_before_the_resume_keeps_the_rates(tmp_path: Path, name: str) -> None:
    """A scheduler changes the rates of its optimizer when it is made; the resume comes later."""

    def rates(path: Path, steps: int, *, saves: bool) -> list[float]:
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = SCHEDULES[name](optimizer)
        with pysnap.Snapshotter(path, optimizer=optimizer, schedule=schedule) as snapshotter:
            snapshotter.resume()
            found = []
            for _ in range(steps):
                with snapshotter.step():
                    optimizer.step()
                    schedule.step(*([1.0] if name == "plateau" else []))
                found.append(optimizer.param_groups[0]["lr"])
            if saves:
                snapshotter.save().wait()
        return found

    whole = rates(tmp_path / "whole", 6, saves=False)
    first = rates(tmp_path / "cut", 3, saves=True)
    assert first + rates(tmp_path / "cut", 3, saves=False) == whole and len(set(whole)) > 2
