"""Bytes of each kind of tensor that a state may hold: what an encoder has to do depends on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from torch import Tensor
from trained import Trained, text

from pysnap.dtypes import TORCH_ELEMENTS
from pysnap.manifest import ELEMENTS

_OTHER_BYTES = 8 * 2**20
_DROPPED = 0.1

SMALLER = (
    "bf16 weights",
    "fp32 weights",
    "exp_avg",
    "exp_avg_sq",
    "float8 weights",
    "int8 weights",
    "token ids",
    "bool mask",
)
"""Kinds that an encoder can make smaller."""
NOISE = ("compressed", "noise")
"""Kinds that none can."""
KINDS = (*SMALLER, *NOISE)


@dataclass(frozen=True)
class Payload:
    """The bytes of tensors of one type."""

    dtype: str
    """By torch's name."""
    bytes: memoryview

    @property
    def element(self) -> int:
        """The number of its element type at the engine."""
        return ELEMENTS.index(TORCH_ELEMENTS[self.dtype])


def payloads(trained: Trained) -> dict[str, Payload]:
    """The bytes of each of KINDS: of a model that was trained, of what stands beside one, and of
    what is compressed already."""
    weights = trained.weights
    scale = weights.abs().max() / 127
    generator = np.random.default_rng(1)
    ids = torch.frombuffer(bytearray(text()[: _OTHER_BYTES // 8]), dtype=torch.uint8).long()
    compressed = bytearray(zstandard.compress(text(), 3))
    kept = torch.from_numpy(generator.random(_OTHER_BYTES) >= _DROPPED)
    found = {
        "bf16 weights": weights.bfloat16(),
        "fp32 weights": weights,
        "exp_avg": trained.exp_avg,
        "exp_avg_sq": trained.exp_avg_sq,
        "float8 weights": weights.to(torch.float8_e4m3fn),
        "int8 weights": (weights / scale).round().to(torch.int8),
        "token ids": ids,
        "bool mask": kept,
        "compressed": torch.frombuffer(compressed, dtype=torch.uint8),
        "noise": torch.from_numpy(generator.integers(256, size=_OTHER_BYTES, dtype=np.uint8)),
    }
    return {kind: _payload(found[kind]) for kind in KINDS}


def _payload(tensor: Tensor) -> Payload:
    data = tensor.view(torch.uint8).numpy().data
    return Payload(str(tensor.dtype).removeprefix("torch."), data)
