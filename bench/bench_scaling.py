"""How the cost of a snapshot grows with the bytes and with the tensors of a state, as JSON, a plot
and tables.

    python bench/bench_scaling.py [--quick] [--check]

See README.md beside it for what each figure means.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import machine
import psutil
from growth import Curve, beside_linear, exponent
from jobs import Job
from report import Bar, empty_table, table_of_bars
from rich.console import Console
from scaling import PATTERN_BYTES

HERE = Path(__file__).parent
GB = 10**9
SIZES = (10**6, 10**7, 10**8, 10**9, 10**10, 2 * 10**10)
QUICK_SIZES = (10**6, 10**7, 10**8)
TENSORS = (10, 100, 1000, 10_000, 100_000)
QUICK_TENSORS = (10, 1000, 100_000)
SIZED_TENSORS = 100
"""In the states that grow in bytes."""

BYTES, COUNT = "bytes", "tensors"
LINEAR = 1.2
"""At most so much more than the state, between neighbours, a figure may grow: a fifth is noise."""
PYTHON_MILLISECONDS = 50.0
PYTHON_TENSORS = 100_000

_STAGING_SHARE = 0.6
"""Of the free memory: what staging may take."""
_REST_BYTES = 3 * GB
"""Of memory, beside staging: what the state repeats, torch, the tables of the tensors."""
_SLOT_BYTES = 64 * 2**20
"""Beside the state, so that chunks that are not full have room."""

Point = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What is looked at along an axis."""

    title: str
    unit: str
    of: Callable[[Point], float | None]
    """None where a point has none."""


def _median(name: str, scale: float) -> Callable[[Point], float | None]:
    return lambda point: scale * statistics.median(row[name] for row in point["warm"])


def _blocked(point: Point) -> float | None:
    """What does not fit into staging memory waits for the disk: another thing than the copy."""
    staging = point["staging_bytes"]
    if staging is not None and staging < point["bytes"]:
        return None
    return _median("blocked_seconds", 1e3)(point)


def _extra(point: Point) -> float | None:
    extra = point["extra_memory"]
    return None if not extra else extra / 1e6


FIGURES = (
    Figure("blocked", "ms", _blocked),
    Figure("Python", "ms", _median("python_seconds", 1e3)),
    Figure("Python, overlap", "ms", _median("overlap_python_seconds", 1e3)),
    Figure("state_dict", "ms", _median("state_dict_seconds", 1e3)),
    Figure("durable", "ms", _median("durable_seconds", 1e3)),
    Figure("manifest", "kB", _median("manifest_bytes", 1e-3)),
    Figure("extra memory", "MB", _extra),
)
JUDGED = tuple(figure for figure in FIGURES if figure.title != "state_dict")


@dataclass(frozen=True)
class Room:
    """What the machine has to give, in bytes."""

    memory: int
    disk: int

    @property
    def staging(self) -> int:
        return round(self.memory * _STAGING_SHARE)

    @property
    def largest(self) -> int:
        """The largest state: its snapshot, and as much again to spare, fit on the disk, and a
        third of it in staging memory."""
        return min(self.disk // 2, 3 * self.staging)


def sizes_that_fit(sizes: Sequence[int], room: Room) -> tuple[list[int], str | None]:
    """Those sizes that the machine can take, the last one cut to what it can; and a sentence about
    what it cannot."""
    fit = [size for size in sizes if size <= room.largest]
    if len(fit) == len(sizes):
        return fit, None
    if not fit or room.largest >= 2 * fit[-1]:
        fit.append(room.largest)
    return fit, (
        f"{sizes[-1] / GB:.0f} GB are too much for {room.memory / GB:.0f} GB of free memory and "
        f"{room.disk / GB:.0f} GB of free disk: the largest state has {fit[-1] / GB:.2g} GB"
    )


def points(sizes: Sequence[int], counts: Sequence[int], repeats: int, room: Room) -> list[Job]:
    """A job for each point of both axes."""
    jobs_of_sizes = [
        Job(
            "scaling",
            f"{size / GB:g} GB",
            {
                "size": size,
                "tensors": SIZED_TENSORS,
                "repeats": repeats,
                "host_memory": min(size + _SLOT_BYTES, room.staging),
            },
        )
        for size in sizes
    ]
    jobs_of_counts = [
        Job(
            "scaling",
            f"{count} tensors",
            {"size": None, "tensors": count, "repeats": repeats, "host_memory": None},
        )
        for count in counts
    ]
    return [*jobs_of_sizes, *jobs_of_counts]


def curve(axis: list[Point], along: str, figure: Figure) -> Curve:
    """A figure of those points that have it."""
    values = [(float(point[along]), figure.of(point)) for point in axis]
    return [(place, value) for place, value in values if value]


def bars(axes: dict[str, list[Point]]) -> list[Bar]:
    """Nothing grows faster than linearly; planning of many tensors is short."""
    found = [
        Bar(
            f"{figure.title}: growth / that of the {along}, at worst",
            LINEAR,
            [max(factors)] if (factors := beside_linear(curve(axis, along, figure))) else [],
        )
        for along, axis in axes.items()
        for figure in JUDGED
    ]
    many = [point for point in axes[COUNT] if point["tensors"] >= PYTHON_TENSORS]
    rows = [row for point in many for row in point["warm"]]
    what = f"ms of Python in a warm save of {PYTHON_TENSORS} tensors"
    return [
        *found,
        Bar(what, PYTHON_MILLISECONDS, [1e3 * row["python_seconds"] for row in rows]),
        Bar(
            f"{what}, with overlap",
            PYTHON_MILLISECONDS,
            [1e3 * row["overlap_python_seconds"] for row in rows],
        ),
    ]


def show(axes: dict[str, list[Point]], console: Console) -> None:
    """A table for each axis: the figures of each point, and below them how they grow."""
    for along, axis in axes.items():
        titles = [f"{figure.title},\n{figure.unit}" for figure in FIGURES]
        title = f"Medians of warm saves, along {along}; exponent: 1 is linear, 0 constant"
        shown = empty_table(title, along, *titles)
        for point in axis:
            cells = [_number(figure.of(point)) for figure in FIGURES]
            place = _place(point, along)
            shown.add_row(place, *cells)
        exponents = [exponent(curve(axis, along, figure)) for figure in FIGURES]
        shown.add_row("exponent", *(f"{value:.2f}" for value in exponents))
        console.print(shown)


def _place(point: Point, along: str) -> str:
    if along == COUNT:
        return f"{point['tensors']}"
    size, staging = point["bytes"], point["staging_bytes"]
    through = f"\nthrough {staging / GB:.1f} GB" if staging < size else ""
    return f"{size / GB:g} GB{through}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot: times and bytes along both axes, in logarithms, beside a linear line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, (along, axis) in enumerate(results["axes"].items()):
        for row, units in enumerate((("ms",), ("kB", "MB"))):
            axes = grid[row][column]
            lowest = []
            for shown in FIGURES:
                if shown.unit in units and (line := curve(axis, along, shown)):
                    places, values = zip(*line, strict=True)
                    axes.plot(places, values, "o-", label=f"{shown.title}, {shown.unit}")
                    lowest.append(min(values))
            ends = [pick(point[along] for point in axis) for pick in (min, max)]
            if lowest:
                start = min(lowest)
                axes.plot(ends, [start, start * ends[1] / ends[0]], ":k", label="linear")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(f"{along} of the state")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    facts = results["machine"]
    figure.suptitle(
        f"{facts['cpu']}, {facts['cores']} cores · {facts['file_system']} · torch "
        f"{facts['torch']} · medians of {results['repeats']} warm saves · {results['date']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results, show them. 1 if a point could not be measured, or (with
    `--check`) a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smaller states: half a minute")
    parser.add_argument("--repeats", type=int, metavar="N", help="warm saves of each state")
    parser.add_argument("--dir", type=Path, help="where to write (beside the results)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where results go")
    parser.add_argument("--name", help="of the results: NAME.json and NAME.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    options = parser.parse_args(arguments)
    repeats = max(1, options.repeats or (2 if options.quick else 5))
    name = options.name or ("scaling-quick" if options.quick else "scaling")
    console = Console(width=None if sys.stdout.isatty() else 120)
    axes: dict[str, list[Point]] = {BYTES: [], COUNT: []}
    failed = False
    with jobs.working_directory(options.dir, options.out) as directory:
        jobs.check_room(directory, disk_bytes=GB, memory_bytes=_REST_BYTES)
        free = psutil.virtual_memory().available - PATTERN_BYTES
        room = Room(memory=free, disk=shutil.disk_usage(directory).free)
        sizes, cut = sizes_that_fit(QUICK_SIZES if options.quick else SIZES, room)
        if cut is not None:
            console.print(cut, style="yellow", highlight=False)
        facts = machine.facts(directory)
        planned = points(sizes, QUICK_TENSORS if options.quick else TENSORS, repeats, room)
        for job, result in jobs.run_all(planned, directory, console):
            if result is None:
                failed = True
            else:
                axes[COUNT if job.arguments["size"] is None else BYTES].append(result)
    judged = bars(axes)
    results = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": facts,
        "repeats": repeats,
        "axes": axes,
        "growth": {
            along: {
                figure.title: {
                    "beside_linear": beside_linear(line),
                    "exponent": exponent(line) if len(line) > 1 else None,
                }
                for figure in FIGURES
                for line in [curve(axis, along, figure)]
            }
            for along, axis in axes.items()
        },
        "bars": [vars(bar) | {"passed": bar.passed} for bar in judged],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{name}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    if all(axes.values()):
        draw(results, file.with_suffix(".png"))
    show(axes, console)
    console.print(table_of_bars(judged))
    console.print(f"written: {file} and {file.with_suffix('.png').name}", highlight=False)
    return int(failed or (options.check and not all(bar.passed for bar in judged)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
