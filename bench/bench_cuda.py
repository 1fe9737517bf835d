"""What a snapshot of a GPU's state costs, beside what the bus can do, as JSON, a plot and a table.

    python bench/bench_cuda.py [--quick] [--check] [--device cuda|cpu]

See README.md beside it for what each figure means. `--device cpu` measures nothing of worth: it
runs every line on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine
import peers
import torch
from accelerator import Accelerator, open_accelerator
from floors import Buffer, WriteFloor, read_floor
from jobs import working_directory
from peers import disk
from report import Bar, Spread, table_of_bars
from rich.console import Console
from state import State
from torch import Tensor, nn

import pysnap
from pysnap.capture import Stager
from pysnap.config import Config

HERE = Path(__file__).parent
GB = 10**9

STALL = 1.05
"""Times the bytes at the best pinned rate of the same run: `overlap=False`."""
STEP = 1.03
"""Step time with a snapshot over without, forward and backward longer than the copy."""
CPU_MILLISECONDS = 5.0
"""Processor time in the step that takes a snapshot of 1000 parameters, plan cached."""
TINY_MILLISECONDS = 2.0
"""Capture of 2000 tiny tensors."""
RESTORE = 1.2
"""Times the bytes at the lower of the rates of reading and of the bus."""

_BLOCK = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how often; where each snapshot is written, fewer times once
    `most_seconds` are over."""

    state_bytes: int
    overlap_bytes: int
    peer_bytes: int
    parameters: int
    tiny: int
    repeats: int
    warm_up: int
    most_seconds: float
    saves: int
    peer_repeats: int
    restores: int
    matrix: int


def full(state_gb: float) -> Plan:
    """The plan of the bars: a state of 14 GB, medians of 20."""
    return Plan(
        state_bytes=round(state_gb * GB),
        overlap_bytes=round(min(state_gb, 4.0) * GB),
        peer_bytes=round(min(state_gb, 1.0) * GB),
        parameters=1000,
        tiny=2000,
        repeats=20,
        warm_up=3,
        most_seconds=60.0,
        saves=5,
        peer_repeats=3,
        restores=5,
        matrix=8192,
    )


def quick(state_gb: float) -> Plan:
    """Everything once, small."""
    return Plan(
        state_bytes=round(state_gb * GB),
        overlap_bytes=round(state_gb * GB),
        peer_bytes=round(state_gb * GB),
        parameters=50,
        tiny=100,
        repeats=2,
        warm_up=1,
        most_seconds=60.0,
        saves=1,
        peer_repeats=1,
        restores=1,
        matrix=256,
    )


def tensors_of(size: int, accelerator: Accelerator) -> list[Tensor]:
    """Tensors of 256 MiB and less on the device, `size` bytes in all, with bytes of noise."""
    tensors = []
    while size > 0:
        length = max(1, min(size, 256 * 2**20) // 4)
        tensors.append(torch.randn(length, device=accelerator.name))
        size -= 4 * length
    return tensors


def bus_rates(accelerator: Accelerator, repeats: int) -> dict[str, float]:
    """Bytes a second of the best copies to and from pinned memory, in each direction."""
    size = 8 * _BLOCK if accelerator.name != "cpu" else _BLOCK // 8
    host = accelerator.pinned(size)
    device = torch.zeros(size, dtype=torch.uint8, device=accelerator.name)
    rates: dict[str, list[float]] = {"d2h": [], "h2d": []}
    for _ in range(max(repeats, 2)):
        rates["d2h"].append(size / accelerator.timed(lambda: host.copy_(device, non_blocking=True)))
        rates["h2d"].append(size / accelerator.timed(lambda: device.copy_(host, non_blocking=True)))
    return {name: max(values) for name, values in rates.items()}


@contextmanager
def snapshotter(
    folder: Path, parts: dict[str, Any], size: int, **options: Any
) -> Iterator[pysnap.Snapshotter]:
    """One whose staging memory holds the whole state and is ready."""
    with pysnap.Snapshotter(
        folder,
        host_memory=size + 256 * 2**20,
        codec="none",
        keep=pysnap.Keep(last=1),
        **options,
        **parts,
    ) as opened:
        opened.wait_ready()
        yield opened


def stage(stager: Stager, state: object, accelerator: Accelerator) -> tuple[float, float]:
    """A capture without overlap that is not written: seconds of the call, and until all is staged.
    It is planned before."""
    capture = stager.begin(state)
    accelerator.synchronize()
    start = time.perf_counter()
    capture.copy()
    called = time.perf_counter() - start
    capture.wait_staged(None)
    staged = time.perf_counter() - start
    capture.abort()
    return called, staged


def stall(plan: Plan, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """How long tensors are in use by a snapshot without overlap, until all are staged: the capture
    alone, many times; and how long whole saves, which take seconds to be written, hold the device's
    stream, a few times."""
    tensors = tensors_of(plan.state_bytes, accelerator)
    size = sum(tensor.nbytes for tensor in tensors)
    with open_stager(host_memory=size + 256 * 2**20) as stager:
        captures = [
            stage(stager, {"state": tensors}, accelerator)
            for _ in range(plan.warm_up + plan.repeats)
        ]
    matrix = torch.ones(plan.matrix, plan.matrix, device=accelerator.name)
    handles: list[pysnap.Handle] = []
    called: list[float] = []
    held: list[float] = []
    durable: list[float] = []

    def save() -> None:
        start = time.perf_counter()
        handles.append(opened.save(overlap=False))
        called.append(time.perf_counter() - start)

    with snapshotter(folder, {"state": tensors}, size) as opened:
        deadline = time.monotonic() + plan.most_seconds
        while len(held) <= plan.saves and (time.monotonic() < deadline or len(held) < 2):
            opened.progress.step += 1
            accelerator.synchronize()
            start = time.perf_counter()
            # As in training, the device still has work to do when save() is called.
            torch.mm(matrix, matrix)
            held.append(accelerator.timed(save))
            handles.pop().wait()
            durable.append(time.perf_counter() - start)
    return {
        "bytes": size,
        "staged_seconds": [staged for _, staged in captures[plan.warm_up :]],
        "call_seconds": called[1:],
        "held_seconds": held[1:],
        "durable_seconds": durable[1:],
    }


@contextmanager
def open_stager(**options: Any) -> Iterator[Stager]:
    """What copies for a Snapshotter."""
    stager = Stager(Config.resolve(options))
    try:
        yield stager
    finally:
        stager.close()


class Busy(nn.Module):
    """Forward and backward that last, beside weights that are many bytes."""

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        super().__init__()
        # With SGD and momentum, a parameter has two tensors.
        weights = tensors_of(plan.overlap_bytes // 2, accelerator)
        self.weights = nn.ParameterList(nn.Parameter(tensor) for tensor in weights)
        self.matrix = nn.Parameter(
            torch.randn(plan.matrix, plan.matrix, device=accelerator.name) / plan.matrix
        )

    def forward(self, rounds: int) -> Tensor:
        product = torch.ones_like(self.matrix)
        for _ in range(rounds):
            product = product @ self.matrix
        # Every weight has a gradient, so that the optimizer changes every byte.
        total: Tensor = product.sum() + sum(weight.sum() for weight in self.weights)
        return total


def overlap(plan: Plan, accelerator: Accelerator, folder: Path, d2h: float) -> dict[str, Any]:
    """Steps with and without a snapshot at their beginning, in turn; forward and backward take
    twice the copy."""
    model = Busy(plan, accelerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

    def compute(rounds: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = model(rounds)
        loss.backward()

    for _ in range(2):
        compute(1)
        optimizer.step()
    size = sum(p.nbytes for p in model.parameters()) * 2
    several = 5
    base, more = (accelerator.timed(partial(compute, n)) for n in (1, 1 + several))
    each = max((more - base) / several, 1e-5)
    rounds = min(64, max(1, int(2 * size / d2h / each) + 1))

    with_snapshot: list[float] = []
    without: list[float] = []
    gates: list[float] = []
    with snapshotter(folder, {"model": model, "optimizer": optimizer}, size) as opened:
        deadline = time.monotonic() + plan.most_seconds
        for repetition in range(plan.warm_up + plan.repeats):
            if time.monotonic() > deadline and len(without) >= 3:
                break
            for taking in (False, True) if repetition % 2 else (True, False):
                # While the snapshot before was written, the device may have slowed its clocks.
                compute(rounds)
                optimizer.step()
                accelerator.synchronize()
                start = time.perf_counter()
                handle = None
                if taking:
                    opened.progress.step += 1
                    handle = opened.save(overlap=True)
                compute(rounds)
                gate = time.perf_counter()
                optimizer.step()
                gate = time.perf_counter() - gate
                accelerator.synchronize()
                seconds = time.perf_counter() - start
                if handle is not None:
                    handle.wait()
                if repetition >= plan.warm_up:
                    (with_snapshot if taking else without).append(seconds)
                    if taking:
                        gates.append(gate)
    ratios = [a / b for a, b in zip(with_snapshot, without, strict=True)]
    return {
        "bytes": size,
        "rounds": rounds,
        "copy_seconds": size / d2h,
        "step_seconds": {"with": with_snapshot, "without": without},
        "gate_seconds": gates,
        "ratios": ratios,
    }


def cpu_time(plan: Plan, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Processor time of the training thread in `step()` where a snapshot is due."""
    parameters = [
        nn.Parameter(torch.randn(64, 64, device=accelerator.name)) for _ in range(plan.parameters)
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model = nn.ParameterList(parameters)
    size = 3 * sum(p.nbytes for p in parameters)
    milliseconds = []
    durable = threading.Event()
    options: dict[str, Any] = {"every": 1, "overlap": True, "on_durable": lambda _: durable.set()}
    with snapshotter(folder, {"model": model, "optimizer": optimizer}, size, **options) as opened:
        for repetition in range(plan.warm_up + plan.repeats):
            accelerator.synchronize()
            context = opened.step()
            context.__enter__()
            start = time.thread_time()
            context.__exit__(None, None, None)
            if repetition >= plan.warm_up:
                milliseconds.append(1e3 * (time.thread_time() - start))
            while not durable.wait(0.001):  # the main thread must go on to be asked
                pass
            durable.clear()
    return {"parameters": plan.parameters, "milliseconds": milliseconds}


def tiny(plan: Plan, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Tiny tensors: how long a capture's call takes, and until all are staged."""
    tensors = [torch.randn((), device=accelerator.name) for _ in range(plan.tiny)]
    # The capture alone: a Snapshotter's save() also looks at every object of the state.
    with open_stager() as stager:
        captures = [
            stage(stager, {"state": tensors}, accelerator)
            for _ in range(plan.warm_up + plan.repeats)
        ]
    saved = []
    with snapshotter(folder, {"state": tensors}, 4 * plan.tiny) as opened:
        for _ in range(plan.warm_up + plan.repeats):
            accelerator.synchronize()
            opened.progress.step += 1
            start = time.perf_counter()
            handle = opened.save(overlap=False)
            saved.append(1e3 * (time.perf_counter() - start))
            handle.wait()
    return {
        "tensors": plan.tiny,
        "call_milliseconds": [1e3 * called for called, _ in captures[plan.warm_up :]],
        "capture_milliseconds": [1e3 * staged for _, staged in captures[plan.warm_up :]],
        "save_milliseconds": saved[plan.warm_up :],
    }


def restore(plan: Plan, accelerator: Accelerator, folder: Path, h2d: float) -> dict[str, Any]:
    """Restores into live tensors on the device, page cache warm, each after a read of the pack."""
    tensors = tensors_of(plan.overlap_bytes, accelerator)
    size = sum(tensor.nbytes for tensor in tensors)
    expected = [tensor.cpu() for tensor in tensors[:2]]
    seconds, floors = [], []
    with snapshotter(folder, {"state": tensors}, size) as opened:
        opened.progress.step += 1
        path = opened.save().wait().path
        for _ in range(1 + plan.restores):
            for tensor in tensors:
                tensor.zero_()
            accelerator.synchronize()
            read = size / read_floor(path / "0.pack")
            start = time.perf_counter()
            opened.resume()
            accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
            floors.append(size / min(read, h2d))
            for tensor, before in zip(tensors, expected, strict=False):
                if not torch.equal(tensor.cpu(), before):
                    raise RuntimeError("a restored tensor has other bytes than were saved")
    # The first one is the first copy to the device, and is slower.
    return {"bytes": size, "first": seconds[0], "seconds": seconds[1:], "floor": floors[1:]}


def side_by_side(plan: Plan, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """The stall of each way to save the same objects: until the state may change, that is the time
    in the call and at its gate, and until the copies have ended that it queued."""
    state = State.build(max(1, plan.peer_bytes // 12), accelerator.name)
    results: dict[str, Any] = {}
    for subject in (
        peers.PYSNAP,
        peers.DCP_ASYNC_STAGER,
        peers.DCP_STAGER,
        peers.DCP,
        peers.TORCHSNAPSHOT,
        peers.TORCH_SAVE,
    ):
        gc.collect()
        place = folder / subject
        place.mkdir()
        try:
            rows = stalls_of(subject, state, accelerator, place, plan.peer_repeats)
        except ImportError as error:
            results[subject] = {"skipped": str(error)}
        except Exception as error:
            # Another's failure must not lose what was measured.
            if subject == peers.PYSNAP:
                raise
            results[subject] = {"skipped": f"{type(error).__name__}: {error}"}
        else:
            results[subject] = {"first": rows[0], "warm": rows[1:]}
    return {"bytes": state.nbytes, "subjects": results}


def stalls_of(
    subject: str, state: State, accelerator: Accelerator, folder: Path, repeats: int
) -> list[dict[str, float]]:
    """The stalls of the first save and of `repeats` more. Raises ImportError for a subject that is
    not installed, and what it raises."""
    saver = peers.open_saver(subject, state.parts(), folder, None)
    try:
        saver.wait_ready()
        rows = []
        for _ in range(1 + repeats):
            state.advance()
            accelerator.synchronize()
            start = time.perf_counter()
            pending = saver.save()
            called = time.perf_counter() - start
            pending.gate()
            accelerator.synchronize()
            rows.append({"call_seconds": called, "stall_seconds": time.perf_counter() - start})
            disk.remove(pending.wait())
        return rows
    finally:
        saver.close()


def bars(results: dict[str, Any]) -> list[Bar]:
    """What issue and README promise."""
    rates = results["rates"]
    ours = _stalls(results, peers.PYSNAP)
    all_peers = [name for name in results["peers"]["subjects"] if name != peers.PYSNAP]
    stalled = results["stall"]
    fastest = stalled["bytes"] / rates["d2h"]
    return [
        Bar(
            "stall without overlap / bytes at the best pinned rate",
            STALL,
            [seconds / fastest for seconds in stalled["staged_seconds"]],
        ),
        Bar(
            "the device's stream held by a save() / the same",
            STALL,
            [seconds / fastest for seconds in stalled["held_seconds"]],
        ),
        Bar("step with an overlapped snapshot / without", STEP, results["overlap"]["ratios"]),
        Bar(
            f"processor ms in step(), {results['cpu']['parameters']} parameters",
            CPU_MILLISECONDS,
            results["cpu"]["milliseconds"],
        ),
        Bar(
            f"ms to capture {results['tiny']['tensors']} tiny tensors",
            TINY_MILLISECONDS,
            results["tiny"]["capture_milliseconds"],
        ),
        *(
            Bar(f"stall / that of {name}", 1.0, [statistics.median(ours) / s for s in theirs])
            for name in all_peers
            if (theirs := _stalls(results, name))
        ),
        Bar(
            "restore / bytes at the lower of read and bus rate",
            RESTORE,
            [
                s / floor
                for s, floor in zip(
                    results["restore"]["seconds"], results["restore"]["floor"], strict=True
                )
            ],
        ),
    ]


def _stalls(results: dict[str, Any], subject: str) -> list[float]:
    rows = results["peers"]["subjects"][subject].get("warm", [])
    return [row["stall_seconds"] for row in rows]


def draw(results: dict[str, Any], judged: list[Bar], path: Path) -> None:
    """Write the plot: each bar's median, range and limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.6 * len(judged)), layout="constrained")
    for place, bar in enumerate(judged):
        if not bar.values:
            continue
        spread = Spread.of([value / bar.limit for value in bar.values])
        axes.barh(place, spread.median, 0.6, color="#1f77b4" if bar.passed else "#9aa0a6")
        axes.plot([spread.low, spread.high], [place, place], color="#202124", linewidth=1)
    axes.axvline(1, color="#d62728")
    axes.set_yticks(range(len(judged)), [f"{bar.what} (<= {bar.limit:g})" for bar in judged])
    axes.invert_yaxis()
    axes.set_xlabel("of what is allowed")
    facts = results["machine"]
    axes.set_title(
        f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, {facts['date']}",
        fontsize=9,
        loc="left",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(
    plan: Plan, accelerator: Accelerator, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Every measurement, one after the other; memory of one is given back before the next."""
    results: dict[str, Any] = {}

    def measure(name: str, of: Callable[[Path], Any]) -> None:
        start = time.monotonic()
        (folder / name).mkdir()
        results[name] = of(folder / name)
        disk.remove(folder / name)
        gc.collect()
        if accelerator.name != "cpu":
            torch.cuda.empty_cache()
        tell(f"{name}: {time.monotonic() - start:.1f} s")

    measure("rates", lambda _: bus_rates(accelerator, plan.repeats))
    rates = results["rates"]
    measure("disk", lambda place: _disk_rate(place, min(plan.state_bytes, GB // 2)))
    measure("cpu", lambda place: cpu_time(plan, accelerator, place))
    measure("tiny", lambda place: tiny(plan, accelerator, place))
    measure("overlap", lambda place: overlap(plan, accelerator, place, rates["d2h"]))
    measure("restore", lambda place: restore(plan, accelerator, place, rates["h2d"]))
    measure("stall", lambda place: stall(plan, accelerator, place))
    measure("peers", lambda place: side_by_side(plan, accelerator, place))
    return results


def _disk_rate(folder: Path, size: int) -> float:
    """Bytes a second that are written and made durable."""
    data = Buffer(size)
    return data.size / WriteFloor(folder, data.view).measure()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results, show them. 1 if (with `--check`) a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="everything once, with a small state")
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:1, or cpu, which is no measure"
    )
    parser.add_argument("--state-gb", type=float, help="of the state (14; quick: 0.05)")
    parser.add_argument("--dir", type=Path, help="where to write (beside the results)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where results go")
    parser.add_argument("--name", default="cuda", help="of the results: NAME.json and NAME.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--note", default="", help="a sentence that goes with the figures")
    options = parser.parse_args(arguments)
    accelerator = open_accelerator(options.device)
    make = quick if options.quick else full
    plan = make(options.state_gb or (0.05 if options.quick else 14.0))
    console = Console(width=None if sys.stdout.isatty() else 120)
    with working_directory(options.dir, options.out) as folder:
        facts = machine.facts(folder) | accelerator.facts()
        facts["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        measured = run(plan, accelerator, folder, lambda text: console.print(text, style="dim"))
    results: dict[str, Any] = {"schema": 1, "machine": facts, "plan": vars(plan), **measured}
    results["note"] = options.note
    judged = bars(results)
    results["bars"] = [vars(bar) | {"passed": bar.passed} for bar in judged]
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.name}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, judged, file.with_suffix(".png"))
    rates = results["rates"]
    console.print(
        f"{facts['device']}: device to host {rates['d2h'] / GB:.1f} GB/s, host to device "
        f"{rates['h2d'] / GB:.1f} GB/s, disk {results['disk'] / GB:.2f} GB/s",
        highlight=False,
    )
    console.print(table_of_bars(judged))
    console.print(f"written: {file} and {file.with_suffix('.png').name}", highlight=False)
    return int(options.check and not all(bar.passed for bar in judged))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
