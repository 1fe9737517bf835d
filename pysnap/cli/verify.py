"""`pysnap verify`: read and check every byte."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from pysnap.cli import choose, exits
from pysnap.cli.output import Output
from pysnap.errors import Error
from pysnap.repository import Snapshot, is_snapshot, list_snapshots
from pysnap.verify import RepositoryVerdict, Verdict, verify_repository, verify_snapshot


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="SNAPSHOT", help="a repository (all of its snapshots), or one snapshot"
    )


def run(arguments: Namespace, output: Output) -> int:
    word = choose.Word.parse(arguments.path)
    if word.rule is None and not is_snapshot(word.path):
        return _all(word, output)
    # A damaged manifest is told by the verdict: it is not read to find the directory.
    path = word.path if word.rule is None else choose.snapshot(arguments.path).path
    with output.progress(_stored_in(path), path.name) as advance:
        verdict = verify_snapshot(path, progress=advance)
    if output.json:
        output.data(_plain(verdict))
    else:
        _tell(verdict, output)
    return exits.FINE if verdict.intact else exits.NO


def _all(word: choose.Word, output: Output) -> int:
    try:
        total = sum(snapshot.manifest.stored for snapshot in list_snapshots(word.path).snapshots)
    except Error:  # the verdict tells it
        total = 0
    with output.progress(total, str(word.path)) as advance:
        verdict: RepositoryVerdict = verify_repository(word.path, progress=advance)
    if output.json:
        output.data(
            {
                "path": str(verdict.path),
                "intact": verdict.intact,
                "snapshots": list(map(_plain, verdict.snapshots)),
                "problems": verdict.problems,
                "remarks": verdict.remarks,
            }
        )
        return exits.FINE if verdict.intact else exits.NO
    for one in verdict.snapshots:
        _tell(one, output)
    for sentence in (*verdict.problems, *verdict.remarks):
        output.line(sentence)
    if not verdict.snapshots:
        output.line(f"{verdict.path} holds no snapshot")
    return exits.FINE if verdict.intact else exits.NO


def _stored_in(path: Path) -> int:
    try:
        return Snapshot.open(path).manifest.stored
    except Error:
        return 0


def _tell(verdict: Verdict, output: Output) -> None:
    output.line(f"{verdict.path.name}: {'intact' if verdict.intact else 'DAMAGED'}")
    for sentence in (*verdict.problems, *verdict.remarks):
        output.line(f"  {sentence}")
    if verdict.damaged:
        output.line(f"  tensors that cannot be read: {', '.join(verdict.damaged)}")


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.path.name,
        "path": str(verdict.path),
        "intact": verdict.intact,
        "step": None if verdict.manifest is None else verdict.manifest.step,
        "problems": verdict.problems,
        "damaged": verdict.damaged,
        "missing": verdict.missing,
        "extra": verdict.extra,
        "remarks": verdict.remarks,
    }
