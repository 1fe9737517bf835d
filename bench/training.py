"""What saving costs a training loop: the same steps with and without a save at their beginning."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import peers
import torch
from peers.disk import remove
from state import State
from torch import Tensor, nn
from torch.nn import functional

_VOCABULARY = 256
_WIDTH = 128
_CONTEXT = 128
_BATCH = 8
_WARM_STEPS = 5
_PYTHON_ROUNDS = 50_000
_OUTLASTING = 1.5
"""Times the steps that a save takes: not every one is as fast as the median of `_TRIES`."""
_TRIES = 3

COMPUTE = "compute-bound"
PYTHON = "GIL-bound"


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


Gate = Callable[[], object]


class _Loop(Protocol):
    """A training loop."""

    def parts(self) -> peers.Parts:
        """What it trains, by name."""

    def step(self, gate: Gate | None) -> None:
        """One step; `gate` stands before what it changes."""


class _Compute:
    """Real steps (forward, backward, AdamW) on random bytes; most of the time in torch's kernels,
    without the GIL."""

    def __init__(self) -> None:
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def parts(self) -> peers.Parts:
        return {"trained": self.model, "trained_optimizer": self.optimizer}

    def step(self, gate: Gate | None) -> None:
        tokens = torch.randint(_VOCABULARY, (_BATCH, _CONTEXT + 1))
        logits = self.model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own gap
        if gate is not None:
            gate()
        self.optimizer.step()


class _Python:
    """Steps in Python alone, which holds the GIL, as a loop that launches small kernels does."""

    def __init__(self) -> None:
        self._value = 1

    def parts(self) -> peers.Parts:
        return {}

    def step(self, gate: Gate | None) -> None:
        value = self._value
        for _ in range(_PYTHON_ROUNDS):
            value = (value * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
        if gate is not None:
            gate()
        self._value = value


_LOOPS: dict[str, Callable[[], _Loop]] = {COMPUTE: _Compute, PYTHON: _Python}
LOOPS = tuple(_LOOPS)


def _run(loop: _Loop, steps: int, gate: Gate | None = None) -> float:
    """Seconds of the longest step; `gate` is in the first one."""
    longest = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        loop.step(gate)
        gate = None
        longest = max(longest, time.perf_counter() - start)
    return longest


def measure(
    *,
    subjects: list[str],
    loop: str,
    parameters: int,
    rounds: int,
    seconds: float | None,
    directory: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Segments of as many steps of one of LOOPS as take about `seconds`, in turn without and with
    a save: in each round one save by each of the subjects, of which another one begins each time.
    None: of few more steps than pass until the subject is durable, and without a save of as many as
    for the fastest of them.

    The state of `parameters` parameters is saved together with what is trained. torch has one
    thread, as a data-parallel process of a machine with few cores has.
    """
    tell("building the state")
    state = State.build(parameters)
    torch.set_num_threads(1)
    training = _LOOPS[loop]()
    parts = state.parts() | training.parts()
    savers = {}
    for subject in subjects:
        folder = Path(directory) / subject
        folder.mkdir()
        # Enough for all of the state, however little memory is left for the last.
        savers[subject] = peers.open_saver(subject, parts, folder, 2 * state.nbytes)
        savers[subject].wait_ready()
        remove(savers[subject].save().wait())

    _run(training, _WARM_STEPS)
    if seconds is None:
        outlasting = {
            subject: math.ceil(_OUTLASTING * _steps_until_durable(saver, training))
            for subject, saver in savers.items()
        }
    else:
        start = time.perf_counter()
        _run(training, _WARM_STEPS)
        usual = round(seconds * _WARM_STEPS / (time.perf_counter() - start))
        outlasting = dict.fromkeys(savers, usual)
    steps = {subject: max(_WARM_STEPS, number) for subject, number in outlasting.items()}
    fewest = min(steps.values())

    def plain() -> dict[str, Any]:
        state.advance()
        gc.collect()
        start = time.perf_counter()
        longest = _run(training, fewest)
        seconds = time.perf_counter() - start
        return {"steps": fewest, "seconds": seconds, "longest_step_seconds": longest}

    def saving(subject: str) -> dict[str, Any]:
        state.advance()
        gc.collect()
        start = time.perf_counter()
        pending = savers[subject].save()
        blocked = time.perf_counter() - start
        longest = _run(training, steps[subject], pending.gate)
        elapsed = time.perf_counter() - start
        inside = pending.done()
        remove(pending.wait())
        return {
            "subject": subject,
            "steps": steps[subject],
            "seconds": elapsed,
            "blocked_seconds": blocked,
            "longest_step_seconds": longest,
            "ended_inside": inside,
        }

    tell("training without")
    without = [plain()]
    with_saves = []
    for number in range(rounds):
        tell(f"training with saves, {number + 1} of {rounds}")
        first = number % len(subjects)
        for subject in subjects[first:] + subjects[:first]:
            with_saves.append(saving(subject))
            without.append(plain())
    for saver in savers.values():
        saver.close()
    return {"without": without, "with": with_saves}


def _steps_until_durable(saver: peers.Saver, training: _Loop) -> int:
    """Of the loop, from the beginning of a save on; the median of `_TRIES`."""
    counts = []
    for _ in range(_TRIES):
        pending = saver.save()
        training.step(pending.gate)
        count = 1
        while not pending.done():
            training.step(None)
            count += 1
        remove(pending.wait())
        counts.append(count)
    return statistics.median_low(counts)
