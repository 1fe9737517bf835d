"""What saving costs a training loop: the same steps with and without a save at their beginning."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from state import State
from torch import Tensor, nn
from torch.nn import functional

_VOCABULARY = 256
_WIDTH = 128
_CONTEXT = 128
_BATCH = 8
_WARM_STEPS = 5


class Model(nn.Module):
    """A small causal transformer over bytes."""

    def __init__(self, width: int = _WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, _VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_CONTEXT))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(tokens), mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits


class _Training:
    """Real steps (forward, backward, AdamW) on random bytes."""

    def __init__(self) -> None:
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self) -> None:
        tokens = torch.randint(_VOCABULARY, (_BATCH, _CONTEXT + 1))
        logits = self.model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
        self.optimizer.step()

    def run(self, steps: int) -> float:
        """Seconds of the longest step."""
        longest = 0.0
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            longest = max(longest, time.perf_counter() - start)
        return longest


def measure(
    *,
    subject: str,
    parameters: int,
    pairs: int,
    seconds: float,
    host_memory: int | None,
    directory: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Segments of as many steps as take about `seconds`, in turn without and with a save.

    The state of `parameters` parameters is saved together with what is trained. torch has one
    thread, as a data-parallel process of a machine with few cores has.
    """
    tell("building the state")
    state = State.build(parameters)
    torch.set_num_threads(1)
    training = _Training()
    parts = state.parts() | {"trained": training.model, "trained_optimizer": training.optimizer}

    training.run(_WARM_STEPS)
    start = time.perf_counter()
    training.run(_WARM_STEPS)
    steps = max(_WARM_STEPS, round(seconds * _WARM_STEPS / (time.perf_counter() - start)))

    saver = peers.open_saver(subject, parts, Path(directory), host_memory)
    saver.wait_ready()
    peers.remove(saver.save().wait())

    def plain() -> dict[str, float]:
        state.advance()
        gc.collect()
        start = time.perf_counter()
        longest = training.run(steps)
        return {"seconds": time.perf_counter() - start, "longest_step_seconds": longest}

    def saving() -> dict[str, float | bool]:
        state.advance()
        gc.collect()
        start = time.perf_counter()
        pending = saver.save()
        blocked = time.perf_counter() - start
        longest = training.run(steps)
        elapsed = time.perf_counter() - start
        inside = pending.done()
        peers.remove(pending.wait())
        return {
            "seconds": elapsed,
            "blocked_seconds": blocked,
            "longest_step_seconds": longest,
            "ended_inside": inside,
        }

    tell("training without")
    without = [plain()]
    with_saves = []
    for pair in range(pairs):
        tell(f"training with saves, {pair + 1} of {pairs}")
        with_saves.append(saving())
        without.append(plain())
    saver.close()
    return {"steps": steps, "without": without, "with": with_saves}
