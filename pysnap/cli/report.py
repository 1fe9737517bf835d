"""`pysnap report`: the history of a run as one HTML file that needs nothing beside it, or its plots
as one PNG."""

from __future__ import annotations

import contextlib
import datetime
import html
import io
import os
import uuid
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pysnap import storage
from pysnap.cli import exits
from pysnap.cli.history import Event, History, finite
from pysnap.cli.output import Output, number, seconds, size
from pysnap.errors import ConfigError, NotFoundError, StorageError, printable

_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 12, 28
# More points than there are pixels show nothing more.
_MOST_POINTS = 2000
_FEW_POINTS = 79
"""So many are marked one by one."""
_COLOR = "#1668b8"
_DPI = 80
_LONGEST_TITLE = 100

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 14px } td, th { padding: .15rem .8rem .15rem 0;
  text-align: left; vertical-align: top } th { border-bottom: 1px solid #999 }
tr.gone { color: #888 } svg { max-width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: #555 }
"""

Points = Sequence[tuple[float, float]]


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="REPO")
    parser.add_argument("target", metavar="FILE", help="`.html`, or `.png` for the plots alone")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(arguments: Namespace, output: Output) -> int:
    target = Path(arguments.target)
    if target.suffix not in (".html", ".htm", ".png"):
        raise ConfigError(f"{target} must end in .html, or in .png for the plots alone")
    if storage.exists(target) and not arguments.force:
        raise ConfigError(f"{target} exists; choose another name, or replace it by --force")
    history = History.read(Path(arguments.path))
    if target.suffix == ".png":
        data = picture(history, target)
    else:
        data = page(history).encode("utf-8", "backslashreplace")
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        storage.write_file(temporary, data)
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError.wrap(error, f"writing {target}", target) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    if output.json:
        output.data({"target": str(target), "bytes": len(data)})
    else:
        output.line(f"{target}: {size(len(data))}")
    return exits.FINE


def page(history: History) -> str:
    """The report as HTML."""
    name = _text(str(history.root))
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{name}</h1>",
            *_summary(history),
            *_charts(history),
            *_snapshots(history),
            *_failures(history),
            *_runs(history),
            "</body></html>",
            "",
        ]
    )


def picture(history: History, target: Path) -> bytes:
    """The plots of the report as PNG. Raises ConfigError without matplotlib, and NotFoundError
    where there is nothing to plot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"{target} needs matplotlib: pip install 'pysnap[cli]'; or write a .html"
        ) from None
    series = [(title, points) for title, points in _series(history) if points]
    if not series:
        raise NotFoundError(f"{history.root} has nothing to plot: it holds no snapshot")
    width, height = _WIDTH / _DPI, _HEIGHT / _DPI
    figure = Figure(figsize=(width, height * len(series)), dpi=2 * _DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, points) in zip(
        figure.subplots(len(series), squeeze=False)[:, 0], series, strict=True
    ):
        points = _thinned(points)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=_COLOR, linewidth=1.2, marker="." if len(x) <= _FEW_POINTS else "")
        # A name may hold what would be taken for mathematics.
        axes.set_title(printable(title, _LONGEST_TITLE), loc="left", parse_math=False)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    with warnings.catch_warnings():
        # A name may hold characters that no font here has.
        warnings.simplefilter("ignore")
        figure.savefig(data, format="png")
    return data.getvalue()


def _summary(history: History) -> Iterator[str]:
    snapshots = history.listing.snapshots
    stored = size(sum(snapshot.manifest.stored for snapshot in snapshots))
    taken, failed = history.of("snapshot"), history.of("failed")
    stall = sum(finite(event.get("stall_seconds")) or 0.0 for event in taken)
    yield f"<p>{len(snapshots)} snapshots are there, {stored} on disk."
    if taken:
        late = sum(event.get("late") is True for event in taken)
        yield (
            f"{len(taken)} were taken ({late} late), {len(failed)} failed; training stood still "
            f"for {_text(seconds(stall))} in all."
        )
    yield "</p>"


def _charts(history: History) -> Iterator[str]:
    for title, points in _series(history):
        yield from _chart(title, points)


def _series(history: History) -> Iterator[tuple[str, Points]]:
    """What is plotted over steps, each under its title; a series may be empty."""
    yield from history.metrics().items()
    yield "stall per snapshot, ms", history.series("snapshot", "stall_seconds", 1e3)
    yield "time to durable, s", history.series("snapshot", "durable_seconds")
    sizes = history.series("snapshot", "stored_bytes", 1e-6)
    if not sizes:
        sizes = sorted(
            (float(item.step), item.manifest.stored / 1e6) for item in history.listing.snapshots
        )
    yield "size on disk, MB", sizes


def _thinned(points: Points) -> Points:
    return points[:: -(-len(points) // _MOST_POINTS)]


def _snapshots(history: History) -> Iterator[str]:
    """Every snapshot that is known of, newest first: what it cost, and why it is there or not."""
    marks = history.held()
    there = {snapshot.path.name: snapshot for snapshot in history.listing.snapshots}
    damaged = {path.name: str(error) for path, error in history.listing.damaged}
    removed = {str(event.get("name")): str(event.get("reason")) for event in history.of("removed")}
    events = {str(event.get("name")): event for event in history.of("snapshot")}
    rows = []
    for name in dict.fromkeys([*there, *damaged, *reversed(events)]):
        event: Event = events.get(name, {})
        if name in there:
            fate = "kept" + (f": {marks[name]}" if marks[name] else "")
        elif name in damaged:
            fate = f"damaged: {damaged[name]}"
        else:
            fate = f"removed: {removed[name]}" if name in removed else "gone"
        step = there[name].step if name in there else event.get("step", "")
        stored = there[name].manifest.stored if name in there else finite(event.get("stored_bytes"))
        metrics = there[name].metrics if name in there else event.get("metrics")
        rows.append(
            (
                name in there,
                [
                    str(step),
                    name,
                    size(stored) if stored is not None else "",
                    seconds(finite(event.get("stall_seconds"))),
                    seconds(finite(event.get("durable_seconds"))),
                    _metrics(metrics),
                    fate,
                ],
            )
        )
    columns = ["step", "name", "on disk", "stall", "durable after", "metrics", "what became of it"]
    yield from _table("Snapshots", columns, rows)


def _failures(history: History) -> Iterator[str]:
    rows = [
        (True, [_time(event), str(event["step"]), str(event.get("error"))])
        for event in reversed(history.of("failed"))
    ]
    yield from _table("Failures", ["when", "step", "why"], rows)


def _runs(history: History) -> Iterator[str]:
    rows = [
        (
            True,
            [
                _time(event),
                f"process {event.get('pid')} on {event.get('host')}",
                str(event.get("rule")),
                str(event.get("keep")),
                " ".join(map(str, event["command"])) if type(event.get("command")) is list else "",
            ],
        )
        for event in reversed(history.of("run"))
    ]
    yield from _table("Runs", ["when", "where", "snapshots", "kept", "command"], rows)


def _table(title: str, columns: list[str], rows: Iterable[tuple[bool, list[str]]]) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        return
    yield f"<h2>{_text(title)}</h2><table><tr>"
    yield "".join(f"<th>{_text(column)}</th>" for column in columns) + "</tr>"
    for is_there, cells in rows:
        yield "<tr>" if is_there else '<tr class="gone">'
        yield "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table>"


def _chart(title: str, points: Points) -> Iterator[str]:
    """Values over steps as inline SVG."""
    if not points:
        return
    points = _thinned(points)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    across, up = (right - left) or 1.0, (high - low) or 1.0
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        # Values as far apart as floats go have no difference.
        return (
            _LEFT + width * (x / across - left / across),
            _TOP + height * (1 - (y / up - low / up)),
        )

    yield f"<h2>{_text(title)}</h2>"
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">'
    for value in dict.fromkeys([low, high]):
        _, y = place(left, value)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for value, anchor in dict.fromkeys([(left, "start"), (right, "end")]):
        x, _ = place(value, low)
        yield f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">step {value:.0f}</text>'
    drawn = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
    yield f'<polyline points="{drawn}" fill="none" stroke="{_COLOR}" stroke-width="1.6"/>'
    if len(points) <= _FEW_POINTS:
        for x, y in points:
            at, up_at = place(x, y)
            yield f'<circle cx="{at:.1f}" cy="{up_at:.1f}" r="2.5" fill="{_COLOR}"/>'
    yield "</svg>"


def _metrics(metrics: object) -> str:
    if not isinstance(metrics, dict):
        return ""
    return ", ".join(f"{name} {number(value)}" for name, value in metrics.items())


def _time(event: Event) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(event["time"], datetime.timezone.utc)
    except (OverflowError, ValueError, OSError):
        return ""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _text(text: str) -> str:
    return html.escape(printable(text, 2000))
