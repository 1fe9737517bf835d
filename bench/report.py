"""From raw repetitions to medians, ranges, bars that must be met, and tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import coders
import peers
import restores
import training

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CAPTURED = (peers.PYSNAP, peers.PYSNAP_RAW)
"""Whose capture without overlap is judged."""
TIMED = (*CAPTURED, peers.PYSNAP_OVERLAP)
"""Whose saves have bars of time."""
WARM_CAPTURE = 1.05
"""Blocked, times the best memcpy of the same bytes in the same repetition."""
FIRST_CAPTURE = 1.10
"""The same for the first save of a process."""
OVERLAPPED_CAPTURE = 0.10
"""The same, where forward and backward take three times the copy."""
FIRST_OVER_WARM = 1.5
LOST_SECONDS = {training.COMPUTE: 0.12, training.PYTHON: 0.10}
"""Of training, by one save."""
DURABLE_OVER_WRITE = 1.08
"""Without a codec, times a direct write of the same bytes in the same repetition."""
AUTO_OVER_NONE = 1.05
"""Time to durable with `codec="auto"`, times that of its pair without a codec."""
STORED_OVER_RAW = {
    "bf16 weights": 0.67,
    "fp32 weights": 0.84,
    "exp_avg": 0.84,
    "exp_avg_sq": 0.81,
}
"""Bytes of a trained model, encoded."""
CODING_OVER_ZSTD = {
    ("bf16 weights", "encode"): 1 / 5,
    ("fp32 weights", "encode"): 1 / 7,
    ("bf16 weights", "decode"): 1 / 2.5,
    ("fp32 weights", "decode"): 1 / 3.5,
}
"""Time on one core, times that of zstd at level 1 on the raw bytes in the same repetition."""
MEMORY_OVER_STATE = 1.05
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
        median, low, high = number(self.median), number(self.low), number(self.high)
        return median if low == high else f"{median}\n{low}-{high}"


@dataclass(frozen=True)
class Bar:
    """What must not be more than `limit`, judged by its median; no values: not measured."""

    what: str
    limit: float
    values: list[float]

    @property
    def passed(self) -> bool | None:
        return Spread.of(self.values).median <= self.limit if self.values else None


def blocked_ratios(rows: list[Results], memcpy: str = "memcpy_seconds") -> list[float]:
    """Blocked time over the best memcpy, pair by pair."""
    return [row["blocked_seconds"] / row[memcpy] for row in rows]


def durable_ratios(rows: list[Results]) -> list[float]:
    """Time to durable over that of writing the raw bytes, pair by pair."""
    return [row["durable_seconds"] / row["write_seconds"] for row in rows]


def steps_per_second(result: Results, which: str) -> list[float]:
    """Speed in the segments `with` or `without` a save."""
    return [row["steps"] / row["seconds"] for row in result[which]]


def speed_ratios(result: Results) -> list[float]:
    """Steps per second with one save a segment over those without, each beside its neighbours."""
    return [before / row["seconds"] for row, before in _segments(result)]


def lost_seconds(result: Results) -> list[float]:
    """Seconds of training that each save costs."""
    return [row["seconds"] - before for row, before in _segments(result)]


def lost_by(results: Results, loop: str, subject: str) -> list[float]:
    """`lost_seconds` of a subject; of the shorter and more segments where it ran them."""
    for result in (
        results["lost"].get(loop),
        results["training"].get(loop, {}).get(subject),
    ):
        if result and (lost := _lost_in(result, subject)):
            return lost
    return []


def noise_seconds(results: Results, loop: str) -> list[float]:
    """How much the longer segments differ from the mean of their neighbours where nothing is
    saved."""
    found = []
    for result in results["training"].get(loop, {}).values():
        plain = [row["seconds"] for row in result["without"]]
        found += [
            abs(here - (before + after) / 2)
            for before, here, after in zip(plain, plain[1:], plain[2:], strict=False)
        ]
    return found


def _lost_in(result: Results, subject: str) -> list[float]:
    rows = zip(result["with"], lost_seconds(result), strict=True)
    return [lost for row, lost in rows if row["subject"] == subject]


def _segments(result: Results) -> list[tuple[Results, float]]:
    """Each segment with a save, and the seconds of as many steps in its neighbours."""
    plain = [row["seconds"] / row["steps"] for row in result["without"]]
    neighbours = [statistics.mean(pair) for pair in itertools.pairwise(plain)]
    rows = zip(result["with"], neighbours, strict=True)
    return [(row, row["steps"] * step_seconds) for row, step_seconds in rows]


def restore_seconds(results: Results, subject: str) -> list[float]:
    """Each warm restore of what `subject` writes, by the fastest way; empty if not measured."""
    times = _restore_times(results)
    names = restores.OTHERS.get(subject, (subject,))
    rows = [times[name]["warm"] for name in names if name in times]
    return [min(row) for row in zip(*rows, strict=True)]


def coding_kinds(results: Results) -> Results:
    """What was measured of coders on each kind of bytes; empty if nothing was."""
    measured: Results | None = results.get("coders")
    return measured["kinds"] if measured else {}


def stored_ratios(result: Results, coder: str) -> list[float]:
    """Bytes stored of one kind over its bytes; empty if there was no such coder."""
    rows = result["coders"].get(coder, [])
    return [row["stored_bytes"] / result["raw_bytes"] for row in rows]


def coding_rates(result: Results, coder: str, way: str) -> list[float]:
    """Bytes per second of `encode` or `decode`; empty if there was no such coder."""
    rows = result["coders"].get(coder, [])
    return [result["raw_bytes"] / row[f"{way}_seconds"] for row in rows]


def coding_ratios(result: Results, way: str) -> list[float]:
    """Time of pysnap to `encode` or `decode` over that of zstd, pair by pair; empty if one of them
    was not there."""
    if not {coders.PYSNAP, coders.ZSTD} <= result["coders"].keys():
        return []
    pairs = zip(result["coders"][coders.PYSNAP], result["coders"][coders.ZSTD], strict=True)
    return [ours[f"{way}_seconds"] / theirs[f"{way}_seconds"] for ours, theirs in pairs]


def bars(results: Results) -> list[Bar]:
    """What pysnap must meet. A subject that failed leaves its bars without values."""
    return [
        *_capture_bars(results),
        *_training_bars(results),
        *_durable_bars(results),
        *_coding_bars(results),
        *_memory_bars(results),
        *_restore_bars(results),
    ]


def _rows(results: Results, subject: str, which: str) -> list[Results]:
    rows: list[Results] = results["saves"].get(subject, {}).get(which, [])
    return rows


def _capture_bars(results: Results) -> list[Bar]:
    found = []
    for subject in CAPTURED:
        warm, first = (_rows(results, subject, which) for which in ("warm", "first"))
        found += [
            Bar(f"{subject}: blocked / best memcpy", WARM_CAPTURE, blocked_ratios(warm)),
            Bar(f"{subject}: first blocked / best memcpy", FIRST_CAPTURE, blocked_ratios(first)),
        ]
        usual = [row["blocked_seconds"] for row in warm]
        ratios = [row["blocked_seconds"] / Spread.of(usual).median for row in first if usual]
        found.append(Bar(f"{subject}: first blocked / warm", FIRST_OVER_WARM, ratios))
    overlapped = blocked_ratios(_rows(results, peers.PYSNAP_OVERLAP, "warm"))
    what = f"{peers.PYSNAP_OVERLAP}: blocked / best memcpy"
    return [*found, Bar(what, OVERLAPPED_CAPTURE, overlapped)]


def _training_bars(results: Results) -> list[Bar]:
    found = []
    for loop, limit in LOST_SECONDS.items():
        for subject in (peers.PYSNAP, peers.PYSNAP_OVERLAP):
            lost = lost_by(results, loop, subject)
            found.append(Bar(f"{subject}: s of a {loop} loop lost by a save", limit, lost))
    return found


def _durable_bars(results: Results) -> list[Bar]:
    written = durable_ratios(_rows(results, peers.PYSNAP_RAW, "warm"))
    codecs = results["codecs"] or {"pairs": [], "state_bytes": 1}
    pairs = [(pair["auto"], pair["none"]) for pair in codecs["pairs"]]
    return [
        Bar(f"{peers.PYSNAP_RAW}: durable / write and sync", DURABLE_OVER_WRITE, written),
        Bar(
            f"{peers.PYSNAP}: durable / that of codec none",
            AUTO_OVER_NONE,
            [auto["durable_seconds"] / none["durable_seconds"] for auto, none in pairs],
        ),
        Bar(
            f"{peers.PYSNAP}: bytes on disk / of the state",
            1,
            [auto["bytes"] / codecs["state_bytes"] for auto, _ in pairs],
        ),
    ]


def _coding_bars(results: Results) -> list[Bar]:
    kinds = coding_kinds(results)
    found = []
    for kind, limit in STORED_OVER_RAW.items():
        stored = stored_ratios(kinds[kind], coders.PYSNAP) if kind in kinds else []
        found.append(Bar(f"{kind}: stored / raw", limit, stored))
    for (kind, way), limit in CODING_OVER_ZSTD.items():
        ratios = coding_ratios(kinds[kind], way) if kind in kinds else []
        found.append(Bar(f"{kind}: {way} / time of {coders.ZSTD}", limit, ratios))
    return found


def _memory_bars(results: Results) -> list[Bar]:
    found = []
    for subject in (peers.PYSNAP, peers.PYSNAP_RAW, peers.PYSNAP_BOUNDED):
        result = results["saves"].get(subject)
        extra = [result["extra_memory"]] if result and result["extra_memory"] is not None else []
        if subject != peers.PYSNAP_BOUNDED:
            what = f"{subject}: extra memory / bytes of the state"
            ratios = [peak / results["state"]["bytes"] for peak in extra]
            found.append(Bar(what, MEMORY_OVER_STATE, ratios))
        what = f"{subject}: extra memory / (staging budget + 64 MiB)"
        budget = result["staging_budget"] if result else 0
        found.append(Bar(what, 1, [peak / (budget + MEMORY_MARGIN) for peak in extra]))
    bounded = results["saves"].get(peers.PYSNAP_BOUNDED)
    damaged = [float(bounded["damaged_chunks"])] if bounded else []
    found.append(Bar(f"{peers.PYSNAP_BOUNDED}: damaged chunks of the last snapshot", 0, damaged))
    return found


def _restore_bars(results: Results) -> list[Bar]:
    found = []
    theirs = restore_seconds(results, peers.SAFETENSORS)
    for subject in (peers.PYSNAP, peers.PYSNAP_RAW):
        pairs = zip(restore_seconds(results, subject), theirs, strict=True)
        what = f"{subject}: restore / faster of {restores.SAFETENSORS}"
        found.append(Bar(what, 1, [ours / other for ours, other in pairs]))
        extra = results["restores"]["extra_memory"][subject] if results["restores"] else []
        what = f"{subject}: extra memory of a restore / 64 MiB"
        found.append(Bar(what, 1, [peak / MEMORY_MARGIN for peak in extra]))
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
            "blocked_over_memcpy_again": spread(
                blocked_ratios(result["warm"], "memcpy_again_seconds")
            ),
            "durable_seconds": spread(row["durable_seconds"] for row in result["warm"]),
            "durable_over_write": spread(durable_ratios(result["warm"])),
            "bytes": spread(row["bytes"] for row in result["warm"]),
            "extra_memory": result["extra_memory"],
        }
        for subject, result in results["saves"].items()
    }
    trained = {
        loop: {
            subject: {
                "steps_per_second_without": spread(steps_per_second(result, "without")),
                "steps_per_second_with": spread(steps_per_second(result, "with")),
                "speed_ratio": spread(speed_ratios(result)),
                "lost_seconds": spread(lost_by(results, loop, subject)),
            }
            for subject, result in subjects.items()
        }
        for loop, subjects in results["training"].items()
    }
    restored = {
        name: {"seconds": spread(result["warm"])}
        for name, result in _restore_times(results).items()
    }
    coded = {
        kind: {
            coder: {
                "stored_over_raw": spread(stored_ratios(result, coder)),
                "encode_bytes_per_second": spread(coding_rates(result, coder, "encode")),
                "decode_bytes_per_second": spread(coding_rates(result, coder, "decode")),
            }
            for coder in result["coders"]
        }
        for kind, result in coding_kinds(results).items()
    }
    floors = {
        loop: {"lost_seconds": spread(lost)}
        for loop in training.LOOPS
        if (lost := lost_by(results, loop, peers.FLOOR))
    }
    return {
        "saves": saves,
        "training": trained,
        "floors": floors,
        "restores": restored,
        "coders": coded,
    }


def show(results: Results, console: Console) -> None:
    """Tables of the medians and the bars."""
    for table in (
        _saves(results),
        *(_training(results, loop) for loop in results["training"]),
        _restores(results),
        _coding(results),
        table_of_bars(bars(results)),
    ):
        if table is not None:
            console.print(table)
    worst = max(_foreign(results), default=0.0)
    if worst > FOREIGN_CPU:
        console.print(
            f"[yellow]Others (with the kernel's own threads) used up to {worst:.0%} of the machine "
            "during a measurement: repeat it when the machine is quiet."
        )


def empty_table(title: str, *columns: str) -> Table:
    """An empty table; the first column is text, the others are figures."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_lines=True
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=bool(index))
    return table


def _table_of_subjects(
    title: str, subjects: Results, rows: dict[str, Callable[[Results], str]]
) -> Table:
    """A row for each subject, a column for each figure."""
    table = empty_table(title, "median, range below", *rows)
    for subject, result in subjects.items():
        table.add_row(subject, *(cell(result) for cell in rows.values()))
    return table


def _saves(results: Results) -> Table | None:
    if not results["saves"]:
        return None

    def warm(figure: str, number: Callable[[float], str]) -> Callable[[Results], str]:
        return lambda result: Spread.of(row[figure] for row in result["warm"]).show(number)

    def first(result: Results) -> str:
        return Spread.of(row["blocked_seconds"] for row in result["first"]).show(_milliseconds)

    def extra(result: Results) -> str:
        known = result["extra_memory"]
        return "unknown" if known is None else _megabytes(known)

    table = _table_of_subjects(
        "Saving",
        results["saves"],
        {
            "blocked by\nthe first, ms": first,
            "blocked, ms": warm("blocked_seconds", _milliseconds),
            "/ best\nmemcpy": lambda result: Spread.of(blocked_ratios(result["warm"])).show(_two),
            "durable, s": warm("durable_seconds", _two),
            "/ write\nand sync": lambda result: Spread.of(durable_ratios(result["warm"])).show(
                _two
            ),
            "on disk,\nMB": warm("bytes", _megabytes),
            "extra\nmemory, MB": extra,
        },
    )
    table.caption = f"bounded: host_memory is {results['bound'] / 2**20:.0f} MiB"
    return table


def _training(results: Results, loop: str) -> Table | None:
    if not results["training"][loop]:
        return None

    def rate(which: str) -> Callable[[Results], str]:
        return lambda result: Spread.of(steps_per_second(result, which)).show(_two)

    def longest(result: Results) -> str:
        return Spread.of(row["longest_step_seconds"] for row in result["with"]).show(_milliseconds)

    table = _table_of_subjects(
        f"A {loop} loop, one save in each segment of about {results['segment_seconds']} s",
        {
            subject: result | {"lost": lost_by(results, loop, subject)}
            for subject, result in results["training"][loop].items()
        },
        {
            "steps/s\nwithout saves": rate("without"),
            "with": rate("with"),
            "with /\nwithout": lambda result: Spread.of(speed_ratios(result)).show(_two),
            "lost by\na save, s": lambda result: Spread.of(result["lost"]).show(_two),
            "longest\nstep, ms": longest,
            "saves that\noutlasted it": lambda result: str(
                sum(not row["ended_inside"] for row in result["with"])
            ),
        },
    )
    if floor := lost_by(results, loop, peers.FLOOR):
        lost = Spread.of(floor).show(_two).replace("\n", " s, ")
        table.caption = f"lost by {peers.FLOOR} alone: {lost} s"
    return table


def _restores(results: Results) -> Table | None:
    if not results["restores"]:
        return None
    title = "Restoring into existing tensors, page cache warm"
    table = empty_table(title, "", "first, ms", "ms", "extra memory, GB")
    for name, times in _restore_times(results).items():
        warm = Spread.of(times["warm"]).show(_milliseconds)
        extra = results["restores"]["extra_memory"][name]
        memory = f"{max(extra) / 1e9:.2f}" if extra else ""
        table.add_row(name, _milliseconds(times["first"]), warm, memory)
    return table


def _coding(results: Results) -> Table | None:
    kinds = coding_kinds(results)
    if not kinds:
        return None
    table = empty_table(
        f"Chunks of a model trained for {results['coders']['trained']['steps']} steps, one core",
        "median, range below",
        "stored / raw",
        "encode, GB/s",
        "decode, GB/s",
    )
    for kind, result in kinds.items():
        for coder in result["coders"]:
            rates = [coding_rates(result, coder, way) for way in ("encode", "decode")]
            table.add_row(
                f"{kind}, {coder}",
                Spread.of(stored_ratios(result, coder)).show(_three),
                *(Spread.of(rate).show(_gigabytes) for rate in rates),
            )
    missing = results["coders"]["missing"]
    table.caption = "; ".join(f"{coder}: {why}" for coder, why in missing.items()) or None
    return table


def table_of_bars(judged: list[Bar]) -> Table:
    """What must hold, and what was measured."""
    table = empty_table("Bars", "", "median,\nrange", "at most", "")
    verdict = {True: "[green]met", False: "[red]missed", None: "[yellow]not\nmeasured"}
    for bar in judged:
        value = Spread.of(bar.values).show(_two) if bar.values else ""
        table.add_row(bar.what, value, _two(bar.limit), verdict[bar.passed])
    return table


def _restore_times(results: Results) -> Results:
    times: Results = results["restores"]["times"] if results["restores"] else {}
    return times


def _foreign(results: Results) -> list[float]:
    trained = [result for loop in results["training"].values() for result in loop.values()]
    once = [results[kind] for kind in ("codecs", "coders", "restores") if results.get(kind)]
    measured = [*results["saves"].values(), *trained, *results["lost"].values(), *once]
    return [result["foreign_cpu"] for result in measured]


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.0f}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.0f}"
