"""The benchmark: pysnap beside torch.save, DCP and safetensors, as JSON, a plot and tables.

    python bench/bench_snapshot.py [--quick] [--check]

See README.md beside it for what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import peers
import plot
import psutil
import report
from floors import STREAMING_STORES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pysnap.config import parse_size

HERE = Path(__file__).parent
BYTES_PER_PARAMETER = 12
FULL_PARAMETERS = 125_000_000
QUICK_PARAMETERS = FULL_PARAMETERS // 16
FULL_BOUND = 256 * 2**20
LEAST_BOUND = 16 * 2**20
CHILD_LIMIT_SECONDS = 900.0
ERROR_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how often."""

    parameters: int
    repeats: int
    more_firsts: int
    pairs: int
    segment_seconds: float
    peers: tuple[str, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, roughly."""
        return self.parameters * BYTES_PER_PARAMETER

    @property
    def bound(self) -> int:
        """`host_memory` of the bounded subject: 256 MiB for the full state, less for a smaller."""
        return max(LEAST_BOUND, min(FULL_BOUND, FULL_BOUND * self.parameters // FULL_PARAMETERS))

    @property
    def disk_bytes(self) -> int:
        """Free space that is needed: three copies of the state and one more to spare."""
        return 4 * self.state_bytes

    @property
    def memory_bytes(self) -> int:
        """Free memory that is needed: the state, a copy for the floor, one for staging; torch."""
        return 4 * self.state_bytes + 2**30


@dataclass(frozen=True)
class Measurement:
    """One child process."""

    kind: str
    subject: str
    arguments: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.subject}" if self.subject else self.kind


class ChildError(Exception):
    """A measurement that ended without a result."""


def measurements(plan: Plan) -> list[Measurement]:
    """Everything that is to be measured, in order."""
    bounds: dict[str, int | None] = {
        peers.PYSNAP: None,
        peers.PYSNAP_OVERLAP: None,
        peers.PYSNAP_FAST: None,
        peers.PYSNAP_RAW: None,
        peers.PYSNAP_BOUNDED: plan.bound,
    }
    subjects = [*bounds, *(peers.PEERS[peer] for peer in plan.peers)]

    def saves(subject: str, repeats: int) -> Measurement:
        arguments = {
            "subject": subject,
            "parameters": plan.parameters,
            "repeats": repeats,
            "host_memory": bounds.get(subject),
        }
        return Measurement("saves", subject, arguments)

    training = {
        "parameters": plan.parameters,
        "pairs": plan.pairs,
        "seconds": plan.segment_seconds,
        "host_memory": None,
    }
    return [
        *(saves(subject, plan.repeats) for subject in subjects),
        *(saves(peers.PYSNAP, 0) for _ in range(plan.more_firsts)),
        *(
            Measurement("training", subject, training | {"subject": subject})
            for subject in (peers.PYSNAP, *subjects[len(bounds) :])
        ),
        Measurement("restores", "", {"parameters": plan.parameters, "repeats": plan.repeats}),
    ]


def run_child(measurement: Measurement, directory: Path, tell: Callable[[str], None]) -> Any:
    """The result of one measurement. Raises ChildError with what the child wrote last."""
    # Settings of the caller's pysnap must not change what is measured.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYSNAP_")
    }
    if measurement.kind == "saves":
        environment |= STREAMING_STORES
    arguments = measurement.arguments | {"directory": str(directory)}
    job = json.dumps({"measure": measurement.kind, "arguments": arguments})
    reading, writing = os.pipe()
    with os.fdopen(reading) as report_lines, tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [sys.executable, str(HERE / "child.py"), str(writing), job],
            pass_fds=[writing],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        os.close(writing)
        limit = threading.Timer(CHILD_LIMIT_SECONDS, child.kill)
        limit.start()
        result = None
        try:
            for line in report_lines:
                message = json.loads(line)
                if "tell" in message:
                    tell(message["tell"])
                else:
                    result = message["result"]
            status = child.wait()
        finally:
            limit.cancel()
            child.kill()
            child.wait()
        if status != 0 or result is None:
            output.seek(0)
            last = "\n".join(output.read().splitlines()[-ERROR_LINES:])
            raise ChildError(f"{measurement.title} ended with status {status}:\n{last}")
    return result


def run(plan: Plan, directory: Path, console: Console) -> tuple[dict[str, Any], list[str]]:
    """All results and the names of what failed."""
    results: dict[str, Any] = {"saves": {}, "training": {}, "restores": None}
    failed = []
    todo = measurements(plan)
    columns = (
        BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for measurement in todo:

            def tell(text: str, title: str = measurement.title) -> None:
                progress.update(task, description=f"{title} ({text})")

            tell("starting")
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                try:
                    _add(results, measurement, run_child(measurement, Path(folder), tell))
                except ChildError as error:
                    failed.append(measurement.subject or measurement.kind)
                    console.print(f"[red]{error}", highlight=False)
            progress.advance(task)
    return results, failed


def _add(results: dict[str, Any], measurement: Measurement, result: dict[str, Any]) -> None:
    if measurement.kind == "restores":
        results["restores"] = result
        return
    if measurement.kind == "saves":
        results["state"] = result.pop("state")
    same_kind = results[measurement.kind]
    if measurement.subject in same_kind:
        # Another process that took its first save only.
        same_kind[measurement.subject]["first"] += result["first"]
    else:
        same_kind[measurement.subject] = result


def check_room(plan: Plan, directory: Path) -> None:
    """Raise SystemExit where space or memory would run out."""
    for what, needed, free in (
        (f"disk space in {directory}", plan.disk_bytes, shutil.disk_usage(directory).free),
        ("memory", plan.memory_bytes, psutil.virtual_memory().available),
    ):
        if free < needed:
            raise SystemExit(
                f"the benchmark needs {needed / 1e9:.1f} GB of {what}, {free / 1e9:.1f} GB are "
                "free: make room, or choose a smaller --size or another --dir"
            )


@contextlib.contextmanager
def working_directory(given: Path | None, out: Path) -> Iterator[Path]:
    """A new folder in `given`, or beside the results, that is removed afterwards."""
    parent = given or out
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=parent) as folder:
        yield Path(folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="1/16 of the state and few repetitions: about a minute"
    )
    parser.add_argument("--size", type=_count, metavar="N", help="parameters, such as 125M")
    parser.add_argument("--repeats", type=int, metavar="N", help="warm repetitions of each save")
    parser.add_argument(
        "--peers",
        type=_peers,
        default=tuple(peers.PEERS),
        metavar="A,B",
        help=f"what pysnap is compared with: of {','.join(peers.PEERS)} (all), or none",
    )
    parser.add_argument(
        "--dir", type=Path, help="where to write while measuring (beside the results)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where results go")
    parser.add_argument("--name", help="of the results: NAME.json and NAME.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    """A number of parameters; `125M` is 125 million."""
    try:
        return parse_size(text + "B" if text[-1:].upper() in ("K", "M") else text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of parameters; give one such as 125M"
        ) from None


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name and name != "none")
    for name in names:
        if name not in peers.PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(peers.PEERS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results, show them. 1 if pysnap could not be measured, or (with `--check`)
    missed a bar."""
    options = parse(arguments)
    quick = options.quick
    plan = Plan(
        parameters=options.size or (QUICK_PARAMETERS if quick else FULL_PARAMETERS),
        repeats=max(1, options.repeats or (3 if quick else 5)),
        more_firsts=0 if quick else 4,
        pairs=2 if quick else 3,
        segment_seconds=1.5 if quick else 5.0,
        peers=options.peers,
    )
    name = options.name or ("quick" if quick else "snapshot")
    # Without a terminal rich takes 80 columns, which cut the tables.
    console = Console(width=None if sys.stdout.isatty() else 120)
    with working_directory(options.dir, options.out) as directory:
        check_room(plan, directory)
        facts = machine.facts(directory)
        measured, failed = run(plan, directory, console)
    results = {
        "schema": 1,
        "machine": facts,
        "repeats": plan.repeats,
        "segment_seconds": plan.segment_seconds,
        "bound": plan.bound,
        **measured,
    }
    results["summary"] = report.summary(results)
    bars = report.bars(results)
    results["bars"] = [vars(bar) | {"passed": bar.passed} for bar in bars]

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{name}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    if "state" in results:
        plot.draw(results, file.with_suffix(".png"))
    report.show(results, console)
    if plan.parameters < FULL_PARAMETERS:
        console.print(
            "The bars are meant for the full size: in a small state, the fixed cost of a save (a "
            "few milliseconds of planning) weighs more, and caches flatter the floors."
        )
    console.print(f"written: {file} and {file.with_suffix('.png').name}", highlight=False)
    if set(failed) - set(peers.PEERS.values()):
        return 1
    return int(options.check and not all(bar.passed for bar in bars))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
