"""CUDA, as far as the program itself uses it."""

from __future__ import annotations

import torch


def cuda_in_use() -> bool:
    """Whether the program has used CUDA. Before, no random number came from there, and to ask a
    device anything would make a context on it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch's own gap


def is_capturing() -> bool:
    """Whether what the program does on its current CUDA device now becomes part of a graph, and
    runs when that is replayed."""
    return cuda_in_use() and bool(torch.cuda.is_current_stream_capturing())
