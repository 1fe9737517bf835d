"""The training runs of test_matrix.py: what a child process executes, and dies in."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

import numpy as np
import torch
from support import bits
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

import pysnap

# What is slow to import: the server has it ready for every process that it forks.
PRELOAD = ["torch._dynamo", "torchdata.stateful_dataloader", "pysnap.snapshotter"]

EPOCHS, BATCHES = 3, 5  # of every loader
ROWS, WIDTH = 4, 6  # of every sample


# Data: a sample is its id and its features


def sample(index: int) -> tuple[int, torch.Tensor]:
    features = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))
    # Only without workers: what they draw is documented as seeded anew.
    if get_worker_info() is None:
        noise = torch.rand(WIDTH) + np.random.standard_normal() + random.gauss(0, 1)
        features += 0.01 * noise
    return index, features


class Samples(Dataset[Any]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return sample(index)


class Stream(IterableDataset[Any]):
    """In an order of its own. Of two workers one has 10 of the 18 samples and the other 8: five
    batches of 4, as for a single process."""

    def __init__(self, seed: int) -> None:
        self.order = random.Random(seed)

    def __iter__(self) -> Iterator[Any]:
        ids = self.order.sample(range(18), 18)
        worker = get_worker_info()
        share = ids if worker is None else (ids[:10], ids[10:])[worker.id]
        return map(sample, share)


class Permuted(Sampler[int]):
    def __init__(self, seed: int) -> None:
        self.order = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[int]:
        yield from self.order.permutation(18).tolist()

    def __len__(self) -> int:
        return 18


class Uneven(Sampler[list[int]]):
    def __init__(self, seed: int) -> None:
        self.order = random.Random(seed)

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.order.sample(range(18), 18))
        for size in (2, 5, 3, 4, 4):
            yield list(itertools.islice(indices, size))

    def __len__(self) -> int:
        return BATCHES


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mapped(length: int = 18, **options: Any) -> pysnap.ResumableLoader:
    if "batch_sampler" not in options:
        options.setdefault("batch_size", 4)
    return pysnap.resumable(DataLoader(Samples(length), **options))


def streamed(seed: int, **options: Any) -> pysnap.ResumableLoader:
    return pysnap.resumable(DataLoader(Stream(seed), batch_size=4, **options))


def stateful(**options: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(Samples(18), batch_size=4, shuffle=True, **options)


WORKERS: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"}
# By the seed of the process.
LOADERS: dict[str, Callable[[int], Any]] = {
    "in_order": lambda seed: mapped(),
    "shuffle": lambda seed: mapped(shuffle=True),
    "own_generator": lambda seed: mapped(shuffle=True, generator=generator(seed)),
    "sampler": lambda seed: mapped(sampler=Permuted(seed)),
    "batch_sampler": lambda seed: mapped(batch_sampler=Uneven(seed)),
    "drop_last": lambda seed: mapped(22, shuffle=True, drop_last=True),
    "distributed": lambda seed: mapped(
        36, sampler=DistributedSampler(Samples(36), num_replicas=2, rank=1)
    ),
    "unbatched": lambda seed: mapped(5, batch_size=None, shuffle=True),
    "workers": lambda seed: mapped(shuffle=True, **WORKERS),
    "persistent_workers": lambda seed: mapped(shuffle=True, persistent_workers=True, **WORKERS),
    "prefetch_1": lambda seed: mapped(sampler=Permuted(seed), prefetch_factor=1, **WORKERS),
    # The sampler comes to its end, and draws there, while batches are under way.
    "prefetch_4": lambda seed: mapped(
        20, shuffle=True, generator=generator(seed), prefetch_factor=4, **WORKERS
    ),
    "iterable": lambda seed: streamed(seed),
    "iterable_workers": lambda seed: streamed(seed, **WORKERS),
    "stateful": lambda seed: stateful(),
    "stateful_workers": lambda seed: stateful(**WORKERS),
}


# Model, optimizers, schedules


class Model(nn.Module):
    """One weight in two layers, a frozen parameter, and a buffer that the forward pass moves."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.25)
        self.middle, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.middle.weight
        self.scale = nn.Parameter(torch.rand(8), requires_grad=False)
        self.register_buffer("average", torch.zeros(8))
        self.last = nn.Linear(8, WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.reshape(-1, WIDTH)
        hidden = self.dropout(self.norm(self.first(features)).relu()) * self.scale
        if self.training:
            self.average.lerp_(hidden.detach().mean(0), 0.1)
        hidden = self.tied(self.middle(hidden).tanh()) + self.average
        return (self.last(hidden) - features).square().mean()


class Nested(optim.Optimizer):
    """Goes along the mean of the last gradients: a list within a dict within the state."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "steps": 0})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                past = self.state[parameter].setdefault("past", {"gradients": [], "most": 3})
                past["gradients"].append(parameter.grad.clone())
                del past["gradients"][: -past["most"]]
                mean = torch.stack(past["gradients"]).mean(0)
                with torch.no_grad():
                    parameter -= group["lr"] / (1 + 0.01 * group["steps"]) * mean
        return loss


def built(kind: Callable[..., optim.Optimizer], lr: float, **options: Any) -> Any:
    return lambda parameters: kind(parameters, lr=lr, **options)


SGD = built(optim.SGD, 0.05, momentum=0.9)
ADAMW = built(optim.AdamW, 0.01)
# Where there are two, they share the parameters.
OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], optim.Optimizer], ...]] = {
    "sgd": (SGD,),
    "adam": (built(optim.Adam, 0.01, amsgrad=True),),
    "adamw": (ADAMW,),
    "adamw_foreach": (built(optim.AdamW, 0.01, foreach=True),),
    "adamw_fused": (built(optim.AdamW, 0.01, fused=True),),
    "adagrad": (built(optim.Adagrad, 0.05),),
    "rmsprop": (built(optim.RMSprop, 0.005, momentum=0.5, centered=True),),
    "nadam": (built(optim.NAdam, 0.01),),
    "radam": (built(optim.RAdam, 0.01),),
    "adamax": (built(optim.Adamax, 0.01),),
    "adadelta": (built(optim.Adadelta, 0.5),),
    "asgd": (built(optim.ASGD, 0.02, t0=2),),
    "rprop": (built(optim.Rprop, 0.005),),
    "lbfgs": (built(optim.LBFGS, 0.05, max_iter=3, history_size=3),),
    "nested": (built(Nested, 0.05),),
    "two_halves": (SGD, ADAMW),
}


def lr_of(optimizer: optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def cycles_momentum(optimizer: optim.Optimizer) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.7),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 6, 8, 11], gamma=0.7),
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=9),
    "linear": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=12),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=1.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
    "cosine_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=2 * lr_of(o), total_steps=20, cycle_momentum=cycles_momentum(o)
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(
        o, lr_of(o), 2 * lr_of(o), step_size_up=3, cycle_momentum=cycles_momentum(o)
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 8)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 1 - 0.01 * step),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.8, patience=1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[8],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=9), lr_scheduler.StepLR(o, 4, gamma=0.8)]
    ),
}


# Boundaries


@dataclass(frozen=True)
class Boundary:
    """Where the newest snapshots lie when the process is killed, right after step `kill`."""

    newest: list[list[int]]  # step, epoch, batch: the last that is surely durable, and any later
    kill: int
    every: str = "off"
    save_in_loop: int | None = None  # the step after which save() is called there
    save_behind_loop: int | None = None  # the same behind the loop over the validation data
    breaks: bool = False  # a `break` ends each epoch two batches early

    @property
    def batches(self) -> int:
        return BATCHES - 2 if self.breaks else BATCHES


BOUNDARIES = {
    "mid_epoch": Boundary([[7, 1, 2]], kill=10, every="7 steps"),
    "last_batch": Boundary([[10, 1, 5]], kill=12, every="7 steps", save_in_loop=10),
    "behind_loop": Boundary([[10, 1, 5]], kill=12, every="7 steps", save_behind_loop=10),
    "between_epochs": Boundary([[10, 2, 0]], kill=12, every="2 epochs"),
    "behind_break": Boundary([[6, 1, 3]], kill=8, save_behind_loop=6, breaks=True),
    "after_broken_epoch": Boundary([[6, 2, 0]], kill=8, every="2 epochs", breaks=True),
    # The one that save() has begun is durable by then, or it is not.
    "in_flight": Boundary([[7, 1, 2], [9, 1, 4]], kill=9, every="7 steps", save_in_loop=9),
}


# A process


@dataclass(frozen=True)
class Case:
    loader: str
    boundary: str
    optimizer: str
    scheduler: str

    def __str__(self) -> str:
        return "-".join(vars(self).values())


def run(case: Case, role: str, repository: Path, log: Path) -> None:
    """The training of `case` as one process executes it; all that must be equal goes to `log`.

    `role` is "reference", which takes no snapshot, "killed" or "resumed".
    """
    # A group of its own, so that the workers that outlive a kill can be ended.
    os.setpgid(0, 0)
    # As pytest does; and torchdata 0.11 calls what torch 2.13 deprecates.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "'set_vital'", UserWarning)
    # SequentialLR of torch 2.4 calls its schedules in a way that torch deprecates.
    warnings.filterwarnings("ignore", "The epoch parameter in", UserWarning)
    warnings.filterwarnings("ignore", ".* is multi-threaded, use of fork", DeprecationWarning)
    torch.set_num_threads(1)
    # From another seed, nothing that a resume forgets is right by chance.
    seed = 1 if role == "resumed" else 0
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    with log.open("w", buffering=1) as lines:
        Training(case, seed, lines).run(role, repository)


class Training:
    """All objects of a run, made anew, and the loop."""

    def __init__(self, case: Case, seed: int, lines: TextIO) -> None:
        self.lines = lines
        self.boundary = BOUNDARIES[case.boundary]
        self.model = Model()
        parameters, builds = list(self.model.parameters()), OPTIMIZERS[case.optimizer]
        self.optimizers = [
            build(parameters[first :: len(builds)]) for first, build in enumerate(builds)
        ]
        self.schedulers = [SCHEDULERS[case.scheduler](optimizer) for optimizer in self.optimizers]
        self.loader = LOADERS[case.loader](seed)
        self.validation = pysnap.resumable(DataLoader(Samples(6), batch_size=4))
        self.written = {"rows": 0}
        self.parts: dict[str, Any] = {
            "model": self.model,
            "loader": self.loader,
            "validation": self.validation,
            "written": self.written,
            **{f"optimizer{index}": part for index, part in enumerate(self.optimizers)},
            **{f"scheduler{index}": part for index, part in enumerate(self.schedulers)},
        }

    def run(self, role: str, repository: Path) -> None:
        boundary = self.boundary
        durable: SimpleQueue[int] = SimpleQueue()
        with pysnap.Snapshotter(
            repository,
            **self.parts,
            every="off" if role == "reference" else boundary.every,
            on_durable=lambda info: durable.put(info.step),
        ) as snapshotter:
            progress = snapshotter.progress
            if role == "resumed":
                snapshotter.resume()
                self.write("place", [progress.step, progress.epoch, progress.batch])
                self.write("rows before", self.written["rows"])
            for epoch in snapshotter.epochs(EPOCHS):
                if isinstance(self.loader.sampler, DistributedSampler):
                    self.loader.sampler.set_epoch(epoch)
                # A loader that a `break` left still has a rest.
                left = not boundary.breaks or progress.batch < boundary.batches
                for batch in self.loader if left else ():
                    with snapshotter.step():
                        self.learn(batch, progress.step + 1)
                    if role != "reference" and progress.step == boundary.save_in_loop:
                        snapshotter.save()
                    if role == "killed" and progress.step == boundary.kill:
                        while durable.get() != boundary.newest[0][0]:
                            pass
                        os.kill(os.getpid(), signal.SIGKILL)
                    if boundary.breaks and progress.batch == boundary.batches:
                        break
                self.validate(epoch)
                if role != "reference" and progress.step == boundary.save_behind_loop:
                    snapshotter.save()
        states = {name: part.state_dict() for name, part in self.parts.items() if name != "written"}
        self.write("final", dict(digests({**states, "random": random_states()})))

    def learn(self, batch: Any, step: int) -> None:
        ids, features = batch

        def loss() -> torch.Tensor:
            self.model.zero_grad()
            value: torch.Tensor = self.model(features)
            value.backward()
            return value.detach()

        losses = [float(optimizer.step(loss)) for optimizer in self.optimizers]
        for scheduler in self.schedulers:
            metric = (losses[0],) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
            scheduler.step(*metric)
        rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.write_row(step=step, ids=ids, losses=losses, rates=rates)

    @torch.no_grad()
    def validate(self, epoch: int) -> None:
        self.model.eval()
        for ids, features in self.validation:
            self.write_row(validated=epoch, ids=ids, losses=[float(self.model(features))])
        self.model.train()

    def write_row(self, *, ids: Any, losses: list[float], **more: Any) -> None:
        self.written["rows"] += 1
        row = {"ids": torch.as_tensor(ids).reshape(-1).tolist(), "losses": losses, **more}
        self.write("row", {**row, **dict(digests(random_states()))})

    def write(self, kind: str, value: Any) -> None:
        # JSON keeps every bit of a float.
        self.lines.write(json.dumps([kind, value]) + "\n")


def random_states() -> dict[str, Any]:
    _, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "numpy": words.tobytes() + repr(rest).encode(),
        "python": repr(random.getstate()).encode(),
    }


def digests(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a nested state by its path, exactly, and the type of every container."""
    if isinstance(value, dict):
        yield name, f"{type(value).__name__} of {list(value)}"
        for key, item in value.items():
            yield from digests(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        yield name, f"{type(value).__name__} of {len(value)}"
        for index, item in enumerate(value):
            yield from digests(item, f"{name}/{index}")
    elif isinstance(value, torch.Tensor):
        yield name, f"{value.dtype} {tuple(value.shape)} {digest(bits(value))}"
    elif isinstance(value, bytes):
        yield name, digest(value)
    else:
        assert value is None or isinstance(value, (bool, int, float, str)), name
        yield name, repr(value)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
