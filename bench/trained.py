"""Bytes of a model that was trained for real: what an encoder has to do with depends on them.

A transformer over bytes, of 7 million parameters in matrices of up to 4 MiB, learns the sources of
Python's standard library.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from training import Model

_WIDTH = 512
_CONTEXT = 128
_BATCH = 8
_F16, _F32 = 4, 5
KINDS = ("bf16 weights", "fp32 weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Trained:
    element: int
    """Its number at the engine."""
    bytes: memoryview


def train(steps: int) -> dict[str, Trained]:
    """The bytes of each of KINDS after so many steps."""
    torch.manual_seed(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = Model(_WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))
    for _ in range(steps):
        starts = torch.randint(len(data) - _CONTEXT, (_BATCH,))
        tokens = torch.stack([data[start : start + _CONTEXT + 1] for start in starts])
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
        optimizer.step()
    parameters = list(model.parameters())
    weights = _joined(parameters)
    moments = {
        name: _joined([optimizer.state[parameter][name] for parameter in parameters])
        for name in ("exp_avg", "exp_avg_sq")
    }
    return {
        "bf16 weights": _bytes(weights.bfloat16(), _F16),
        "fp32 weights": _bytes(weights, _F32),
        **{name: _bytes(moment, _F32) for name, moment in moments.items()},
    }


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _bytes(tensor: Tensor, element: int) -> Trained:
    return Trained(element, tensor.view(torch.uint8).numpy().data)
