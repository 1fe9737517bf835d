"""Which snapshot a word of the command line names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pysnap.best import Best
from pysnap.errors import ConfigError, CorruptError, Error, NotFoundError
from pysnap.notes import Notes
from pysnap.repository import Listing, Snapshot, is_snapshot, list_snapshots
from pysnap.which import Which


@dataclass(frozen=True)
class Word:
    """`PATH` or `PATH@RULE`."""

    path: Path
    rule: str | None = None

    @classmethod
    def parse(cls, text: str) -> Word:
        """A path may hold an `@`: what exists as a whole is a path."""
        head, at, rule = text.rpartition("@")
        if not text:
            raise ConfigError("an empty word names no snapshot; name a directory")
        if not at or not head or os.path.lexists(text):
            return cls(Path(text))
        return cls(Path(head), rule)


def snapshot(text: str) -> Snapshot:
    """The snapshot that `text` names; where it is the newest, damaged ones are passed over with a
    warning. Raises ConfigError, NotFoundError, CorruptError and what reading raises."""
    word = Word.parse(text)
    if is_snapshot(word.path):
        if word.rule is not None:
            raise ConfigError(f"{word.path} is one snapshot already; leave @{word.rule} out")
        return Snapshot.open(word.path)
    listing = list_snapshots(word.path)
    if word.rule in (None, "newest") and listing.snapshots:
        listing.tell_damaged()
    found = _found(word, listing)
    if found:
        return found[0]
    if listing.damaged:
        raise CorruptError(
            f"{word.path} holds snapshots, but none can be read: "
            + "; ".join(f"{path.name}: {error}" for path, error in listing.damaged)
        )
    raise NotFoundError(f"{word.path} holds no snapshot")


def best_rule(listing: Listing) -> Best | None:
    """What was best for the run that took the newest snapshot which says so."""
    for found in listing.snapshots:
        progress = found.manifest.metadata.get("progress")
        rule = progress.get("best_rule") if type(progress) is dict else None
        if type(rule) is str and rule:
            return Best.parse(rule)
    return None


def notes_of(found: Snapshot) -> tuple[Notes, str]:
    """The notes of a snapshot, or none and why they cannot be read."""
    try:
        return Notes.read(found.path), ""
    except Error as error:
        return Notes(), str(error)


def _found(word: Word, listing: Listing) -> list[Snapshot]:
    rule = word.rule
    if rule is None:
        return listing.snapshots
    if rule.startswith(("min ", "max ")):
        return Which("best").candidates(listing, Best.parse(rule), word.path)
    if rule not in ("newest", "best") and not rule.startswith(("step=", "tag=")):
        raise ConfigError(
            f"@{rule} names no snapshot; it must be @newest, @best, @step=N, @tag=NAME or "
            '@"min METRIC"'
        )
    best = best_rule(listing) if rule == "best" else None
    if rule == "best" and best is None:
        raise ConfigError(
            f'{word.path} does not say what is best; name it, as in {word.path}@"min val_loss"'
        )
    return Which.parse(rule, "the word behind @").candidates(listing, best, word.path)
