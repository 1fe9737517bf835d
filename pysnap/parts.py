"""What a user registers: anything with `state_dict`/`load_state_dict`, or a plain container that
is filled in place."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pysnap.errors import ConfigError
from pysnap.layout import Leaf
from pysnap.loader import as_part as as_loader_part

RESERVED = ("progress", "rng")
"""Names in a snapshot that belong to pysnap."""


@runtime_checkable
class Stateful(Protocol):
    """The protocol of torch, torchdata and DCP."""

    def state_dict(self) -> Any:
        """The state, as nested plain values and tensors."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over a state that `state_dict` returned."""


class ModulePart:
    """A module under the keys of the plain one, whatever wraps it or modules in it:
    `torch.compile`, DataParallel, DistributedDataParallel."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._known: set[type] = set()  # of modules that `_gather` is known to do right

    def state_dict(self) -> dict[str, Any]:
        gathered = _gathered(self._module)
        if gathered is not None and gathered.kinds <= self._known:
            return gathered.state
        # The module's own tensors, where it has no method of its own for this: detached ones are
        # thousands of new objects in every snapshot.
        plain = type(self._module).state_dict is torch.nn.Module.state_dict
        state = self._module.state_dict(keep_vars=True) if plain else self._module.state_dict()
        if gathered is not None and _are_same(gathered.state, state):
            self._known |= gathered.kinds
        wrappers = self._wrappers()
        if not wrappers:
            return state
        return OrderedDict((_plain(key, wrappers), value) for key, value in state.items())

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        wrappers = self._wrappers()
        if wrappers:
            state = {key: state[_plain(key, wrappers)] for key in self._module.state_dict()}
        self._module.load_state_dict(state)

    def _wrappers(self) -> list[tuple[str, str]]:
        """For each wrapper, the beginning of the keys behind it and what that is for the plain
        module; the innermost first."""
        found = []
        for name, module in self._module.named_modules(remove_duplicate=False):
            inner = _wrapped_name(type(module))
            if inner is not None:
                plain = f"{name}." if name else ""
                found.append((f"{plain}{inner}.", plain))
        return found[::-1]


@dataclass
class _Gathered:
    """What a module has to store, and the types of the modules in it."""

    state: OrderedDict[str, Any]
    kinds: set[type]


def _gathered(module: torch.nn.Module) -> _Gathered | None:
    """The `state_dict(keep_vars=True)` of a module that is plain, as all in it, in a small part of
    the time; None for others, that wrap modules, have hooks or methods of their own."""
    found = _Gathered(OrderedDict(), set())
    try:
        _gather(module, "", found)
    except (LookupError, AttributeError):
        return None
    return found if all(map(_is_plain, found.kinds)) else None


def _gather(module: torch.nn.Module, prefix: str, found: _Gathered) -> None:
    own = module.__dict__
    if own["_state_dict_hooks"] or own["_state_dict_pre_hooks"] or not _OWN.isdisjoint(own):
        raise LookupError
    found.kinds.add(type(module))
    state = found.state
    for name, parameter in own["_parameters"].items():
        if parameter is not None:
            state[prefix + name] = parameter
    for name, buffer in own["_buffers"].items():
        if buffer is not None and name not in own["_non_persistent_buffers_set"]:
            state[prefix + name] = buffer
    for name, child in own["_modules"].items():
        if child is not None:
            _gather(child, f"{prefix}{name}.", found)


_OWN = frozenset({"state_dict", "_save_to_state_dict"})


def _is_plain(kind: type[torch.nn.Module]) -> bool:
    return (
        kind.state_dict is _STATE_DICT
        and kind._save_to_state_dict is _SAVE
        and kind.get_extra_state is _EXTRA_STATE
        and _wrapped_name(kind) is None
    )


_STATE_DICT = torch.nn.Module.state_dict
_SAVE = torch.nn.Module._save_to_state_dict
_EXTRA_STATE = torch.nn.Module.get_extra_state


def _are_same(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (
        type(state) is type(other)
        and list(state) == list(other)
        and all(map(operator.is_, state.values(), other.values()))
    )


def _wrapped_name(kind: type) -> str | None:
    """The attribute in which a wrapper of this type holds the module it wraps."""
    if issubclass(kind, (DataParallel, DistributedDataParallel)):
        return "module"
    return "_orig_mod" if kind.__name__ == "OptimizedModule" else None


def _plain(key: str, wrappers: list[tuple[str, str]]) -> str:
    for wrapped, plain in wrappers:
        if key.startswith(wrapped):
            key = plain + key[len(wrapped) :]
    return key


class States:
    """What parts have to store: their `state_dict()`, of most optimizers put together in a part of
    the time."""

    def __init__(self) -> None:
        self._known: set[type] = set()  # of optimizers, of which torch says the same

    def of(self, part: Stateful) -> Any:
        gathered = _optimizer_state(part) if isinstance(part, torch.optim.Optimizer) else None
        if gathered is not None and type(part) in self._known:
            return gathered
        state = part.state_dict()
        if gathered is not None and _says_the_same(gathered, state):
            self._known.add(type(part))
        return state


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The state of an optimizer that has no method and no hooks of its own for this, and one entry
    for each parameter, in their order; None for others."""
    if (
        type(optimizer).state_dict is not _OPTIMIZER_STATE_DICT
        or "state_dict" in vars(optimizer)
        or optimizer._optimizer_state_dict_pre_hooks
        or optimizer._optimizer_state_dict_post_hooks
    ):
        return None
    parameters: list[torch.Tensor] = []
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        first = len(parameters)
        parameters += group["params"]
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append(rest | {"params": list(range(first, len(parameters)))})
    states = optimizer.state
    if len(states) != len(parameters) or not all(map(operator.is_, states, parameters)):
        return None
    return {"state": dict(enumerate(states.values())), "param_groups": groups}


_OPTIMIZER_STATE_DICT = torch.optim.Optimizer.state_dict


def _says_the_same(gathered: dict[str, Any], state: Any) -> bool:
    """Whether both have the same objects under the same keys."""
    groups, others = gathered["param_groups"], state.get("param_groups", ())
    return (
        list(state) == list(gathered)
        and _are_same(state["state"], gathered["state"])
        and len(others) == len(groups)
        and all(map(_is_same_group, groups, others))
    )


def _is_same_group(group: dict[str, Any], other: dict[str, Any]) -> bool:
    # The lists of numbers are equal, but not one object.
    without = {"params": None}
    return group["params"] == other.get("params") and _are_same(group | without, other | without)


class Container:
    """A dict, list, generator, tensor or array as a part: its content is replaced in place."""

    def __init__(self, value: dict[Any, Any] | list[Any] | torch.Generator | Leaf) -> None:
        self._value = value

    def state_dict(self) -> Any:
        return self._value

    def load_state_dict(self, state: Any, /) -> None:
        value = self._value
        if isinstance(value, (dict, list, torch.Generator)):
            _adopt(value, state)
        elif isinstance(value, torch.Tensor):
            with torch.no_grad():
                value.copy_(state)
        else:
            value[...] = state


def _adopt(live: Any, saved: Any) -> Any:
    """`saved`, as the live object where that can become it: the program holds generators and nested
    containers by reference."""
    if isinstance(live, torch.Generator) and isinstance(saved, torch.Generator):
        live.set_state(saved.get_state())
        return live
    if type(live) is dict and type(saved) is dict:
        adopted = {key: _adopt(live.get(key), item) for key, item in saved.items()}
        live.clear()
        live.update(adopted)
        return live
    if type(live) is list and type(saved) is list:
        before = live + [None] * len(saved)
        live[:] = [_adopt(old, item) for old, item in zip(before, saved, strict=False)]
        return live
    return saved


def as_part(name: str, value: object) -> Stateful:
    """A registered object as a part. Raises ConfigError for what could not be put back."""
    if name in RESERVED:
        raise ConfigError(
            f"{name!r} is a name of pysnap's own; register the object under another keyword"
        )
    if isinstance(value, torch.nn.Module):
        return ModulePart(value)
    if isinstance(value, Stateful) and not isinstance(value, type):
        adapted: Stateful = as_loader_part(value)
        return adapted
    if isinstance(value, (dict, list, torch.Generator, torch.Tensor, np.ndarray)):
        return Container(value)
    raise ConfigError(
        f"{name} is a {type(value).__qualname__}, which has no state_dict and load_state_dict and "
        "cannot be filled in place; register an object that has them, or put the value into a dict"
    )
