"""The benchmark: pysnap beside those who also save PyTorch's state, as JSON, plots and tables.

    python bench/bench_snapshot.py [--quick] [--check]

See README.md beside it for what each figure means.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import machine
import peers
import plot
import report
import training
from jobs import Job
from rich.console import Console

from pysnap.config import parse_size

HERE = Path(__file__).parent
SCHEMA = 5
BYTES_PER_PARAMETER = 12
FULL_PARAMETERS = 125_000_000
QUICK_PARAMETERS = FULL_PARAMETERS // 16
FULL_BOUND = 256 * 2**20
LEAST_BOUND = 16 * 2**20
TRAINED_STEPS = 200
QUICK_TRAINED_STEPS = 20
CODER_REPEATS = 6
"""Of each of the plan's: one takes about a second."""
PAIR_REPEATS = 5
"""The same for what is compared in turn in one process and has a bar: codecs, restores."""
TRAINED_WITH = (peers.PYSNAP, peers.PYSNAP_OVERLAP)
LOST = (*TRAINED_WITH, peers.FLOOR)
"""Whose cost to training is compared in turn."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how often: each way to save `repeats` times warm in a process, those
    that have bars of time in so many `processes`."""

    parameters: int
    repeats: int
    processes: int
    rounds: int
    segment_seconds: float
    lost_rounds: int
    trained_steps: int
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
        """Free space that is needed: six copies of the state, which are restored, and one more to
        spare."""
        return 7 * self.state_bytes

    @property
    def memory_bytes(self) -> int:
        """Free memory that is needed: the state, a copy for the floor, two for staging; torch."""
        return 4 * self.state_bytes + 2**30


def measurements(plan: Plan) -> list[Job]:
    """Everything that is to be measured, in order."""
    others = [peers.PEERS[peer].name for peer in plan.peers]
    again = {"parameters": plan.parameters, "repeats": plan.repeats}
    pairs = again | {"repeats": PAIR_REPEATS * plan.repeats}

    def saves(subject: str) -> Job:
        bound = plan.bound if subject == peers.PYSNAP_BOUNDED else None
        return Job("saves", subject, again | {"subject": subject, "host_memory": bound})

    def trained(loop: str, subject: str) -> Job:
        rounds = {"rounds": plan.rounds, "seconds": plan.segment_seconds}
        arguments = {"subjects": [subject], "loop": loop, "parameters": plan.parameters}
        return Job("training", subject, arguments | rounds)

    def lost(loop: str) -> Job:
        # As short as a save allows: the noise of a segment grows with its length.
        rounds = {"rounds": plan.lost_rounds, "seconds": None}
        arguments = {"subjects": list(LOST), "loop": loop, "parameters": plan.parameters}
        return Job("lost", "", arguments | rounds)

    return [
        *(saves(subject) for subject in (*peers.OURS, *others)),
        *(saves(subject) for _ in range(plan.processes - 1) for subject in report.TIMED),
        Job("codecs", "", pairs),
        Job("coders", "", {"steps": plan.trained_steps, "repeats": CODER_REPEATS * plan.repeats}),
        *(trained(loop, name) for loop in training.LOOPS for name in (*TRAINED_WITH, *others)),
        *(lost(loop) for loop in training.LOOPS),
        Job("restores", "", pairs),
    ]


def run(plan: Plan, directory: Path, console: Console) -> tuple[dict[str, Any], list[str]]:
    """All results and the names of what failed."""
    results: dict[str, Any] = {
        "saves": {},
        "training": {loop: {} for loop in training.LOOPS},
        "lost": {},
        "codecs": None,
        "coders": None,
        "restores": None,
    }
    failed = []
    for job, result in jobs.run_all(measurements(plan), directory, console):
        if result is None:
            failed.append(job.subject or job.kind)
        else:
            _add(results, job, result)
    return results, failed


def _add(results: dict[str, Any], job: Job, result: dict[str, Any]) -> None:
    if job.kind == "training":
        results["training"][job.arguments["loop"]][job.subject] = result
    elif job.kind == "lost":
        results["lost"][job.arguments["loop"]] = result
    elif job.kind == "saves":
        results["state"] = result.pop("state")
        known = results["saves"].setdefault(job.subject, result)
        if known is not result:
            _add_process(known, result)
    else:
        results[job.kind] = result


def _add_process(known: dict[str, Any], more: dict[str, Any]) -> None:
    """To the saves of a subject those of another process; of memory and disturbance, the most."""
    for sum_of in ("first", "warm", "damaged_chunks", "wall_seconds"):
        known[sum_of] += more[sum_of]
    for most_of in ("extra_memory", "foreign_cpu"):
        values = [value for value in (known[most_of], more[most_of]) if value is not None]
        known[most_of] = max(values, default=None)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="1/16 of the state and few repetitions: a few minutes"
    )
    parser.add_argument("--size", type=_count, metavar="N", help="parameters, such as 125M")
    parser.add_argument("--repeats", type=int, metavar="N", help="warm repetitions of each save")
    parser.add_argument(
        "--peers",
        type=_peers,
        default=tuple(peers.PEERS),
        metavar="A,B",
        help=f"what pysnap is compared with: of {','.join(peers.PEERS)} (all that are installed), "
        "or none",
    )
    parser.add_argument(
        "--dir", type=Path, help="where to write while measuring (beside the results)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where results go")
    parser.add_argument("--name", help="of the results: NAME.json, NAME.png, NAME-training.png")
    parser.add_argument("--note", help="a sentence that goes with the figures wherever they go")
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


def installed(names: Sequence[str], console: Console) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those of the peers that can be measured, and why the others cannot."""
    skipped = {name: why for name in names if (why := peers.missing(name)) is not None}
    for name, why in skipped.items():
        console.print(f"{name} is left out: {why}", style="yellow", highlight=False)
    return tuple(name for name in names if name not in skipped), skipped


def _command(options: argparse.Namespace) -> str:
    """What was called, but for places and names of files."""
    words = ["python", "bench/bench_snapshot.py"]
    if options.quick:
        words.append("--quick")
    if options.size:
        words.append(f"--size={options.size}")
    if options.repeats:
        words.append(f"--repeats={options.repeats}")
    if options.peers != tuple(peers.PEERS):
        words.append(f"--peers={','.join(options.peers) or 'none'}")
    return shlex.join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results, show them. 1 if pysnap could not be measured, or (with `--check`)
    missed a bar."""
    options = parse(arguments)
    quick = options.quick
    # Without a terminal rich takes 80 columns, which cut the tables.
    console = Console(width=None if sys.stdout.isatty() else 120)
    chosen, skipped = installed(options.peers, console)
    plan = Plan(
        parameters=options.size or (QUICK_PARAMETERS if quick else FULL_PARAMETERS),
        repeats=max(1, options.repeats or (3 if quick else 5)),
        processes=1 if quick else 8,
        rounds=2 if quick else 3,
        segment_seconds=1.5 if quick else 5.0,
        lost_rounds=2 if quick else 80,
        trained_steps=QUICK_TRAINED_STEPS if quick else TRAINED_STEPS,
        peers=chosen,
    )
    name = options.name or ("quick" if quick else "snapshot")
    with jobs.working_directory(options.dir, options.out) as directory:
        jobs.check_room(directory, disk_bytes=plan.disk_bytes, memory_bytes=plan.memory_bytes)
        facts = machine.facts(directory)
        measured, failed = run(plan, directory, console)
    results = {
        "schema": SCHEMA,
        "command": _command(options),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "note": options.note,
        "machine": facts,
        "repeats": plan.repeats,
        "processes": plan.processes,
        "segment_seconds": plan.segment_seconds,
        "bound": plan.bound,
        "skipped": skipped,
        **measured,
    }
    results["summary"] = report.summary(results)
    bars = report.bars(results)
    results["bars"] = [vars(bar) | {"passed": bar.passed} for bar in bars]

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{name}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    if "state" in results:
        plot.draw(results, file)
    report.show(results, console)
    if plan.parameters < FULL_PARAMETERS:
        console.print(
            "The bars are meant for the full size: in a small state, the fixed cost of a save (a "
            "few milliseconds of planning) weighs more, and caches flatter the floors."
        )
    console.print(f"written: {file} and its plots", highlight=False)
    if set(failed) - {peer.name for peer in peers.PEERS.values()}:
        return 1
    return int(options.check and not all(bar.passed for bar in bars))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
