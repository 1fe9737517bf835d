"""A model that was trained for real: what an encoder has to do with depends on its bytes.

A transformer over bytes, of 7 million parameters in matrices of up to 4 MiB, learns the sources of
Python's standard library.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from training import Model

_WIDTH = 512
_CONTEXT = 128
_BATCH = 8


@dataclass(frozen=True)
class Trained:
    """Weights and moments of all parameters, one after the other, in fp32."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    loss: float
    """Of the last step."""


@functools.cache
def text() -> bytes:
    """The sources of the modules of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def train(steps: int, tell: Callable[[int], object] = lambda step: None) -> Trained:
    """The model after so many steps, at least one; `tell` is called with the number of each."""
    torch.manual_seed(0)
    data = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    model = Model(_WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))
    for step in range(1, steps + 1):
        tell(step)
        starts = torch.randint(len(data) - _CONTEXT, (_BATCH,))
        tokens = torch.stack([data[start : start + _CONTEXT + 1] for start in starts])
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
        optimizer.step()
    parameters = list(model.parameters())
    exp_avg, exp_avg_sq = (
        _joined([optimizer.state[parameter][name] for parameter in parameters])
        for name in ("exp_avg", "exp_avg_sq")
    )
    return Trained(_joined(parameters), exp_avg, exp_avg_sq, loss.item())


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
