"""What a user registers: anything with `state_dict`/`load_state_dict`, or a plain container that
is filled in place."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

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


class _Container:
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
    if isinstance(value, Stateful) and not isinstance(value, type):
        adapted: Stateful = as_loader_part(value)
        return adapted
    if isinstance(value, (dict, list, torch.Generator, torch.Tensor, np.ndarray)):
        return _Container(value)
    raise ConfigError(
        f"{name} is a {type(value).__qualname__}, which has no state_dict and load_state_dict and "
        "cannot be filled in place; register an object that has them, or put the value into a dict"
    )
