"""`pysnap prune`: remove the snapshots that no rule keeps; first a plan, then the deed."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pysnap.best import Best
from pysnap.cli import choose, exits
from pysnap.cli.output import Output, size
from pysnap.errors import ConfigError
from pysnap.events import read_events
from pysnap.repository import Listing, Repository, Snapshot, held_by, list_snapshots
from pysnap.retention import Keep, Verdict, plan


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="REPO")
    parser.add_argument("--last", type=int, help="keep so many of the newest")
    parser.add_argument("--best", type=int, help="keep so many of the best")
    parser.add_argument("--by", metavar="RULE", help='what is best, such as "min val_loss"')
    parser.add_argument("--every", metavar="AMOUNT", help='keep one every "10000 steps" or `6h`')
    parser.add_argument(
        "--for", dest="for_", metavar="AMOUNT", help="keep those for so long (with --every: these)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.description = (
        "Remove the snapshots that no rule keeps. Without a rule, those of the last run that "
        "wrote to the repository hold. The newest, and what is tagged or pinned, is always kept."
    )


def run(arguments: Namespace, output: Output) -> int:
    root = Path(arguments.path)
    if arguments.dry_run:
        listing = list_snapshots(root)
        verdicts = _plan(arguments, root, listing, listing.snapshots)
        _tell(verdicts, listing, output, removed=None)
        return exits.FINE
    list_snapshots(root)  # there must be a repository: a writer would make one
    repository = Repository(root)
    try:
        listing = repository.list()
        verdicts = _plan(arguments, root, listing, repository.durable())
        removed = {
            verdict.snapshot.path
            for verdict in reversed(verdicts)
            if not verdict.kept and repository.delete(verdict.snapshot.path)
        }
    finally:
        repository.close()
    _tell(verdicts, listing, output, removed)
    return exits.FINE


def _plan(
    arguments: Namespace, root: Path, listing: Listing, snapshots: Sequence[Snapshot]
) -> list[Verdict]:
    keep, best = _rule(arguments, root, listing)
    held = {item.path: why for item in listing.snapshots if (why := held_by(item.path))}
    return plan(snapshots, keep, best=best, held=held)


def _rule(arguments: Namespace, root: Path, listing: Listing) -> tuple[Keep, Best | None]:
    given = {
        name: value
        for name in ("last", "best", "every", "for_")
        if (value := getattr(arguments, name)) is not None
    }
    rule = Best.parse(arguments.by) if arguments.by else None
    if given:
        if given.get("best") and rule is None:
            rule = choose.best_rule(listing)
        # What is not asked for is not kept; the newest is, whatever is asked for.
        return Keep(**({"last": 1} | given)), rule
    for event in reversed([event for event in read_events(root) if event["event"] == "run"]):
        kept, text = event.get("keep"), event.get("best")
        if isinstance(kept, dict):
            known = {name: kept[name] for name in ("last", "best", "every", "for_") if name in kept}
            last_rule = Best.parse(text) if isinstance(text, str) else None
            return Keep(**known), rule or last_rule
    raise ConfigError(
        f"{root} does not say what its run keeps; say it, such as --last 3 or --every '1000 steps'"
    )


def _tell(
    verdicts: list[Verdict], listing: Listing, output: Output, removed: set[Path] | None
) -> None:
    """`removed`: what was; None: nothing, it was a plan."""
    entries: list[dict[str, Any]] = []
    for verdict in verdicts:
        gone = not verdict.kept and (removed is None or verdict.snapshot.path in removed)
        entries.append(
            {
                "name": verdict.snapshot.path.name,
                "step": verdict.snapshot.step,
                "stored_bytes": verdict.snapshot.manifest.stored,
                "kept": not gone,
                "reason": verdict.reason if gone == (not verdict.kept) else "marked meanwhile",
            }
        )
    freed = sum(entry["stored_bytes"] for entry in entries if not entry["kept"])
    if output.json:
        damaged = [{"name": path.name, "error": str(error)} for path, error in listing.damaged]
        output.data(
            {
                "dry_run": removed is None,
                "snapshots": entries,
                "freed_bytes": freed,
                "damaged": damaged,
            }
        )
        return
    word = "would be removed" if removed is None else "removed"
    output.table(
        [">step", "name", ">on disk", "", "why"],
        [
            [
                str(entry["step"]),
                entry["name"],
                size(entry["stored_bytes"]),
                "kept" if entry["kept"] else word,
                entry["reason"],
            ]
            for entry in entries
        ],
    )
    output.line(f"{sum(not entry['kept'] for entry in entries)} {word}, {size(freed)}")
    for path, _ in listing.damaged:
        output.line(f"{path.name} cannot be read and stays; `pysnap verify` says why")
