"""`pysnap ls`: the snapshots of a repository."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from pysnap.cli import exits
from pysnap.cli.choose import notes_of
from pysnap.cli.output import Output, age, number, size
from pysnap.repository import Listing, Snapshot, is_snapshot, list_snapshots


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="REPO", help="a repository, or one snapshot")


def run(arguments: Namespace, output: Output) -> int:
    path = Path(arguments.path)
    listing = Listing([Snapshot.open(path)], []) if is_snapshot(path) else list_snapshots(path)
    rows = [describe(snapshot) for snapshot in listing.snapshots]
    damaged = [{"name": path.name, "error": str(error)} for path, error in listing.damaged]
    if output.json:
        output.data({"path": str(path), "snapshots": rows, "damaged": damaged})
    elif rows:
        output.table(
            [">step", "name", "age", ">size", ">on disk", "metrics", "marks"], list(map(_row, rows))
        )
    elif not damaged:
        output.line(f"{path} holds no snapshot yet")
    for entry in damaged if not output.json else []:
        output.error(f"{entry['name']} cannot be read: {entry['error']}")
    return exits.NO if damaged else exits.FINE


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """What `--json` tells of a snapshot."""
    notes, problem = notes_of(snapshot)
    manifest = snapshot.manifest
    return {
        "name": snapshot.path.name,
        "path": str(snapshot.path),
        "id": manifest.id,
        "step": snapshot.step,
        "created": manifest.created,
        "raw_bytes": manifest.stream,
        "stored_bytes": manifest.stored,
        "metrics": snapshot.metrics,
        "tags": list(notes.tags),
        "pinned": notes.pinned,
        "note": notes.note,
    } | ({"notes_error": problem} if problem else {})


def _row(entry: dict[str, Any]) -> list[str]:
    marks = [*(["pinned"] if entry["pinned"] else []), *entry["tags"]]
    if entry["note"]:
        marks.append(f'"{" ".join(entry["note"].split())[:60]}"')
    if "notes_error" in entry:
        marks.append("notes damaged")
    return [
        str(entry["step"]),
        entry["name"],
        age(entry["created"]),
        size(entry["raw_bytes"]),
        size(entry["stored_bytes"]),
        " ".join(f"{name}={number(value)}" for name, value in entry["metrics"].items()),
        " ".join(marks),
    ]
