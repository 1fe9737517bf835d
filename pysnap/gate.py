"""The gate: what may be copied after the step that took a snapshot, and who may not pass before."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

import torch

from pysnap.devices import is_capturing

_log = logging.getLogger("pysnap")


class Gate:
    """The tensors that nothing but a registered optimizer's step changes, so that they may be
    copied until then, and the hooks before that step."""

    def __init__(self, parts: Iterable[object], wait: Callable[[], object]) -> None:
        """`wait` is called before a step of any optimizer among `parts`; it returns when everything
        is copied."""
        self._optimizers = [
            part for part in parts if isinstance(part, torch.optim.Optimizer) and _calls_hooks(part)
        ]

        def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
            wait()
            if is_capturing():
                self._leave(optimizer)

        self._hooks = [optimizer.register_step_pre_hook(hook) for optimizer in self._optimizers]

    def token(self) -> object:
        """Equal at two moments if `addresses` are the same, provided that the optimizers' tensors
        have not moved: found out much sooner than the addresses."""
        parameters = [
            list(map(id, group["params"]))
            for optimizer in self._watched()
            for group in optimizer.param_groups
        ]
        return parameters, [len(optimizer.state) for optimizer in self._watched()]

    def addresses(self) -> set[int]:
        """Where the parameters and the state of the optimizers are."""
        values: list[object] = []
        for optimizer in self._watched():
            for group in optimizer.param_groups:
                values += group["params"]
            for state in optimizer.state.values():
                values += state.values() if isinstance(state, dict) else [state]
        return {
            value.data_ptr()
            for value in values
            # Of other kinds, changes are not counted, or there is no one address.
            if isinstance(value, torch.Tensor)
            and type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.layout is torch.strided
            and not value.is_inference()
        } - {0}

    def _watched(self) -> list[torch.optim.Optimizer]:
        # Only there it can be found out whether one changed too early (see capture._Guard).
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main:
            return []
        return [optimizer for optimizer in self._optimizers if not _is_capturable(optimizer)]

    def _leave(self, optimizer: torch.optim.Optimizer) -> None:
        """Its step is in a CUDA graph, which calls no hooks and counts no changes."""
        _log.info("a step is captured in a CUDA graph: what it changes is copied at once")
        self._optimizers = [other for other in self._optimizers if other is not optimizer]

    def give_up(self) -> None:
        """Something else changes them, too: they are copied at once from now on."""
        if self._optimizers:
            _log.warning("overlap is off from now on: something changed tensors too early")
        self.close()

    def close(self) -> None:
        """Remove the hooks; safe to repeat."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers = [], []


def _is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step is made for a CUDA graph, which may have been captured before we knew it."""
    return any(group.get("capturable") for group in optimizer.param_groups)


def _calls_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the hooks are called before a step; a wrapper around an optimizer may lack them."""
    calls = getattr(type(optimizer).step, "hooked", False)
    calls = bool(calls) and hasattr(optimizer, "_optimizer_step_pre_hooks")
    if not calls:
        name = type(optimizer).__qualname__
        _log.info("%s calls no hooks before its steps: what it changes is copied at once", name)
    return calls
