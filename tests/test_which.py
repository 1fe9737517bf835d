"""Which snapshot a run goes on from, and what a snapshot says of its moment: tags, metrics,
progress, provenance."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import flip

import pysnap
from pysnap.best import Best
from pysnap.notes import Notes
from pysnap.which import Which


def take(path: Path, steps: int = 4, **options: Any) -> list[Path]:
    """Snapshots of the steps 1, 2, ...: the value is the step."""
    value: dict[str, int] = {}
    with pysnap.Snapshotter(
        path, keep=pysnap.Keep(last=None), value=value, **options
    ) as snapshotter:
        for step in range(1, steps + 1):
            value["step"] = snapshotter.progress.step = step
            snapshotter.save(tag={2: "two", 3: ["good", "three"]}.get(step, ())).wait()
    return sorted(path.glob("step-*"))


def resumed(path: Path, *args: Any, **options: Any) -> int | None:
    """The value that was put back; None: a fresh start."""
    value = {"step": 0}
    best = options.pop("best", None)
    with pysnap.Snapshotter(
        path, keep=pysnap.Keep(last=None), value=value, best=best
    ) as snapshotter:
        snapshot = snapshotter.resume(*args, **options)
        assert snapshotter.progress.step == value["step"]
        return None if snapshot is None else value["step"]


# Which


def test_each_rule_finds_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = take(tmp_path)
    assert resumed(tmp_path) == 4
    assert resumed(tmp_path, "newest") == 4
    assert resumed(tmp_path, step=2) == 2
    assert resumed(tmp_path, "step=2") == 2
    assert resumed(tmp_path, tag="good") == 3
    assert resumed(tmp_path, "tag=two") == 2
    assert resumed(tmp_path, paths[0]) == 1
    assert resumed(tmp_path, str(paths[0])) == 1
    assert resumed(tmp_path, "off") is None
    monkeypatch.setenv("PYSNAP_RESUME", "step=1")
    assert resumed(tmp_path, tag="good") == 1
    monkeypatch.setenv("PYSNAP_RESUME", "off")
    assert resumed(tmp_path, tag="good") is None
    monkeypatch.setenv("PYSNAP_RESUME", "lastest")
    with pytest.raises(pysnap.ConfigError, match="PYSNAP_RESUME is 'lastest'"):
        resumed(tmp_path)


def test_a_snapshot_of_another_repository(tmp_path: Path) -> None:
    paths = take(tmp_path / "old", 2)
    assert resumed(tmp_path / "new", paths[1]) == 2
    assert resumed(tmp_path / "new") is None


def test_where_no_snapshot_fits_the_message_says_what_there_is(tmp_path: Path) -> None:
    take(tmp_path)
    with pytest.raises(
        pysnap.NotFoundError, match=r"step 9 .* step 4, 3, 2, 1, .* good, three, two"
    ):
        resumed(tmp_path, step=9)
    with pytest.raises(pysnap.NotFoundError, match="tag bad"):
        resumed(tmp_path, tag="bad")
    with pytest.raises(pysnap.NotFoundError, match="step-000000009 is no"):
        resumed(tmp_path, tmp_path / "step-000000009")


def test_before_the_first_snapshot_only_a_named_one_is_missed(tmp_path: Path) -> None:
    assert resumed(tmp_path) is None
    assert resumed(tmp_path, "best", best="min loss") is None
    for rule in ("step=1", "tag=a"):
        with pytest.raises(pysnap.NotFoundError, match="none at all"):
            resumed(tmp_path, rule)


def test_a_damaged_one_that_was_named_is_not_replaced_by_another(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    with pysnap.Snapshotter(tmp_path, keep=pysnap.Keep(last=None), net=net) as snapshotter:
        for step in (1, 2):
            snapshotter.progress.step = step
            snapshotter.save(tag="good").wait()
    flip(tmp_path / "step-000000002" / "0.pack", 3)
    with pysnap.Snapshotter(tmp_path, net=net) as snapshotter:
        with pytest.raises(pysnap.CorruptError, match="step 2"):
            snapshotter.resume(step=2)
        # A tag may name several: the next newest of them.
        snapshot = snapshotter.resume(tag="good")
        assert snapshot is not None and snapshot.step == 1


# Tags


def test_retention_keeps_what_is_tagged_or_pinned(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, keep=pysnap.Keep(last=1), value=[1]) as snapshotter:
        for step in range(1, 6):
            snapshotter.progress.step = step
            snapshotter.save(tag="release-1.0" if step == 2 else ()).wait()
            if step == 3:
                pin = tmp_path / "step-000000003" / "notes.json"
                pin.write_bytes(Notes(pinned=True).to_bytes())
    assert [path.name[-1] for path in sorted(tmp_path.glob("step-*"))] == ["2", "3", "5"]
    assert Notes.read(tmp_path / "step-000000002").tags == ("release-1.0",)


def test_notes_that_cannot_be_read_keep_the_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pysnap.Snapshotter(tmp_path, keep=pysnap.Keep(last=1), value=[1]) as snapshotter:
        for step in (1, 2, 3):
            snapshotter.progress.step = step
            snapshotter.save(tag="a").wait()
            if step == 1:
                (tmp_path / "step-000000001" / "notes.json").write_bytes(b"{")
    assert (tmp_path / "step-000000001").exists()
    assert "notes.json is damaged" in caplog.text


@pytest.mark.parametrize("tag", ["", "a b", "../x", ".hidden", "x" * 65, "a\n", "ü", 5])
def test_odd_tags_are_refused_at_the_door(tmp_path: Path, tag: Any) -> None:
    with (
        pysnap.Snapshotter(tmp_path, value=[1]) as snapshotter,
        pytest.raises(pysnap.ConfigError, match="is no tag"),
    ):
        snapshotter.save(tag=[tag])
    assert not list(tmp_path.glob("step-*"))


# Best


def test_an_improvement_takes_a_snapshot_and_the_best_ones_are_kept(tmp_path: Path) -> None:
    value = {"step": 0}
    losses = [5.0, 3.0, 4.0, math.nan, 2.0, 2.5, 2.2]
    with pysnap.Snapshotter(
        tmp_path, keep=pysnap.Keep(last=1, best=2), best="min loss", value=value
    ) as snapshotter:
        taken = []
        for step, loss in enumerate(losses, 1):
            with snapshotter.step():
                value["step"] = step
            taken.append(snapshotter.report(loss=loss, accuracy=step / 10))
        with snapshotter.step():
            value["step"] = 8
        snapshotter.save().wait()
        assert snapshotter.progress.best == 2.0
        assert snapshotter.progress.metrics == {"loss": 2.2, "accuracy": 0.7}
    assert taken == [True, True, False, False, True, False, False]
    assert [path.name[-1] for path in sorted(tmp_path.glob("step-*"))] == ["2", "5", "8"]
    metadata = json.loads((tmp_path / "step-000000005" / "manifest.json").read_bytes())
    assert metadata["snapshot"]["metadata"]["metrics"] == {"loss": 2.0, "accuracy": 0.5}
    assert resumed(tmp_path, "best", best="min loss") == 5
    assert resumed(tmp_path, "best", best="max loss") == 2
    with pytest.raises(pysnap.NotFoundError, match="no best"):
        resumed(tmp_path, "best", best="min other")
    with pytest.raises(pysnap.ConfigError, match="say what is best"):
        resumed(tmp_path, "best")


def test_a_metric_that_is_nan_from_the_beginning_is_no_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pysnap.Snapshotter(tmp_path, best="min loss", value=[1]) as snapshotter:
        assert not snapshotter.report(loss=math.nan)
        assert "loss is not a number at step 0" in caplog.text
        assert snapshotter.report(loss=7.0)
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_the_record_holds_after_a_resume(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, best="max accuracy by 0.1", value=[1]) as snapshotter:
        assert snapshotter.report(accuracy=0.5)
    with pysnap.Snapshotter(tmp_path, best="max accuracy by 0.1", value=[1]) as snapshotter:
        snapshotter.resume()
        with snapshotter.step():
            pass
        assert not snapshotter.report(accuracy=0.6)
        assert snapshotter.report(accuracy=torch.tensor(0.61))  # type: ignore[arg-type]  # as people do


@pytest.mark.parametrize(
    "rule",
    [
        *("", "loss", "least loss", "min", "min loss by", "min loss by x"),
        *("min loss by -1", "min loss by nan", "min loss by inf", 3),
    ],
)
def test_rules_of_what_is_best_that_do_not_parse(tmp_path: Path, rule: Any) -> None:
    with pytest.raises(pysnap.ConfigError, match="best is"):
        pysnap.Snapshotter(tmp_path, best=rule, value=[1])


def test_what_is_no_metric_is_refused(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, value=[1]) as snapshotter:
        with pytest.raises(pysnap.ConfigError, match="loss"):
            snapshotter.report(loss="small")  # type: ignore[arg-type]  # that is the test
        assert not snapshotter.report(loss=math.inf)
        snapshotter.save().wait()
    assert pysnap.load(tmp_path)["progress"]["metrics"] == {"loss": math.inf}
    with pytest.raises(pysnap.ConfigError, match="needs a metric"):
        pysnap.Snapshotter(tmp_path, keep=pysnap.Keep(best=2), value=[1])


def test_parsing() -> None:
    assert Best.parse(" max  f1 by 1e-3") == Best("f1", True, 0.001)
    # The text is stored, and read again by the next process and by the command line.
    for rule in ("min loss", "max f1 by 0.001"):
        assert str(Best.parse(rule)) == rule
    assert Best.parse("min loss").improves(1.0, None) and not Best.parse("min a").improves(1.0, 1.0)
    assert Which.parse("step=12", "which") == Which("step", 12)
    assert Which.parse(Path("x"), "which") == Which("path", "x")


# Progress and provenance


def test_progress_counts_samples_and_wall_time_over_processes(tmp_path: Path) -> None:
    seconds = []
    for process in range(2):
        with pysnap.Snapshotter(tmp_path, value=[1]) as snapshotter:
            snapshotter.resume()
            seconds.append(snapshotter.progress.seconds)
            for _ in range(3):
                with snapshotter.step(samples=8):
                    pass
            with snapshotter.step():
                pass
            assert snapshotter.progress.step == 4 * (process + 1)
            assert snapshotter.progress.samples == 24 * (process + 1)
            seconds.append(snapshotter.progress.seconds)
            snapshotter.save().wait()
    # The second process goes on counting where the first stopped.
    assert seconds[0] == 0 and seconds == sorted(seconds) and seconds[1] == seconds[2]


def test_progress_of_another_version_is_read_and_of_none_refused() -> None:
    progress = pysnap.Progress()
    progress.load({"step": 3, "epoch": 1, "batch": 2, "from the future": [1]})
    assert progress == pysnap.Progress(step=3, epoch=1, batch=2)
    for state in (
        None,
        {"step": -1},
        {"step": 1.0},
        {"step": True},
        {"seconds": 1},
        {"metrics": {"a": "b"}},
        {"best": 1},
    ):
        with pytest.raises(ValueError):
            progress.load(state)
    assert progress.step == 3


def test_a_manifest_tells_where_its_snapshot_comes_from(tmp_path: Path) -> None:
    for _ in range(2):
        with pysnap.Snapshotter(
            tmp_path, config={"lr": 0.1}, metadata={"who": "me"}, value=[1]
        ) as snapshotter:
            snapshotter.resume()
            for _ in range(2):
                with snapshotter.step():
                    pass
                snapshotter.save().wait()
    snapshots = [
        json.loads((path / "manifest.json").read_bytes())["snapshot"]
        for path in sorted(tmp_path.glob("step-*"))
    ]
    ids = [snapshot["id"] for snapshot in snapshots]
    assert [snapshot["metadata"]["parent"] for snapshot in snapshots[1:]] == ids[:-1]
    metadata = snapshots[0]["metadata"]
    assert set(metadata["versions"]) == {"pysnap", "torch", "numpy", "python", "cuda"}
    assert metadata["host"] == os.uname().nodename and metadata["command"] == sys.orig_argv
    assert metadata["config"] == {"lr": 0.1} and metadata["user"] == {"who": "me"}
    assert metadata["devices"] == [] or torch.cuda.is_available()
    assert metadata["progress"]["step"] == snapshots[0]["step"]


def test_what_changed_in_the_configuration_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {"lr": 0.1, "model": {"width": 4, "depth": 2}, "seed": 1}
    with pysnap.Snapshotter(tmp_path, config=before, value=[1]) as snapshotter:
        snapshotter.save().wait()
    with pysnap.Snapshotter(tmp_path, config=before, value=[1]) as snapshotter:
        snapshotter.resume()
    assert "configuration" not in caplog.text
    after = {"lr": 0.2, "model": {"width": 4.0}, "data": "x"}
    with pysnap.Snapshotter(tmp_path, config=after, value=[1]) as snapshotter:
        snapshotter.resume()
    for words in (
        "lr was 0.1, is 0.2",
        "model.width was 4, is 4.0",
        "model.depth was 2, is gone",
        "seed was 1, is gone",
        "data is new: 'x'",
    ):
        assert words in caplog.text


# steps()


def test_steps_go_on_at_the_next_one(tmp_path: Path) -> None:
    seen = []
    for stop in (3, None):
        with pysnap.Snapshotter(tmp_path, value=[1]) as snapshotter:
            snapshotter.resume()
            for step in snapshotter.steps(5):
                with snapshotter.step():
                    seen.append(step)
                if snapshotter.progress.step == stop:
                    snapshotter.save().wait()
                    break
    assert seen == [0, 1, 2, 3, 4]


def loader() -> Any:
    data = torch.utils.data.DataLoader(range(10), batch_size=4, shuffle=True)  # type: ignore[arg-type, var-annotated]  # a range is a dataset
    return pysnap.resumable(data)


@pytest.mark.parametrize("cut", range(1, 9))
def test_steps_over_a_loader_pass_over_the_empty_rest_of_an_epoch(tmp_path: Path, cut: int) -> None:
    """Cut at the last batch of an epoch, the resumed run ended at once."""

    def run(path: Path, stop: int | None) -> list[Any]:
        batches = loader()
        seen = []
        with pysnap.Snapshotter(path, loader=batches) as snapshotter:
            snapshotter.resume()
            for batch in snapshotter.steps(8, batches):
                with snapshotter.step():
                    progress = snapshotter.progress
                    seen.append((progress.epoch, progress.batch, batch.tolist()))
                if snapshotter.progress.step == stop:
                    snapshotter.save().wait()
                    break
        return seen

    torch.manual_seed(0)
    whole = run(tmp_path / "whole", None)
    assert len(whole) == 8 and [epoch for epoch, _, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2]
    torch.manual_seed(0)
    before = run(tmp_path / "cut", cut)
    torch.manual_seed(99)
    assert before + run(tmp_path / "cut", None) == whole


def test_steps_over_a_loader_without_batches_are_refused(tmp_path: Path) -> None:
    with (
        pysnap.Snapshotter(tmp_path, value=[1]) as snapshotter,
        pytest.raises(pysnap.ConfigError, match="no batch"),
    ):
        list(snapshotter.steps(3, []))


# What a reading found


def test_an_infinite_metric_does_not_fail_the_snapshots_that_follow(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, best="min loss", value=[1]) as snapshotter:
        assert snapshotter.report(loss=math.inf)
        with snapshotter.step():
            pass
        snapshotter.save().wait()
    assert snapshotter.stats().failed == 0


def test_the_record_of_another_metric_says_nothing(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, best="min loss", value=[1]) as snapshotter:
        assert snapshotter.report(loss=2.3)
    with pysnap.Snapshotter(tmp_path, best="max accuracy", value=[1]) as snapshotter:
        snapshotter.resume()
        assert snapshotter.report(accuracy=0.5) and not snapshotter.report(accuracy=0.4)


def test_going_back_does_not_cost_the_best_snapshot(tmp_path: Path) -> None:
    keep = pysnap.Keep(last=None, best=1)
    with pysnap.Snapshotter(tmp_path, keep=keep, best="min loss", value=[1]) as snapshotter:
        for loss in (0.9, 0.1):
            with snapshotter.step():
                pass
            snapshotter.report(loss=loss)
    with pysnap.Snapshotter(tmp_path, keep=keep, best="min loss", value=[1]) as snapshotter:
        snapshotter.resume(step=1)
        with snapshotter.step():
            pass
        snapshotter.save().wait()
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-000000001", "step-000000002", "step-000000002.1"]
    assert resumed_step(tmp_path) == 2


def resumed_step(path: Path) -> int:
    with pysnap.Snapshotter(path, best="min loss", value=[1]) as snapshotter:
        snapshot = snapshotter.resume("best")
        assert snapshot is not None and snapshot.metrics == {"loss": 0.1}
        return snapshotter.progress.step


def test_a_snapshot_that_was_copied_in_does_not_cost_the_newest(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path / "a", value=[1]) as snapshotter:
        for _ in range(9):
            snapshotter.save().wait()
    copied = next((tmp_path / "a").glob("step-*"))
    with pysnap.Snapshotter(tmp_path / "b", keep=pysnap.Keep(last=1), value=[2]) as snapshotter:
        snapshotter.save().wait()
        copied.rename(tmp_path / "b" / "step-000000900")
        for step in (1, 2):
            snapshotter.progress.step = step
            info = snapshotter.save().wait()
            assert info.path.exists()
    assert pysnap.load(tmp_path / "b")["value"] == [2]


def test_a_snapshot_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, keep=pysnap.Keep(last=1), value=[1]) as snapshotter:
        snapshotter.save().wait()
        (tmp_path / "step-000000000" / "folder").mkdir()
        for step in (1, 2, 3):
            snapshotter.progress.step = step
            snapshotter.save().wait()
    assert [path.name[-1] for path in tmp_path.glob("step-*")] == ["3"]


def test_a_repository_as_path_is_its_newest_snapshot(tmp_path: Path) -> None:
    take(tmp_path / "a", 2)
    assert resumed(tmp_path / "b", tmp_path / "a") == 2
    with pytest.raises(pysnap.ConfigError, match="step=1200"):
        resumed(tmp_path / "b", 1200)


def test_a_step_whose_snapshot_has_a_damaged_manifest_is_damaged_not_absent(
    tmp_path: Path,
) -> None:
    paths = take(tmp_path, 2)
    flip(paths[0] / "manifest.json", 50)
    with pytest.raises(pysnap.CorruptError, match="step-000000001"):
        resumed(tmp_path, step=1)


def test_notes_that_are_a_directory_leave_no_file_open(tmp_path: Path) -> None:
    path = take(tmp_path, 1)[0]
    (path / "notes.json").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(pysnap.StorageError, match="regular file"):
        Notes.read(path)
    assert len(os.listdir("/proc/self/fd")) == before
