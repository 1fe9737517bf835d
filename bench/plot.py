"""The figures as bars: medians, with every repetition as a dot and the floors in red."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import peers
from report import Results, Spread, best_memcpy, speed_ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _THEIRS, _FLOOR, _DOT = "#1f77b4", "#9aa0a6", "#d62728", "#202124"
_OUR_NAMES = (
    peers.PYSNAP,
    peers.PYSNAP_OVERLAP,
    peers.PYSNAP_FAST,
    peers.PYSNAP_RAW,
    peers.PYSNAP_BOUNDED,
)


def draw(results: Results, path: Path) -> None:
    """Write the plot of one run as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(15, 7), layout="constrained")
    blocked, durable, stored, memory, speed, restore = grid.flat
    saves = results["saves"]
    warm = {subject: result["warm"] for subject, result in saves.items()}

    _bars(
        blocked,
        "caller blocked per save, s",
        {subject: [row["blocked_seconds"] for row in rows] for subject, rows in warm.items()},
    )
    _floors(blocked, "best memcpy", [[best_memcpy(row) for row in rows] for rows in warm.values()])
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
    _bars(
        speed,
        "training steps/s with saves, % of without",
        {
            subject: [100 * ratio for ratio in speed_ratios(result)]
            for subject, result in results["training"].items()
        },
    )
    _bars(
        restore,
        "restore into live tensors, cache warm, s",
        {
            name: result["warm"]
            for name, result in (results["restores"] or {"times": {}})["times"].items()
        },
    )

    state, machine = results["state"], results["machine"]
    figure.suptitle(
        f"{state['bytes'] / 1e9:.2f} GB of state ({state['tensors']} tensors) · {machine['cpu']}, "
        f"{machine['cores']} cores · {machine['file_system']} · torch {machine['torch']} · "
        f"median of {results['repeats']}, dots: repetitions"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axes: Axes, title: str, values: dict[str, list[float]]) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    names = list(values)
    for place, name in enumerate(names):
        spread = Spread.of(values[name])
        axes.barh(place, spread.median, 0.6, color=_OURS if name in _OUR_NAMES else _THEIRS)
        if spread.high > spread.low:
            axes.plot(values[name], [place] * len(values[name]), ".", color=_DOT, markersize=4)
        axes.annotate(
            f"{spread.median:.3g}",
            (spread.high, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(names)), [name.replace(" + ", "\n+ ") for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)


def _floors(axes: Axes, name: str, seconds: list[list[float]]) -> None:
    """Each subject's own floor across its bar: those of others were measured at other times."""
    for place, values in enumerate(seconds):
        middle = statistics.median(values)
        axes.plot([middle, middle], [place - 0.4, place + 0.4], color=_FLOOR, linewidth=2)
    axes.set_title(f"red: {name}", fontsize=9, loc="right", color=_FLOOR)
