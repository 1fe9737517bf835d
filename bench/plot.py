"""The figures as bars: medians, with every repetition as a dot and the floors in red."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import peers
from report import Results, Spread, lost_by, speed_ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _THEIRS, _FLOOR, _DOT = "#1f77b4", "#9aa0a6", "#d62728", "#202124"
_INCHES_PER_BAR = 0.27


def files(results_file: Path) -> tuple[Path, Path]:
    """Where the plots of these results lie: of saving and restoring, and of training beside it."""
    return (
        results_file.with_suffix(".png"),
        results_file.with_name(f"{results_file.stem}-training.png"),
    )


def draw(results: Results, results_file: Path) -> None:
    """Write both plots of one run as PNG, beside its results."""
    saving, trained = files(results_file)
    _draw_saving(results, saving)
    _draw_training(results, trained)


def _draw_saving(results: Results, path: Path) -> None:
    saves = results["saves"]
    figure, grid = _figure(2, 3, len(saves))
    blocked, durable, stored, memory, restore, unused = grid
    unused.set_axis_off()
    warm = {subject: result["warm"] for subject, result in saves.items()}

    _bars(
        blocked,
        "caller blocked per save, s",
        {subject: [row["blocked_seconds"] for row in rows] for subject, rows in warm.items()},
    )
    _floors(
        blocked, "best memcpy", [[row["memcpy_seconds"] for row in rows] for rows in warm.values()]
    )
    _bars(
        durable,
        "time to durable, s",
        {subject: [row["durable_seconds"] for row in rows] for subject, rows in warm.items()},
    )
    _floors(
        durable, "write + sync", [[row["write_seconds"] for row in rows] for rows in warm.values()]
    )
    _bars(
        stored,
        "bytes on disk, GB",
        {subject: [row["bytes"] / 1e9 for row in rows] for subject, rows in warm.items()},
    )
    _bars(
        memory,
        "extra memory at the peak, GB",
        {
            subject: [result["extra_memory"] / 1e9]
            for subject, result in saves.items()
            if result["extra_memory"] is not None
        },
    )
    restored = (results["restores"] or {"times": {}})["times"]
    _bars(
        restore,
        "restore into live tensors, cache warm, s",
        {name: times["warm"] for name, times in restored.items()},
    )
    _write(figure, results, path)


def _draw_training(results: Results, path: Path) -> None:
    loops = results["training"]
    figure, grid = _figure(len(loops), 2, max(map(len, loops.values())))
    for number, (loop, subjects) in enumerate(loops.items()):
        lost, speed = grid[2 * number : 2 * number + 2]
        _bars(
            lost,
            f"{loop} loop: lost by a save, s",
            {subject: lost_by(results, loop, subject) for subject in subjects},
        )
        if floor := lost_by(results, loop, peers.FLOOR):
            _floors(lost, peers.FLOOR, [floor] * len(subjects))
        _bars(
            speed,
            f"{loop} loop: % of the speed without saves",
            {
                subject: [100 * ratio for ratio in speed_ratios(result)]
                for subject, result in subjects.items()
            },
        )
    _write(figure, results, path)


def _figure(rows: int, columns: int, bars: int) -> tuple[Figure, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = rows * (0.9 + _INCHES_PER_BAR * max(bars, 5))
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5 * columns, height), layout="constrained", squeeze=False
    )
    return figure, list(grid.flat)


def _write(figure: Figure, results: Results, path: Path) -> None:
    from matplotlib import pyplot

    state, machine = results["state"], results["machine"]
    figure.suptitle(
        f"{state['bytes'] / 1e9:.2f} GB of state ({state['tensors']} tensors) · {machine['cpu']}, "
        f"{machine['cores']} cores · {machine['file_system']} · torch {machine['torch']} · "
        f"medians, dots: repetitions · {results['date']}",
        fontsize=10,
    )
    # Without the version of matplotlib, the same figures give the same bytes more often.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _bars(axes: Axes, title: str, values: dict[str, list[float]]) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    names = [name for name, repetitions in values.items() if repetitions]
    if not names:
        axes.set_axis_off()
        return
    for place, name in enumerate(names):
        spread = Spread.of(values[name])
        axes.barh(place, spread.median, 0.6, color=_OURS if name in peers.OURS else _THEIRS)
        if spread.high > spread.low:
            axes.plot(values[name], [place] * len(values[name]), ".", color=_DOT, markersize=4)
        axes.annotate(
            f"{spread.median:.3g}",
            (max(spread.high, 0), place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(names)), [name.replace(" + ", "\n+ ") for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]) if _any_negative(values) else 0)


def _any_negative(values: dict[str, list[float]]) -> bool:
    """Noise makes it so: a save that seems to give time back."""
    return any(value < 0 for repetitions in values.values() for value in repetitions)


def _floors(axes: Axes, name: str, seconds: list[list[float]]) -> None:
    """A floor across each bar, the subject's own where it has one: those of others were measured
    at other times."""
    for place, values in enumerate(seconds):
        middle = statistics.median(values)
        axes.plot([middle, middle], [place - 0.4, place + 0.4], color=_FLOOR, linewidth=2)
    axes.set_xlabel(f"red: {name}", fontsize=9, loc="right", color=_FLOOR)
