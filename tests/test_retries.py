"""What follows a failure: when another snapshot is taken, and how room is made on a full disk."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pysnap
from pysnap import repository, retries, storage
from pysnap.errors import StateError, StorageError, TornError
from pysnap.events import read_events
from pysnap.retries import Backoff, is_transient


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    return clock


def broken(number: int) -> StorageError:
    return StorageError(number, "writing failed", "0.pack")


# The rule


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT", "ESTALE", "ETIMEDOUT", "ENOMEM"])
def test_what_may_pass_is_retried(name: str) -> None:
    assert is_transient(broken(getattr(errno, name)))


@pytest.mark.parametrize(
    "error",
    [broken(errno.EROFS), broken(errno.EACCES), broken(errno.ENOENT), StateError("x"),
     TornError("x"), OSError(errno.EIO, "not pysnap's"), KeyboardInterrupt()],
    ids=repr,
)  # fmt: skip
def test_what_does_not_pass_is_not_retried(error: BaseException) -> None:
    backoff = Backoff()
    assert not is_transient(error) and backoff.failed(error) is None
    assert not backoff.wants_retry()


def test_the_wait_doubles_up_to_a_minute_and_begins_anew_after_a_success(clock: Clock) -> None:
    backoff = Backoff()
    waits = [backoff.failed(broken(errno.EIO)) for _ in range(9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    for _ in range(5000):
        backoff.failed(broken(errno.EIO))
    assert backoff.holds() and backoff.wants_retry()
    clock.now += 60
    assert not backoff.holds() and backoff.wants_retry()
    backoff.succeeded()
    assert not backoff.wants_retry() and backoff.failed(broken(errno.EIO)) == 1


def test_the_wait_is_no_longer_than_the_cadence() -> None:
    backoff = Backoff(longest=5)
    assert [backoff.failed(broken(errno.EIO)) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_what_is_not_retried_is_held_back_all_the_same_but_not_a_torn_one(clock: Clock) -> None:
    backoff = Backoff()
    backoff.failed(TornError("x"))
    assert not backoff.holds()
    backoff.failed(broken(errno.EROFS))
    assert backoff.holds()


# In a run


def disk(
    snapshotter: pysnap.Snapshotter, fails: Callable[[int], BaseException | None]
) -> list[int]:
    """Asks `fails` before every commit, by the step, how it fails; the steps that came."""
    commit, asked = snapshotter._committer._commit, []

    def sometimes(step: int, capture: Any, *arguments: Any) -> Any:
        asked.append(step)
        error = fails(step)
        if error is not None:
            capture.abort()
            raise error
        return commit(step, capture, *arguments)

    snapshotter._committer._commit = sometimes  # type: ignore[method-assign]  # a disk with moods
    return asked


def step(snapshotter: pysnap.Snapshotter) -> None:
    with snapshotter.step():
        pass
    snapshotter._committer.wait_idle()


def test_a_transient_failure_is_followed_by_a_snapshot_of_the_first_step_behind_the_wait(
    tmp_path: Path, clock: Clock
) -> None:
    told: list[pysnap.Failure] = []
    with pysnap.Snapshotter(
        tmp_path, values={"a": 1}, every="10 steps", on_error=told.append
    ) as snapshotter:
        asked = disk(snapshotter, lambda step: broken(errno.EIO) if step < 13 else None)
        for number in range(1, 30):
            step(snapshotter)
            if number in (11, 15):
                clock.now += 2
        stats = snapshotter.stats()
    # 10 is due and fails; 12 is behind the wait of 1 s, and fails; so is 16, behind that of 2 s.
    assert asked == [10, 12, 16, 20]
    assert (stats.failed, stats.retried, stats.durable, stats.late) == (2, 2, 2, 0)
    assert [(failure.step, failure.retry_seconds) for failure in told] == [(10, 1.0), (12, 2.0)]
    assert isinstance(told[0].error, StorageError) and told[0].error.errno == errno.EIO
    failed = [event for event in read_events(tmp_path) if event["event"] == "failed"]
    assert [(event["step"], event["errno"], event["retry_seconds"]) for event in failed] == [
        (10, errno.EIO, 1.0),
        (12, errno.EIO, 2.0),
    ]
    assert "writing failed" in failed[0]["error"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_failure_at_every_step_does_not_fail_at_every_step(
    tmp_path: Path, clock: Clock, number: int
) -> None:
    snapshotter = pysnap.Snapshotter(tmp_path, values={"a": 1}, every="1 step")
    asked = disk(snapshotter, lambda _: broken(number))
    for _ in range(100):
        step(snapshotter)
        clock.now += 0.25
    assert len(asked) == 5  # behind 1, 2, 4, 8 seconds
    with pytest.raises(StorageError):
        snapshotter.close()


def test_a_snapshot_that_was_held_back_is_late(tmp_path: Path, clock: Clock) -> None:
    told: list[pysnap.SnapshotInfo] = []
    with pysnap.Snapshotter(
        tmp_path, values={"a": 1}, every="2 steps", on_durable=told.append
    ) as snapshotter:
        disk(snapshotter, lambda step: broken(errno.EROFS) if step == 2 else None)
        for _ in range(4):
            step(snapshotter)
        clock.now += 1
        step(snapshotter)
        step(snapshotter)
    assert [(info.step, info.late) for info in told] == [(5, True), (6, False)]
    assert snapshotter.stats().late == 1 and snapshotter.stats().retried == 0


def test_a_save_that_failed_is_told_as_failed_and_another_has_no_tag(
    tmp_path: Path, clock: Clock
) -> None:
    told: list[pysnap.SnapshotInfo] = []
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, on_durable=told.append) as snapshotter:
        asked = disk(snapshotter, lambda _: broken(errno.ESTALE) if len(asked) == 1 else None)
        handle = snapshotter.save(tag="good")
        with pytest.raises(StorageError):
            handle.wait()
        step(snapshotter)
        assert asked == [0]
        clock.now += 1
        step(snapshotter)
    assert asked == [0, 2] and [info.tags for info in told] == [()]
    assert isinstance(handle.error, StorageError)


def test_a_save_is_not_held_back(tmp_path: Path, clock: Clock) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        disk(snapshotter, lambda step: broken(errno.EROFS) if step == 0 else None)
        with pytest.raises(StorageError):
            snapshotter.save().wait()
        step(snapshotter)
        snapshotter.save().wait()


def test_close_tries_again_what_failed_last(tmp_path: Path, clock: Clock) -> None:
    values = {"a": 0}
    snapshotter = pysnap.Snapshotter(tmp_path, values=values, every=1)
    asked = disk(snapshotter, lambda _: broken(errno.EIO) if len(asked) == 1 else None)
    values["a"] = 1
    step(snapshotter)
    snapshotter.close()
    assert pysnap.load(tmp_path)["values"] == {"a": 1} and asked == [1, 1]


def test_on_error_is_refused_at_the_door_if_it_is_neither_a_word_nor_callable(
    tmp_path: Path,
) -> None:
    for bad in ("explode", 3):
        with pytest.raises(pysnap.ConfigError, match="on_error"):
            pysnap.Snapshotter(tmp_path, values={"a": 1}, on_error=bad)  # type: ignore[arg-type]


def test_an_on_error_that_fails_itself_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_ON_ERROR", "raise")  # the argument wins

    def mine(_: pysnap.Failure) -> None:
        raise ValueError("mine")

    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every=1, on_error=mine) as snapshotter:
        disk(snapshotter, lambda step: broken(errno.EIO) if step == 1 else None)
        step(snapshotter)
        step(snapshotter)
        assert not snapshotter._raises
    assert "on_error failed for the snapshot of step 1" in caplog.text


# A full disk


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name != "events.jsonl")


def test_on_a_full_disk_what_the_rule_keeps_stays(tmp_path: Path) -> None:
    """Keep(last=1) removes a snapshot when a newer one is durable, and not to make room for it."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, keep=pysnap.Keep(last=1)) as snapshotter:
        snapshotter.save().wait()
        disk(snapshotter, lambda step: broken(errno.ENOSPC) if step == 1 else None)
        snapshotter.progress.step = 1
        with pytest.raises(StorageError):
            snapshotter.save().wait()
        assert names(tmp_path) == [".pysnap", ".writer", "latest", "step-000000000"]
        snapshotter.progress.step = 2
        snapshotter.save().wait()
    assert names(tmp_path) == [".pysnap", ".writer", "latest", "step-000000002"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("function", ["rename", "remove_directory"])
def test_on_a_full_disk_what_could_not_be_removed_before_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, function: str
) -> None:
    """As well a snapshot that the rule does not keep as one whose trash stayed."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, keep=pysnap.Keep(last=1)) as snapshotter:
        snapshotter.save().wait()
        snapshotter.progress.step = 1
        call = getattr(storage, function)

        def refuse(path: Path, *rest: Path) -> None:
            if path.name == "step-000000000" or path.name.startswith(".trash"):
                raise broken(errno.EBUSY)
            call(path, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(storage, function, refuse)
            snapshotter.save().wait()
        kept = [name for name in names(tmp_path) if name.startswith((".trash", "step"))]
        assert len(kept) == 2
        disk(snapshotter, lambda step: broken(number))
        with pytest.raises(StorageError):
            snapshotter.save().wait()
        left = [name for name in names(tmp_path) if name.startswith((".trash", "step"))]
        assert left == (kept if number == errno.EIO else ["step-000000001"])
        del snapshotter._committer._commit  # type: ignore[method-assign]  # the disk works again


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_a_failed_snapshot_left_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "run").mkdir()
    with pysnap.Snapshotter(tmp_path / "run", values={"a": 1}) as snapshotter:
        # Of somebody else, such as a pysnap.save() in this directory.
        (tmp_path / "run" / ".partial-other").mkdir()

        def refuse(*_: object) -> None:
            raise broken(number)

        with monkeypatch.context() as patch:
            patch.setattr(repository, "publish", refuse)
            patch.setattr(storage, "remove_directory", refuse)
            with pytest.raises(StorageError):
                snapshotter.save().wait()
            assert len(list((tmp_path / "run").glob(".partial-*"))) == 2
        with monkeypatch.context() as patch:
            patch.setattr(repository, "publish", refuse)
            with pytest.raises(StorageError):
                snapshotter.save().wait()
        left = [path.name for path in (tmp_path / "run").glob(".partial-*")]
        assert len(left) == (1 if number == errno.ENOSPC else 2) and ".partial-other" in left
        snapshotter.save().wait()


def test_the_log_has_one_line_for_a_snapshot_and_one_for_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    caplog.set_level(logging.INFO, "pysnap")
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every="1 step") as snapshotter:
        asked = disk(snapshotter, lambda _: broken(errno.EIO) if len(asked) == 2 else None)
        caplog.clear()
        step(snapshotter)
        step(snapshotter)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 2
        assert lines[0].startswith("the snapshot of step 1 is durable: stall ")
        assert lines[1].endswith("(errno 5); another is taken after 1 s")
