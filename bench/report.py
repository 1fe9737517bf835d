"""From raw repetitions to medians, ranges, bars that must be met, and tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peers
import restores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WARM_CAPTURE = 1.10
"""Times the best memcpy of the same bytes in the same repetition."""
MEMORY_MARGIN = 64 * 2**20
"""Beside the staging budget: what encoders, threads and tables may take."""
FOREIGN_CPU = 0.1
"""Share of the machine, used by others, above which the figures are doubted."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median and range of repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError where there is no value."""
        numbers = sorted(values)
        if not numbers:
            raise ValueError("there is no repetition to take the median of")
        return cls(statistics.median(numbers), numbers[0], numbers[-1])

    def show(self, number: Callable[[float], str]) -> str:
        """The median, and below it the range if there is one."""
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)}\n{number(self.low)}-{number(self.high)}"


@dataclass(frozen=True)
class Bar:
    """What must not be more than `limit`, judged by its median; no values: not measured."""

    what: str
    limit: float
    values: list[float]

    @property
    def passed(self) -> bool | None:
        return Spread.of(self.values).median <= self.limit if self.values else None


def best_memcpy(row: Results) -> float:
    """Seconds of the fastest implementation of the floor in one repetition."""
    return float(min(row["memcpy_seconds"].values()))


def blocked_ratios(rows: list[Results]) -> list[float]:
    """Blocked time over the best memcpy, pair by pair."""
    return [row["blocked_seconds"] / best_memcpy(row) for row in rows]


def durable_ratios(rows: list[Results]) -> list[float]:
    """Time to durable over that of writing the raw bytes, pair by pair."""
    return [row["durable_seconds"] / row["write_seconds"] for row in rows]


def speed_ratios(result: Results) -> list[float]:
    """Steps per second with one save a segment over those without, each beside its neighbours."""
    return [before / row["seconds"] for row, before in _segments(result)]


def lost_seconds(result: Results) -> list[float]:
    """Seconds of training that one save costs."""
    return [row["seconds"] - before for row, before in _segments(result)]


def _segments(result: Results) -> list[tuple[Results, float]]:
    plain = [row["seconds"] for row in result["without"]]
    neighbours = [statistics.mean(pair) for pair in itertools.pairwise(plain)]
    return list(zip(result["with"], neighbours, strict=True))


def bars(results: Results) -> list[Bar]:
    """What pysnap must meet. A subject that failed leaves its bars without values."""
    saves, restored = results["saves"], _restore_times(results)
    found = []
    for subject in (peers.PYSNAP, peers.PYSNAP_RAW):
        result = saves.get(subject)
        warm = blocked_ratios(result["warm"]) if result else []
        found.append(Bar(f"{subject}: warm capture / best memcpy", WARM_CAPTURE, warm))
        first = blocked_ratios(result["first"]) if result else []
        found.append(Bar(f"{subject}: first capture / best memcpy", WARM_CAPTURE, first))
    for subject in (peers.PYSNAP, peers.PYSNAP_RAW, peers.PYSNAP_BOUNDED):
        result = saves.get(subject)
        known = result and result["extra_memory"] is not None
        what = f"{subject}: extra memory / (staging budget + 64 MiB)"
        ratio = result["extra_memory"] / (result["staging_budget"] + MEMORY_MARGIN) if known else 0
        found.append(Bar(what, 1, [ratio] if known else []))
    bounded = saves.get(peers.PYSNAP_BOUNDED)
    damaged = [float(bounded["damaged_chunks"])] if bounded else []
    found.append(Bar(f"{peers.PYSNAP_BOUNDED}: damaged chunks of the last snapshot", 0, damaged))
    for subject in (peers.PYSNAP, peers.PYSNAP_RAW):
        pairs = (
            zip(restored[subject]["warm"], restored[restores.SAFETENSORS]["warm"], strict=True)
            if restored
            else []
        )
        what = f"{subject}: restore / {restores.SAFETENSORS}"
        found.append(Bar(what, 1, [ours / theirs for ours, theirs in pairs]))
    return found


def summary(results: Results) -> Results:
    """Medians and ranges of everything, for those who read the JSON."""

    def spread(values: Iterable[float]) -> Results:
        return vars(Spread.of(values))

    saves = {
        subject: {
            "first_blocked_seconds": spread(row["blocked_seconds"] for row in result["first"]),
            "blocked_seconds": spread(row["blocked_seconds"] for row in result["warm"]),
            "blocked_over_memcpy": spread(blocked_ratios(result["warm"])),
            "durable_seconds": spread(row["durable_seconds"] for row in result["warm"]),
            "durable_over_write": spread(durable_ratios(result["warm"])),
            "bytes": spread(row["bytes"] for row in result["warm"]),
            "extra_memory": result["extra_memory"],
        }
        for subject, result in results["saves"].items()
    }
    training = {
        subject: {
            "steps_per_second_without": spread(
                result["steps"] / row["seconds"] for row in result["without"]
            ),
            "steps_per_second_with": spread(
                result["steps"] / row["seconds"] for row in result["with"]
            ),
            "speed_ratio": spread(speed_ratios(result)),
            "lost_seconds": spread(lost_seconds(result)),
        }
        for subject, result in results["training"].items()
    }
    restored = {
        name: {"seconds": spread(result["warm"])}
        for name, result in _restore_times(results).items()
    }
    return {"saves": saves, "training": training, "restores": restored}


def show(results: Results, console: Console) -> None:
    """Tables of the medians and the bars."""
    for table in (_saves(results), _training(results), _restores(results), _bars(results)):
        if table is not None:
            console.print(table)
    worst = max(_foreign(results), default=0.0)
    if worst > FOREIGN_CPU:
        console.print(
            f"[yellow]Others (with the kernel's own threads) used up to {worst:.0%} of the machine "
            "during a measurement: repeat it when the machine is quiet."
        )


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=bool(index))
    return table


def _saves(results: Results) -> Table | None:
    if not results["saves"]:
        return None
    table = _table(
        "Saving", "", "first\nblocked s", "blocked s", "x memcpy", "durable s", "x write", "MB",
        "extra\nMB",
    )  # fmt: skip
    for subject, result in results["saves"].items():
        warm, extra = result["warm"], result["extra_memory"]
        table.add_row(
            subject,
            Spread.of(row["blocked_seconds"] for row in result["first"]).show(_seconds),
            Spread.of(row["blocked_seconds"] for row in warm).show(_seconds),
            Spread.of(blocked_ratios(warm)).show(_ratio),
            Spread.of(row["durable_seconds"] for row in warm).show(_seconds),
            Spread.of(durable_ratios(warm)).show(_ratio),
            _megabytes(warm[-1]["bytes"]),
            "unknown" if extra is None else _megabytes(extra),
        )
    bound = f"{results['bound'] / 2**20:.0f} MiB"
    table.caption = f"median, and range below it; bounded: host_memory is {bound}"
    return table


def _training(results: Results) -> Table | None:
    if not results["training"]:
        return None
    table = _table(
        "Training, one save in each segment", "", "segment s", "steps/s\nwithout", "steps/s\nwith",
        "with /\nwithout", "lost s\na save", "longest\nstep s",
    )  # fmt: skip
    for subject, result in results["training"].items():
        steps, without, saving = result["steps"], result["without"], result["with"]
        if not all(row["ended_inside"] for row in saving):
            subject += " *"
            table.caption = "* a save outlasted its segment: it costs more than is shown"
        table.add_row(
            subject,
            Spread.of(row["seconds"] for row in without).show(_seconds),
            Spread.of(steps / row["seconds"] for row in without).show(_ratio),
            Spread.of(steps / row["seconds"] for row in saving).show(_ratio),
            Spread.of(speed_ratios(result)).show(_ratio),
            Spread.of(lost_seconds(result)).show(_seconds),
            Spread.of(row["longest_step_seconds"] for row in saving).show(_seconds),
        )
    return table


def _restores(results: Results) -> Table | None:
    if not results["restores"]:
        return None
    table = _table("Restoring into existing tensors, page cache warm", "", "first s", "seconds")
    for name, times in _restore_times(results).items():
        table.add_row(name, _seconds(times["first"]), Spread.of(times["warm"]).show(_seconds))
    return table


def _bars(results: Results) -> Table:
    table = _table("Bars", "", "at most", "median\nand range", "")
    verdict = {True: "[green]PASS", False: "[red]FAIL", None: "[yellow]not measured"}
    for bar in bars(results):
        value = Spread.of(bar.values).show(_ratio) if bar.values else ""
        table.add_row(bar.what, _ratio(bar.limit), value, verdict[bar.passed])
    return table


def _restore_times(results: Results) -> Results:
    times: Results = results["restores"]["times"] if results["restores"] else {}
    return times


def _foreign(results: Results) -> list[float]:
    measured = [*results["saves"].values(), *results["training"].values()]
    if results["restores"]:
        measured.append(results["restores"])
    return [result["foreign_cpu"] for result in measured]


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.0f}"
