"""What a module has to store is what its `state_dict` says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pysnap.parts import ModulePart


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

    net.tied[1].register_state_dict_post_hook(hook)


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
