"""Retention: a pure function from the list of snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pysnap import _engine
from pysnap.errors import ConfigError
from pysnap.manifest import Manifest
from pysnap.repository import Snapshot
from pysnap.retention import Keep, removable


def snapshot(step: int, sequence: int) -> Snapshot:
    empty = np.zeros(0, dtype=_engine.CHUNK)
    return Snapshot(
        Path(f"{step}-{sequence}"),
        Manifest("id", step, sequence, "now", {}, [], 4096, [], empty),
    )


@pytest.mark.parametrize(
    ("steps", "last", "removed"),
    [
        ([], 1, []),
        ([1], 1, []),
        ([1, 2, 3, 4, 5], 3, ["1-1", "2-2"]),
        ([1, 2, 3, 4, 5], None, []),
        ([1, 2, 2], 3, ["2-2"]),
        ([1, 2, 2], None, ["2-2"]),
        ([5, 6, 2, 3], 2, ["5-1", "6-2"]),
        ([5, 6, 5], 1, ["5-1", "6-2"]),
    ],
    ids=["none", "one", "last three", "all", "again", "again, all", "went back", "again, last one"],
)
def test_what_is_removed(steps: list[int], last: int | None, removed: list[str]) -> None:
    taken = [snapshot(step, sequence + 1) for sequence, step in enumerate(steps)]
    found = removable(taken[::-1], Keep(last=last))
    assert [victim.path.name for victim in found] == removed


@pytest.mark.parametrize("last", [0, -1, True, 2.5, "3"])
def test_a_rule_that_keeps_nothing_is_refused(last: object) -> None:
    with pytest.raises(ConfigError, match="Keep"):
        Keep(last=last)  # type: ignore[arg-type]  # that is the test
