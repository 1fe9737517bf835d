"""`pysnap watch`: a live view of a repository, from its directory and its events. It takes no lock
and writes nothing."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from pysnap import storage
from pysnap.cli import exits
from pysnap.cli.history import History, finite
from pysnap.cli.output import Output, age, number, seconds, size
from pysnap.errors import ConfigError

_PARTIAL = ".partial-"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="REPO")
    parser.add_argument("--once", action="store_true", help="print the state once, and end")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks (2)")


def run(arguments: Namespace, output: Output) -> int:
    if not 0.1 <= arguments.interval <= 3600:
        raise ConfigError(f"--interval is {arguments.interval}; it must be from 0.1 to 3600")
    root = Path(arguments.path)
    state = look(root)
    if output.json or arguments.once or not sys.stdout.isatty():
        if output.json:
            output.data(state)
        else:
            output.table(["what", "is"], rows(state))
        return exits.FINE
    _follow(root, state, arguments.interval, output)
    return exits.FINE


def look(root: Path) -> dict[str, Any]:
    """How the repository stands now."""
    history = History.read(root)
    snapshots = history.listing.snapshots
    taken, failures = history.of("snapshot"), history.of("failed")
    last = taken[-1] if taken else {}
    steps = [event["step"] for kind in ("metrics", "snapshot") for event in history.of(kind)]
    metrics = history.metrics()
    return {
        "path": str(root),
        "snapshots": len(snapshots),
        "damaged": [path.name for path, _ in history.listing.damaged],
        "newest": snapshots[0].path.name if snapshots else None,
        "created": snapshots[0].manifest.created if snapshots else None,
        "step": max([*steps, *(snapshot.step for snapshot in snapshots)], default=None),
        "in_flight": sum(name.startswith(_PARTIAL) for name in storage.list_directory(root)),
        "stall_seconds": finite(last.get("stall_seconds")),
        "durable_seconds": finite(last.get("durable_seconds")),
        "raw_bytes": snapshots[0].manifest.stream if snapshots else None,
        "stored_bytes": snapshots[0].manifest.stored if snapshots else None,
        "all_stored_bytes": sum(snapshot.manifest.stored for snapshot in snapshots),
        "snapshots_per_hour": _rate([event["time"] for event in taken[-10:]]),
        "metrics": {name: points[-1][1] for name, points in metrics.items()},
        "failures": len(failures),
        "last_failure": str(failures[-1].get("error")) if failures else None,
    }


def rows(state: dict[str, Any]) -> list[list[str]]:
    """The state for people."""
    newest = "none yet"
    if state["newest"] is not None:
        newest = f"{state['newest']}, {age(state['created'])} old"
    found = [
        ["repository", state["path"]],
        ["snapshots", f"{state['snapshots']}, {size(state['all_stored_bytes'])}"],
        ["newest", newest],
        ["in flight", str(state["in_flight"] or "none")],
    ]
    if state["raw_bytes"] is not None:
        sizes = f"{size(state['raw_bytes'])}, {size(state['stored_bytes'])} on disk"
        found.append(["size", sizes])
    for name, shown in (("stall_seconds", "stall"), ("durable_seconds", "durable after")):
        if state[name] is not None:
            found.append([shown, seconds(state[name])])
    if state["snapshots_per_hour"] is not None:
        found.append(["rate", f"{state['snapshots_per_hour']:.3g} an hour"])
    found += [[name, number(value)] for name, value in state["metrics"].items()]
    if state["damaged"]:
        found.append(["damaged", ", ".join(state["damaged"])])
    if state["failures"]:
        found.append(["failed", f"{state['failures']}, the last: {state['last_failure']}"])
    return found


def _rate(times: list[float]) -> float | None:
    """Snapshots an hour, from when the last ones were durable."""
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    return (len(times) - 1) * 3600 / (times[-1] - times[0])


def _follow(root: Path, state: dict[str, Any], interval: float, output: Output) -> None:
    """Until Ctrl-C, or until the repository is gone."""
    with output.live() as show:
        while True:
            show(["what", "is"], rows(state))
            time.sleep(interval)
            state = look(root)
