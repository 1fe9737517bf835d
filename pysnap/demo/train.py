"""The training program of the demo; `pysnap.demo.run` starts it three times, as a process.

It is an ordinary training loop with pysnap around it, and three things beside: it logs every step
and every snapshot as a JSON line, it can kill itself, and it writes the digests of its end state.

In `--dir` it keeps `repository/`, and of this attempt `NAME.jsonl` (the log) and `NAME.json` (the
end state). The log has three kinds of line: one `start`, one `step` per step, and one `snapshot`
per durable snapshot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pysnap
from pysnap.demo.data import Windows, standard_library
from pysnap.demo.model import GPT, Shape

THREADS = 2
TEXT_BYTES = 1 << 20
LEARNING_RATE = 1e-3
MAX_CORRUPTION = 0.02
DURABLE_TIMEOUT = 60.0


class Log:
    """JSON lines, each one `write` to the kernel: a SIGKILL loses none. Any thread may add one."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)

    def add(self, event: str, **fields: object) -> None:
        os.write(self._descriptor, json.dumps({"event": event, **fields}).encode() + b"\n")


@dataclass
class Fingerprints:
    """What a nested state is made of, by path: a digest of each tensor, the text of each value."""

    tensors: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, state: Any) -> None:
        """Adds everything in `state`; floats keep every bit, tensors their dtype and shape too."""
        if isinstance(state, Tensor):
            self.tensors[path] = f"{state.dtype} {tuple(state.shape)} {tensor_digest(state)}"
        elif isinstance(state, dict):
            for key, value in state.items():
                self.add(f"{path}.{key}", value)
        elif isinstance(state, list | tuple):
            for index, value in enumerate(state):
                self.add(f"{path}.{index}", value)
        elif isinstance(state, float):
            self.values[path] = state.hex()
        elif state is None or isinstance(state, bool | int | str):
            self.values[path] = repr(state)
        else:
            raise TypeError(f"{path} is a {type(state).__name__}, which has no fingerprint")


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the tensor's raw bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def rng_digests() -> dict[str, str]:
    """SHA-256 of the state of each random number generator, by its name."""
    state = np.random.get_state(legacy=False)
    numbers = (state["state"]["pos"], state["has_gauss"], float(state["gauss"]).hex())
    numpy_state = state["state"]["key"].tobytes() + repr(numbers).encode()
    digests = {
        "python": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "numpy": hashlib.sha256(numpy_state).hexdigest(),
        "torch": tensor_digest(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        for index, device_state in enumerate(torch.cuda.get_rng_state_all()):
            digests[f"cuda:{index}"] = tensor_digest(device_state)
    return digests


def make_deterministic(seed: int) -> None:
    """The same seed gives the same bits in every process of this machine."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # On a GPU, the plain attention is deterministic; the faster ones say so or not by version.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves biases and norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """The learning rate's factor by step: linear over a tenth of `steps`, then a half cosine."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor


def corrupt(tokens: Tensor) -> Tensor:
    """Replaces a few bytes by random ones: Python draws the share, NumPy the places and bytes.

    So the loss depends on every random number generator of the process, not on torch's alone.
    """
    share = random.uniform(0.0, MAX_CORRUPTION)
    places = torch.from_numpy(np.random.random_sample(tuple(tokens.shape)) < share)
    noise = torch.from_numpy(np.random.randint(0, 256, tuple(tokens.shape), dtype=np.int64))
    return torch.where(places, noise, tokens)


def train_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: Tensor,
) -> float:
    """One update from `batch` `(windows, context + 1)`; returns the loss before it."""
    device = next(model.parameters()).device
    loss = model.loss(corrupt(batch[:, :-1]).to(device), batch[:, 1:].to(device))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss.item()


def train(options: argparse.Namespace) -> None:
    """Trains to the end, or to `--kill-at`, from which it does not return."""
    log = Log(options.dir / f"{options.attempt}.jsonl")
    make_deterministic(options.seed)
    shape = Shape(layers=options.layers, width=options.width)
    text = standard_library(TEXT_BYTES)
    windows = Windows(
        text, count=options.batch_size * options.steps_per_epoch, length=shape.context + 1
    )
    # Drawn on the CPU, so that the same weights begin on every device.
    model = GPT(shape).to(options.device)
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_cosine(options.epochs * options.steps_per_epoch)
    )
    loader = pysnap.resumable(DataLoader(windows, batch_size=options.batch_size, shuffle=True))

    any_durable = threading.Event()

    def on_durable(info: pysnap.SnapshotInfo) -> None:
        log.add(
            "snapshot",
            step=info.step,
            stall_seconds=info.stall_seconds,
            durable_seconds=info.durable_seconds,
            raw_bytes=info.raw_bytes,
            stored_bytes=info.stored_bytes,
            name=info.path.name,
            at=time.perf_counter(),
        )
        any_durable.set()

    with pysnap.Snapshotter(
        options.dir / "repository",
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        every=options.every,
        keep=pysnap.Keep(last=3),
        on_durable=on_durable,
    ) as snapshotter:
        began = time.perf_counter()
        snapshotter.resume()
        resume_seconds = time.perf_counter() - began
        step = snapshotter.progress.step
        log.add(
            "start",
            step=step,
            resume_seconds=resume_seconds,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )
        for _ in snapshotter.epochs(options.epochs):
            for batch in loader:
                learning_rate = scheduler.get_last_lr()[0]
                began = time.perf_counter()
                with snapshotter.step():
                    loss = train_step(model, optimizer, scheduler, batch)
                ended = time.perf_counter()
                step += 1
                log.add(
                    "step",
                    step=step,
                    loss=loss.hex(),
                    learning_rate=float(learning_rate).hex(),
                    batch=tensor_digest(batch),
                    seconds=ended - began,
                    at=ended,
                )
                if step == options.kill_at:
                    # On a very slow disk nothing may be durable yet, and there would be no resume.
                    any_durable.wait(DURABLE_TIMEOUT)
                    os.kill(os.getpid(), signal.SIGKILL)

    found = Fingerprints()
    found.add("model", model.state_dict())
    found.add("optimizer", optimizer.state_dict())
    found.add("scheduler", scheduler.state_dict())
    found.add("text", hashlib.sha256(text).hexdigest())
    end = {
        "step": step,
        "tensors": found.tensors,
        "values": found.values,
        "rngs": rng_digests(),
        # Last, as it draws random numbers: the first batch of the epoch that would follow.
        "next_batch": tensor_digest(next(iter(loader))),
    }
    (options.dir / f"{options.attempt}.json").write_text(json.dumps(end, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Runs one attempt; `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pysnap.demo.train", description="One training run of the demo."
    )
    parser.add_argument("--dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--attempt", default="run", help="name of this process's files")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps-per-epoch", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--every", default="20 steps", help="cadence of the snapshots")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=None, help="SIGKILL itself after this step")
    train(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
