"""What several tests need: a small training run, bit-exact comparison, damaged files."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import pysnap


class Noisy(Dataset[torch.Tensor]):
    """Samples with random augmentation drawn from every global generator."""

    def __init__(self, length: int) -> None:
        self.samples = torch.randn(length, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand(6) + random.random() + float(np.random.random())
        return self.samples[index] + 0.01 * noise


class Run:
    """A training run with everything that a resume must bring back; `seed` is what the process
    starts with."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 6),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / 10)
        )
        self.loader = pysnap.resumable(DataLoader(Noisy(22), batch_size=4, shuffle=True))

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def train(
        self, snapshotter: pysnap.Snapshotter, *, epochs: int = 3
    ) -> Iterator[tuple[int, str]]:
        """Step number and exact loss of every step that is left."""
        for _ in snapshotter.epochs(epochs):
            for batch in self.loader:
                with snapshotter.step():
                    loss = (self.model(batch) - batch).square().mean()
                    self.optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                yield snapshotter.progress.step, loss.item().hex()

    def state(self) -> dict[str, Any]:
        """Everything that must be equal at the end."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Equal in type, structure and bits."""
    assert type(left) is type(right), f"{path}: {type(left)} and {type(right)}"
    if isinstance(left, dict):
        assert list(left) == list(right), f"{path}: other keys"
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), f"{path}: other length"
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape, path
        assert bits(left) == bits(right), f"{path}: other bits"
    elif isinstance(left, np.ndarray):
        assert (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        ), path
    elif isinstance(left, float) and math.isnan(left):
        assert math.isnan(right), path
    else:
        assert left == right, f"{path}: {left!r} and {right!r}"


def bits(tensor: torch.Tensor) -> bytes:
    """The raw bytes of a tensor in row-major order."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)
