"""What a module or an optimizer has to store is what its `state_dict` says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pysnap.parts import ModulePart, States


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.ModuleList([self.first, nn.Sequential(nn.Linear(3, 1))])
        self.register_module("nothing", None)
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self.weights = nn.ParameterDict({"a": nn.Parameter(torch.zeros(1))})


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"n": 1}


class OwnDict(nn.Linear):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = super().state_dict(*args, **options)
        state[options["prefix"] + "more"] = torch.zeros(1)
        return state


class OwnSave(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "other"] = self.weight


def add_hook(net: Net) -> None:
    def hook(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        del state[prefix + "0.bias"]

    # Public from torch 2.5 on.
    net.tied[1]._register_state_dict_hook(hook)


HOOKED = torch.ones(5)


def add_pre_hook(net: Net) -> None:
    def hook(module: Any, prefix: str, keep_vars: bool) -> None:
        module.kept = HOOKED

    net.register_state_dict_pre_hook(hook)


def own_method(net: Net) -> None:
    def state_dict(*, destination: Any, prefix: str, **_: Any) -> None:
        destination[prefix + "patched"] = torch.zeros(1)

    net.norm.state_dict = state_dict  # type: ignore[assignment,method-assign]  # a program's patch


def own_save(net: Net) -> None:
    net.norm._save_to_state_dict = lambda *_: None  # type: ignore[method-assign]  # a program's patch


CHANGES: dict[str, Callable[[Net], object]] = {
    "nothing": lambda net: None,
    "parameter": lambda net: setattr(net.first, "weight", nn.Parameter(torch.ones(4))),
    "no parameter": lambda net: setattr(net.first, "weight", None),
    "buffer": lambda net: setattr(net, "kept", torch.ones(3)),
    "a new buffer": lambda net: net.norm.register_buffer("late", torch.ones(3)),
    "a module of a known type": lambda net: net.tied.append(nn.Linear(1, 1)),
    "a module less": lambda net: delattr(net, "norm"),
    "extra state": lambda net: net.add_module("late", Extra(1, 1)),
    "its own state_dict": lambda net: net.add_module("late", OwnDict(1, 1)),
    "its own saving": lambda net: net.add_module("late", OwnSave(1, 1)),
    "hook": add_hook,
    "pre-hook": add_pre_hook,
    "a method of one object": own_method,
    "saving of one object": own_save,
}


def same(state: Any, other: Any) -> bool:
    return (
        type(state) is OrderedDict
        and list(state) == list(other)
        and all(
            state[key] is other[key] or (key.endswith("_extra_state") and state[key] == other[key])
            for key in other
            if not key.endswith("more") and not key.endswith("patched")
        )
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_module_says_what_torch_says(change: str, when: str) -> None:
    net = Net()
    part = ModulePart(net)
    if when == "before":
        CHANGES[change](net)
    for _ in range(3):
        assert same(part.state_dict(), net.state_dict(keep_vars=True))
    if when == "after":
        CHANGES[change](net)
        for _ in range(3):
            assert same(part.state_dict(), net.state_dict(keep_vars=True))


@pytest.mark.parametrize("name", ["state_dict", "_save_to_state_dict", "get_extra_state"])
def test_a_method_that_a_program_gives_to_all_modules(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    part = ModulePart(net)
    for _ in range(2):
        part.state_dict()
    method = getattr(nn.Module, name)
    called = []

    def patched(self: nn.Module, *args: Any, **options: Any) -> Any:
        called.append(self)
        return {} if name == "get_extra_state" else method(self, *args, **options)

    monkeypatch.setattr(nn.BatchNorm1d, name, patched)
    part.state_dict()
    assert called == [net.norm]


def test_a_plain_module_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    part = ModulePart(net)
    expected = part.state_dict()

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(torch.Tensor, "detach", asked)
    monkeypatch.setattr(nn.Module, "named_modules", asked)
    assert same(part.state_dict(), expected)


def test_what_torch_says_otherwise_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later torch may store more."""
    save = nn.Module._save_to_state_dict

    def more(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        save(self, destination, prefix, keep_vars)
        destination[prefix + "new"] = None

    monkeypatch.setattr(nn.Module, "_save_to_state_dict", more)
    monkeypatch.setattr("pysnap.parts._SAVE", more)
    part = ModulePart(Net())
    for _ in range(2):
        assert "first.new" in part.state_dict()


# Optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": torch.optim.Adam,
    "AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
    "Adam with a tensor as lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
}


class OwnOptimizer(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"more": 1}


def trained(make: Callable[[Any], torch.optim.Optimizer], *, frozen: int = -1) -> Any:
    """An optimizer of two groups behind a step; one parameter may have no gradient."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = make([{"params": parameters[:1]}, {"params": parameters[1:]}])
    for at, parameter in enumerate(parameters):
        if at != frozen:
            parameter.grad = torch.ones(3)
    optimizer.step()
    return optimizer


def is_torchs(state: Any, optimizer: torch.optim.Optimizer) -> bool:
    """The same objects in the same order, and no more."""
    expected = optimizer.state_dict()
    groups = zip(state["param_groups"], expected["param_groups"], strict=True)
    return (
        list(state) == list(expected)
        and list(state["state"]) == list(expected["state"])
        and all(state["state"][key] is expected["state"][key] for key in expected["state"])
        and all(list(group) == list(other) and str(group) == str(other) for group, other in groups)
    )


@pytest.mark.parametrize("frozen", [-1, 0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_says_what_torch_says(name: str, frozen: int) -> None:
    optimizer = trained(OPTIMIZERS[name], frozen=frozen)
    states = States()
    for _ in range(3):
        assert is_torchs(states.of(optimizer), optimizer)


def test_states_in_another_order_than_their_parameters_keep_their_numbers() -> None:
    optimizer = trained(torch.optim.Adam)
    states = States()
    states.of(optimizer)
    first = next(iter(optimizer.state))
    optimizer.state[first] = optimizer.state.pop(first)
    assert is_torchs(states.of(optimizer), optimizer)
    assert list(states.of(optimizer)["state"]) == [1, 2, 3, 0]


def test_a_plain_optimizer_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = trained(torch.optim.Adam)
    states = States()
    expected = states.of(optimizer)
    monkeypatch.setattr("pysnap.parts._says_the_same", None)
    assert str(states.of(optimizer)) == str(expected)


def test_an_optimizer_with_a_method_of_its_own_is_asked() -> None:
    optimizer = trained(lambda p: OwnOptimizer(p, lr=0.1, momentum=0.9))
    states = States()
    for _ in range(2):
        assert states.of(optimizer)["more"] == 1


def test_a_method_of_its_own_that_says_more_later_is_asked() -> None:
    more: dict[str, Any] = {}

    class Late(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | more

    optimizer = trained(lambda p: Late(p, lr=0.1, momentum=0.9))
    states = States()
    states.of(optimizer)
    more["more"] = 1
    assert states.of(optimizer)["more"] == 1


def test_a_state_that_belongs_to_no_parameter_keeps_its_key() -> None:
    optimizer = trained(torch.optim.Adam)
    states = States()
    states.of(optimizer)
    optimizer.state["calls"] = {"count": 7}
    assert is_torchs(states.of(optimizer), optimizer)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["pre", "post", "instance"])
def test_hooks_of_an_optimizer_are_called(kind: str, when: str) -> None:
    optimizer = trained(torch.optim.Adam)
    states = States()
    called = []

    def pre(_: Any) -> None:
        called.append(kind)

    def post(_: Any, state: Any) -> None:
        called.append(kind)

    def own() -> Any:
        called.append(kind)
        return torch.optim.Adam.state_dict(optimizer)

    if when == "after":
        states.of(optimizer)
    if kind == "pre":
        optimizer.register_state_dict_pre_hook(pre)
    elif kind == "post":
        optimizer.register_state_dict_post_hook(post)
    else:
        optimizer.state_dict = own
    for _ in range(2):
        states.of(optimizer)
    assert called == [kind, kind]


def test_what_torch_says_otherwise_of_an_optimizer_is_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A later torch may store more."""
    state_dict = torch.optim.Optimizer.state_dict

    def more(self: torch.optim.Optimizer) -> Any:
        return state_dict(self) | {"new": 1}

    monkeypatch.setattr(torch.optim.Optimizer, "state_dict", more)
    monkeypatch.setattr("pysnap.parts._OPTIMIZER_STATE_DICT", more)
    optimizer = trained(torch.optim.Adam)
    states = States()
    for _ in range(2):
        assert states.of(optimizer)["new"] == 1
