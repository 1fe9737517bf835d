"""`pysnap tag`, `pin` and `note`: marks of a snapshot, also beside a running writer."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pysnap import notes
from pysnap.cli import choose, exits
from pysnap.cli.ls import describe
from pysnap.cli.output import Output
from pysnap.errors import ConfigError, NotFoundError
from pysnap.repository import Snapshot, list_snapshots


def configure(parser: ArgumentParser) -> None:
    command = parser.prog.split()[-1]
    parser.add_argument("snapshot", metavar="SNAPSHOT")
    if command == "tag":
        parser.add_argument("tags", metavar="TAG", nargs="+")
        how = parser.add_mutually_exclusive_group()
        how.add_argument("--remove", action="store_true", help="take the tags away")
        how.add_argument(
            "--move", action="store_true", help="take them from the snapshots that have them"
        )
    elif command == "pin":
        parser.add_argument("--remove", action="store_true", help="unpin it")
    else:
        parser.add_argument("text", metavar="TEXT", help="the note; an empty one removes it")


def run(arguments: Namespace, output: Output) -> int:
    snapshot = choose.snapshot(arguments.snapshot)
    if arguments.command == "tag":
        _tag(snapshot, arguments)
    elif arguments.command == "pin":
        notes.pin(snapshot.path, not arguments.remove)
    else:
        notes.write_note(snapshot.path, arguments.text)
    described = describe(snapshot)
    if output.json:
        output.data(described)
    else:
        marks = [*(["pinned"] if described["pinned"] else []), *described["tags"]]
        output.line(f"{snapshot.path}: {', '.join(marks) or 'no tag, not pinned'}")
        if described["note"]:
            output.line(described["note"])
    return exits.FINE


def _tag(snapshot: Snapshot, arguments: Namespace) -> None:
    for tag in arguments.tags:
        notes.check_tag(tag)
    if arguments.remove:
        missing = set(arguments.tags).difference(notes.Notes.read(snapshot.path).tags)
        if missing:
            raise NotFoundError(f"{snapshot.path} has no tag {', '.join(sorted(missing))}")
        notes.remove_tags(snapshot.path, *arguments.tags)
        return
    others = _others_with(snapshot, arguments.tags)
    if others and not arguments.move:
        path, tags = others[0]
        raise ConfigError(f"{path} is tagged {', '.join(tags)} already; --move takes it from there")
    # First the new place: whatever happens between, the tag is somewhere.
    notes.add_tags(snapshot.path, *arguments.tags)
    for path, tags in others:
        notes.remove_tags(path, *tags)


def _others_with(snapshot: Snapshot, tags: list[str]) -> list[tuple[Path, list[str]]]:
    """The other snapshots of the repository that have one of these tags, and which."""
    try:
        listing = list_snapshots(snapshot.path.parent)
    except NotFoundError:
        return []  # a snapshot that stands alone
    found = []
    for other in listing.snapshots:
        if other.path.name != snapshot.path.name:
            theirs = choose.notes_of(other)[0].tags
            shared = [tag for tag in theirs if tag in tags]
            if shared:
                found.append((other.path, shared))
    return found
