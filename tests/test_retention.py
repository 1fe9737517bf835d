"""Retention: a pure function from the list of snapshots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pysnap
from pysnap import _engine, repository
from pysnap.best import Best
from pysnap.errors import ConfigError
from pysnap.manifest import Manifest
from pysnap.repository import Snapshot
from pysnap.retention import Keep, plan

GOLDEN = Path(__file__).parent / "golden" / "retention"


def snapshot(
    step: int,
    sequence: int,
    *,
    seconds: float | None = None,
    epoch: int = 0,
    loss: float | None = None,
) -> Snapshot:
    """One of step `step`, taken after as many minutes where `seconds` does not say."""
    metadata = {
        "progress": {"seconds": 60.0 * step if seconds is None else seconds, "epoch": epoch},
        "metrics": {} if loss is None else {"loss": loss},
    }
    empty = np.zeros(0, dtype=_engine.CHUNK)
    return Snapshot(
        Path(f"{step}-{sequence}"),
        Manifest("id", step, sequence, "now", {}, [], 4096, [], empty, metadata),
    )


def run(steps: Sequence[int], **details: Sequence[float]) -> list[Snapshot]:
    """A snapshot of each step, in the order in which they are taken; given newest first."""
    taken = [
        snapshot(
            step,
            index + 1,
            **{name: values[index] for name, values in details.items()},  # type: ignore[arg-type]  # numbers all
        )
        for index, step in enumerate(steps)
    ]
    return taken[::-1]


def removed(snapshots: Sequence[Snapshot], keep: Keep, best: Best | None = None) -> list[str]:
    """Names, oldest first."""
    verdicts = plan(snapshots, keep, best=best)
    return [verdict.snapshot.path.name for verdict in reversed(verdicts) if not verdict.kept]


@pytest.mark.parametrize(
    ("steps", "last", "gone"),
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
def test_what_is_removed(steps: list[int], last: int | None, gone: list[str]) -> None:
    assert removed(run(steps), Keep(last=last)) == gone


CASES: dict[str, tuple[Keep, str | None, list[Snapshot], dict[str, str]]] = {
    "last": (Keep(last=2), None, run([10, 20, 30, 40]), {}),
    "best": (
        Keep(last=1, best=2),
        "min loss",
        run([10, 20, 30, 40, 50], loss=[0.5, 0.2, 0.9, 0.2, 0.7]),
        {},
    ),
    "every steps, late ones": (
        Keep(last=1, every="100 steps"),
        None,
        run([50, 100, 150, 203, 207, 290, 400, 410]),
        {},
    ),
    "every hour": (Keep(last=1, every="1h"), None, run([30, 59, 61, 119, 180, 185, 200]), {}),
    "every hour for a while": (
        Keep(last=1, every="1h", for_="3h"),
        None,
        run([61, 121, 181, 241, 301, 330]),
        {},
    ),
    "everything for a while": (
        Keep(last=1, for_="30m"),
        None,
        run([10, 40, 70, 71, 75, 100]),
        {},
    ),
    "every epoch": (
        Keep(last=1, every="1 epoch"),
        None,
        run([5, 10, 15, 20, 25], epoch=[0, 1, 1, 2, 2]),
        {},
    ),
    "tagged, pinned, unreadable": (
        Keep(last=1),
        None,
        run([1, 2, 3, 4, 5]),
        {"1-1": "tagged good", "2-2": "pinned", "3-3": "its notes cannot be read"},
    ),
    "went back and took a step again": (
        Keep(last=2, best=1, every="100 steps"),
        "max loss",
        run([100, 150, 200, 150, 210], loss=[0.1, 0.9, 0.2, 0.3, 0.4]),
        {},
    ),
}


def text_of(keep: Keep, best: str | None, snapshots: list[Snapshot], held: dict[str, str]) -> str:
    lines = [f"{keep}, best={best!r}"]
    verdicts = plan(
        snapshots,
        keep,
        best=None if best is None else Best.parse(best),
        held={Path(name): why for name, why in held.items()},
    )
    for verdict in verdicts:
        one = verdict.snapshot
        lines.append(
            f"{'keep  ' if verdict.kept else 'remove'} step {one.step:3} taken as "
            f"{one.manifest.sequence}: {verdict.reason}"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_golden_one(name: str) -> None:
    assert text_of(*CASES[name]) == (GOLDEN / f"{name.replace(',', '')}.txt").read_text()


def test_what_stands_still_grows_no_older() -> None:
    # A day passes between the first and the second on the wall, two minutes in training.
    snapshots = run([1, 2, 3], seconds=[60.0, 120.0, 180.0])
    assert removed(snapshots, Keep(last=1, for_="10m")) == []


@pytest.mark.parametrize(
    "progress",
    [["somebody else's"], {}, {"seconds": "long"}, {"seconds": math.nan}, {"seconds": -math.inf}],
    ids=str,
)
def test_a_snapshot_that_does_not_say_its_time_is_kept_by_no_rule_of_time(
    progress: object,
) -> None:
    snapshots = run([100, 200, 300])
    snapshots[1].manifest.metadata["progress"] = progress
    assert removed(snapshots, Keep(last=1, for_="10h")) == ["200-2"]
    assert removed(snapshots, Keep(last=1, every="1h")) == ["200-2"]


RULES = st.builds(
    Keep,
    last=st.integers(1, 4),
    best=st.integers(0, 3),
    every=st.sampled_from([None, 3, "7 steps", "5m"]),
    for_=st.sampled_from([None, "20 steps", "1h"]),
)


@given(RULES, st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), max_size=30))
def test_of_any_run_the_newest_stays_and_a_plan_that_was_carried_out_removes_nothing(
    keep: Keep, moments: list[tuple[int, float]]
) -> None:
    best = Best.parse("min loss")
    taken = run([step for step, _ in moments], loss=[loss for _, loss in moments])
    verdicts = plan(taken, keep, best=best)
    assert [verdict.snapshot for verdict in verdicts] == taken
    kept = [verdict.snapshot for verdict in verdicts if verdict.kept]
    assert kept[:1] == taken[:1]
    assert all(verdict.reason for verdict in verdicts)
    assert removed(kept, keep, best) == []


@given(RULES, st.lists(st.integers(1, 40), unique=True, max_size=30))
def test_removing_after_every_snapshot_or_once_at_the_end_leaves_the_same(
    keep: Keep, steps: list[int]
) -> None:
    """So a run that is killed before it removed anything goes on with the right ones."""
    best = Best.parse("min loss")
    taken = run(sorted(steps), loss=[step * 7 % 11 for step in sorted(steps)])
    there: list[Snapshot] = []
    for newest in reversed(taken):
        verdicts = plan([newest, *there], keep, best=best)
        there = [verdict.snapshot for verdict in verdicts if verdict.kept]
    at_once = [verdict.snapshot for verdict in plan(taken, keep, best=best) if verdict.kept]
    assert there == at_once


@pytest.mark.parametrize("last", [0, -1, True, 2.5, "3"])
def test_a_rule_that_keeps_nothing_is_refused(last: object) -> None:
    with pytest.raises(ConfigError, match="Keep"):
        Keep(last=last)  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"best": -1}, "best"),
        ({"best": True}, "best=True"),
        ({"best": 1.5}, "best=1.5"),
        ({"best": "2"}, "best='2'"),
        ({"every": "0 steps"}, "every='0 steps'"),
        ({"every": "sometimes"}, "such as"),
        ({"every": True}, "every=True"),
        ({"for_": "1.5h"}, "for_='1.5h'"),
        ({"last": None, "every": "1h"}, "last=None keeps every snapshot"),
        ({"last": None, "for_": "1h"}, "last=None keeps every snapshot"),
        ({"every": "6h", "for_": "1h"}, "for_ must be longer than every"),
        ({"every": "6h", "for_": "6h"}, "for_ must be longer than every"),
    ],
)
def test_rules_that_cannot_be_or_contradict_each_other_are_refused(
    arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        Keep(**arguments)  # type: ignore[arg-type]  # that is the test


def test_a_mark_on_what_is_not_among_the_snapshots_holds_nothing() -> None:
    """One that became visible and may not be durable is marked, and no snapshot to count on."""
    snapshots = run([1, 2, 3])
    held = {Path("elsewhere"): "pinned", snapshots[2].path: "tagged a"}
    verdicts = plan(snapshots, Keep(last=1), held=held)
    assert [verdict.kept for verdict in verdicts] == [True, False, True]


def test_best_ones_need_a_metric() -> None:
    with pytest.raises(ConfigError, match="needs a metric"):
        plan([], Keep(best=1))


# On disk


def test_a_run_keeps_what_its_rule_says_over_restarts(tmp_path: Path) -> None:
    keep = pysnap.Keep(last=1, every="4 steps")
    for stop in (3, 5, 9, 14):
        with pysnap.Snapshotter(tmp_path, values={"a": 1}, every=1, keep=keep) as snapshotter:
            snapshotter.resume()
            for _ in snapshotter.steps(stop):
                with snapshotter.step():
                    pass
                snapshotter._committer.wait_idle()
    found = repository.list_snapshots(tmp_path).snapshots
    assert [snapshot.step for snapshot in found] == [14, 12, 8, 4]


def test_nothing_is_removed_before_the_new_one_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    publish = repository.publish

    def looked(partial: Path, *arguments: object) -> Snapshot:
        seen.append(sorted(one.step for one in repository.list_snapshots(tmp_path).snapshots))
        return publish(partial, *arguments)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(repository, "publish", looked)
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every=1, keep=Keep(last=1)) as snapshotter:
        for _ in snapshotter.steps(3):
            with snapshotter.step():
                pass
            snapshotter._committer.wait_idle()
    assert seen == [[], [1], [2]]
