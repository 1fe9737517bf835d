"""CUDA, as far as the program itself uses it."""

from __future__ import annotations

import torch


def cuda_in_use() -> bool:
    """Whether the program has used CUDA. Before, no random number came from there, and to ask a
    device anything would make a context on it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch's own gap
