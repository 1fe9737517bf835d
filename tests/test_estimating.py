"""What a run will need, told before its first step, is what it has after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_same

import pysnap
from pysnap import estimating, rng


def model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3)
    )


class Averaged(torch.optim.Optimizer):
    """Somebody's own: a tensor for each parameter, drawn at random, and one for each of its
    rows."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.steps: list[int] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # as torch has it
        self.steps.append(1)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["noise"] = torch.rand(parameter.shape, dtype=torch.float64)
                    state["rows"] = parameter.new_zeros(parameter.shape[0])
                parameter.add_(parameter.grad, alpha=-group["lr"])


class Peeking(Averaged):
    """One that looks at values, of which there are none on the device meta."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # as torch has it
        assert all(float(p.grad.sum()) < 1e9 for p in self.param_groups[0]["params"])
        super().step(closure)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p),
    "Adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "own": lambda p: Averaged(p),
}
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5 on
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor(p)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(4, 6)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_that_a_fresh_optimizer_will_make_is_known(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    before = estimating.estimate(net, optimizer)
    assert before.exact and not caplog.records
    train(net, optimizer)
    after = estimating.estimate(net, optimizer)
    assert after.devices["cpu"].total == before.devices["cpu"].total
    assert after.snapshot == before.snapshot
    assert after.devices["cpu"].missing == 0


def test_to_estimate_leaves_everything_as_it_is() -> None:
    net = model()
    optimizer = Averaged(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    called: list[object] = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    before = rng.capture(), {name: value.clone() for name, value in net.state_dict().items()}
    assert estimating.estimate(net, optimizer).exact
    assert_same((rng.capture(), dict(net.state_dict())), before)
    assert not called and not optimizer.state and not optimizer.steps
    assert all(parameter.grad is None for parameter in net.parameters())
    assert scheduler.last_epoch == 0


def test_weights_gradients_and_optimizer_are_counted() -> None:
    net = torch.nn.Linear(10, 10, bias=False)
    frozen = torch.nn.Linear(10, 10, bias=False).requires_grad_(False)
    tied = torch.nn.Sequential(net, net, frozen)
    found = estimating.estimate(tied, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    need = found.devices["cpu"]
    assert (need.weights, need.gradients, need.optimizer) == (800, 400, 400)
    assert need.missing == 800 and need.total == 1600
    assert found.fits and "gradients 400 B" in str(found)


def test_a_model_that_is_nowhere_yet() -> None:
    with torch.device("meta"):
        net = torch.nn.Linear(10**5, 10**5, bias=False)
    found = pysnap.estimate(net, torch.optim.AdamW(net.parameters()))
    need = found.devices["meta"]
    assert need.weights == 4 * 10**10 and need.optimizer == 8 * 10**10
    assert need.missing == 16 * 10**10 and need.free is None
    assert "160 GB" in str(found)


def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "available_memory", lambda: 1000)
    net = torch.nn.Linear(100, 100)
    found = estimating.estimate(net, torch.optim.AdamW(net.parameters()))
    assert not found.fits and "it does not fit" in str(found)


def test_an_optimizer_that_cannot_be_foreseen_is_told_and_taken_for_two_tensors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = torch.nn.Linear(10, 10, bias=False)
    found = estimating.estimate(net, Peeking(net.parameters()))
    assert not found.exact and found.devices["cpu"].optimizer == 800
    assert "Peeking" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_the_history_of_lbfgs_is_bounded_by_what_is_foreseen() -> None:
    torch.manual_seed(0)  # from some weights it is at the end before its history is full
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), history_size=5, line_search_fn="strong_wolfe")
    foreseen = estimating.estimate(net, optimizer).devices["cpu"].optimizer

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(4, 6)).square().sum()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    (state,) = optimizer.state.values()
    held = [state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]]
    assert 0.7 * foreseen < sum(tensor.nbytes for tensor in held) <= foreseen


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3),), "model is a Tensor"),
        ((torch.nn.Linear(1, 1), ["adam"]), "optimizer is a str"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(pysnap.ConfigError, match=words):
        pysnap.estimate(*arguments)
