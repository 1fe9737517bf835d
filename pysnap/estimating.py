"""What a run will need: memory for training, bytes for a snapshot."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from pysnap import rng
from pysnap.devices import cuda_in_use
from pysnap.errors import ConfigError
from pysnap.measure import shown_size
from pysnap.memory import available_memory

_log = logging.getLogger("pysnap")

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_LOOPS = ("foreach", "fused", "capturable", "differentiable")
"""Ways to run the same arithmetic; some need a device."""


@dataclass
class DeviceNeed:
    """Bytes that training needs on one device, without activations: what a batch needs, pysnap
    cannot know."""

    weights: int = 0
    """Parameters and buffers."""
    gradients: int = 0
    optimizer: int = 0
    missing: int = 0
    """How much of it is not there yet."""
    free: int | None = None
    """Bytes that are free there now; None where nobody can tell."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer

    @property
    def fits(self) -> bool:
        """Whether what is missing fits into what is free."""
        return self.free is None or self.missing <= self.free


@dataclass
class Estimate:
    """What a run will need, in bytes."""

    devices: dict[str, DeviceNeed] = field(default_factory=dict)
    """By the name of the device, such as `cuda:0`."""
    snapshot: int = 0
    """Of one snapshot, uncompressed: weights and optimizer state."""
    exact: bool = True
    """Whether the state of every optimizer could be foreseen; else it is taken for two tensors of
    each parameter's size."""

    @property
    def fits(self) -> bool:
        """Whether it fits on every device."""
        return all(need.fits for need in self.devices.values())

    def __str__(self) -> str:
        lines = []
        for device, need in self.devices.items():
            amounts = [
                f"{name} {shown_size(size)}"
                for name, size in (
                    ("weights", need.weights),
                    ("gradients", need.gradients),
                    ("optimizer", need.optimizer),
                    ("in all, without activations,", need.total),
                    ("still to come", need.missing),
                    ("free", need.free),
                )
                if size is not None
            ]
            verdict = "" if need.fits else ": it does not fit"
            lines.append(f"{device}: {', '.join(amounts)}{verdict}")
        about = "" if self.exact else "about "
        return "\n".join([*lines, f"snapshot: {about}{shown_size(self.snapshot)}"])


def estimate(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
) -> Estimate:
    """What training `model` by `optimizer`, or by several, will need; nothing is allocated, and a
    model on the device `meta` will do. A gradient is as large as its parameter.

    Raises ConfigError for what is no module or no optimizer.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model is a {type(model).__qualname__}; it must be a torch.nn.Module")
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer is a {type(one).__qualname__}; it must be a torch.optim.Optimizer, "
                "or a list of them"
            )
    devices: defaultdict[str, DeviceNeed] = defaultdict(DeviceNeed)
    for tensor in _storages([*model.parameters(), *model.buffers()]):
        need = devices[str(tensor.device)]
        need.weights += tensor.nbytes
        need.missing += tensor.nbytes if tensor.is_meta else 0
    for parameter in _storages(p for p in model.parameters() if p.requires_grad):
        need = devices[str(parameter.device)]
        need.gradients += parameter.nbytes
        need.missing += parameter.nbytes if parameter.grad is None else 0
    exact = True
    for one in optimizers:
        for tensor in _state_tensors(one):
            devices[str(tensor.device)].optimizer += tensor.nbytes
        growth = foresee(one)
        exact &= growth.exact
        for device, size in growth.bytes.items():
            devices[device].optimizer += size
            devices[device].missing += size
    for device, need in devices.items():
        need.free = _free(device)
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) + sum(
        need.optimizer for need in devices.values()
    )
    return Estimate(dict(devices), size, exact)


@dataclass(frozen=True)
class Growth:
    """Bytes of the state that an optimizer does not have yet, by device; not `exact`: assumed."""

    bytes: dict[str, int]
    tensors: int = 0
    exact: bool = True

    def __add__(self, other: Growth) -> Growth:
        sizes = dict(self.bytes)
        for device, size in other.bytes.items():
            sizes[device] = sizes.get(device, 0) + size
        return Growth(sizes, self.tensors + other.tensors, self.exact and other.exact)

    @property
    def total(self) -> int:
        """On all devices."""
        return sum(self.bytes.values())


def foresee(optimizer: torch.optim.Optimizer) -> Growth:
    """The state that the first step of `optimizer` will make, of the parameters that have none.

    A copy of it takes that step on the device `meta`, where tensors have no bytes.
    """
    waiting = {
        id(parameter): parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not optimizer.state.get(parameter)
    }
    if not waiting:
        return Growth({})
    if isinstance(optimizer, torch.optim.LBFGS):
        return _growth_of_lbfgs(optimizer)
    before = rng.capture()
    try:
        return _after_a_step(optimizer, waiting)
    except Exception as error:
        name = type(optimizer).__qualname__
        _log.warning(
            "the state that %s will make is not known (%s: %s); it is taken for twice its "
            "parameters",
            name,
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        return _growth(((parameter, 2) for parameter in waiting.values()), exact=False)
    finally:
        rng.restore(before)


def _after_a_step(optimizer: torch.optim.Optimizer, waiting: dict[int, torch.Tensor]) -> Growth:
    shadow, real = _shadow(optimizer, waiting)
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        # Hooks belong to the program; a step that nobody takes is not for them.
        step = inspect.unwrap(step, stop=lambda inner: not getattr(inner, "hooked", False))
    try:
        step(shadow)
    except Exception:
        # There are no values to compute with; the state is made before.
        if len(shadow.state) < len(waiting):
            raise
    sizes: defaultdict[str, int] = defaultdict(int)
    tensors = 0
    for parameter, state in shadow.state.items():
        for value in state.values() if isinstance(state, dict) else [state]:
            if isinstance(value, torch.Tensor):
                place = real[id(parameter)].device if value.is_meta else value.device
                sizes[str(place)] += value.nbytes
                tensors += 1
    return Growth(dict(sizes), tensors)


def _shadow(
    optimizer: torch.optim.Optimizer, waiting: dict[int, torch.Tensor]
) -> tuple[torch.optim.Optimizer, dict[int, torch.Tensor]]:
    """A copy of the optimizer whose parameters are on the device `meta`, with gradients, and
    without state; and which parameter each of them stands for."""
    memo: dict[int, Any] = {}
    real: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            stand_in = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
            if id(parameter) in waiting:
                stand_in.grad = torch.empty_like(stand_in)
            memo[id(parameter)] = stand_in
            real[id(stand_in)] = parameter
    shadow = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        # A scheduler puts a `step` there that is bound to the optimizer itself.
        if name not in ("state", "step", *_HOOKS):
            vars(shadow)[name] = copy.deepcopy(value, memo)
    for name in _HOOKS:
        vars(shadow)[name] = {}
    shadow.state = defaultdict(dict)
    for group in shadow.param_groups:
        group.update({name: False for name in _LOOPS if name in group})
    return shadow, real


def _growth_of_lbfgs(optimizer: torch.optim.LBFGS) -> Growth:
    """It keeps its history under its first parameter, and asks for closures and values."""
    group = optimizer.param_groups[0]
    # Of directions and of steps; the last direction, gradient and, in a line search, weights.
    return _growth(((one, 2 * group["history_size"] + 3) for one in group["params"]), exact=True)


def _growth(counts: Iterable[tuple[torch.Tensor, int]], *, exact: bool) -> Growth:
    """So many tensors of the size of each."""
    sizes: defaultdict[str, int] = defaultdict(int)
    tensors = 0
    for tensor, count in counts:
        sizes[str(tensor.device)] += count * tensor.nbytes
        tensors += count
    return Growth(dict(sizes), tensors, exact)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in (state.values() if isinstance(state, dict) else [state])
        if isinstance(value, torch.Tensor)
    ]


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor once: tied weights are one."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _free(device: str) -> int | None:
    kind = torch.device(device).type
    if kind == "cpu":
        return available_memory()
    if kind == "cuda" and cuda_in_use():
        # What torch has cached is free to it.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return None
