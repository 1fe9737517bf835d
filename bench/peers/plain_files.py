"""What a program without a checkpointing library does: one file, written while the step waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .saver import Parts, Peer, Pending, Written


class TorchSave(Peer):
    """`torch.save`."""

    suffix = ".pt"

    def write(self, path: Path) -> Pending:
        torch.save(self.state_dict(), path)
        return Written(path)


class Safetensors(Peer):
    """`safetensors.torch.save_file` of the tensors alone, under flat names: it knows no others."""

    suffix = ".safetensors"

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        from safetensors.torch import save_file

        self._save_file = save_file

    def write(self, path: Path) -> Pending:
        self._save_file(flat_tensors(self.state_dict()), path)
        return Written(path)


def flat_tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in nested dicts and lists, named by where they are."""
    if isinstance(state, Tensor):
        return {prefix: state}
    if isinstance(state, dict):
        items = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(state)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for name, value in items:
        found |= flat_tensors(value, f"{prefix}.{name}" if prefix else name)
    return found
