"""What is told of snapshots: callbacks, TensorBoard, events, and the timeline of PYSNAP_TRACE."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pysnap
from pysnap import _engine, trace
from pysnap.events import read_events


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(path) if event["event"] == kind]


# Events and callbacks


def test_the_events_of_a_run(tmp_path: Path) -> None:
    values = {"x": torch.randn(300_000)}
    with pysnap.Snapshotter(
        tmp_path,
        values=values,
        every="2 steps",
        keep=pysnap.Keep(last=1, best=1),
        best="min loss",
    ) as snapshotter:
        for _ in snapshotter.epochs(2):
            for _ in range(2):
                with snapshotter.step():
                    pass
                snapshotter._committer.wait_idle()
            snapshotter.report(loss=0.5, odd=float("nan"))
        snapshotter.save(tag="good")
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        snapshotter.resume(step=4)
    found = list(read_events(tmp_path))
    run = found[0]
    assert run["event"] == "run" and run["pid"] == os.getpid() and run["host"] and run["command"]
    assert run["rule"] == "every 2 steps" and run["source"] == "argument"
    assert run["version"] == pysnap.__version__
    assert run["keep"]["last"] == 1 and run["keep"]["best"] == 1 and run["best"] == "min loss"
    reported = events(tmp_path, "metrics")
    assert [event["step"] for event in reported] == [2, 4]
    assert reported[0]["values"] == {"loss": 0.5, "odd": "nan"}
    snapshots = events(tmp_path, "snapshot")
    assert [event["step"] for event in snapshots] == [2, 2, 4, 4]
    assert [event["epoch"] for event in snapshots] == [0, 0, 1, 2]
    assert snapshots[1]["metrics"] == {"loss": 0.5, "odd": "nan"}
    assert snapshots[-1]["tags"] == ["good"] and snapshots[-1]["late"] is False
    for event in snapshots:
        assert 0 <= event["stall_seconds"] <= event["durable_seconds"] and event["seconds"] >= 0
        assert 0 < event["staged_seconds"] <= event["durable_seconds"]
        assert event["raw_bytes"] >= 1_200_000 and event["stored_bytes"] > 0
    assert (tmp_path / snapshots[-1]["name"]).is_dir()
    removed = events(tmp_path, "removed")
    assert removed and all(not (tmp_path / event["name"]).exists() for event in removed)
    assert all(event["reason"] for event in removed)
    assert [event["step"] for event in events(tmp_path, "resumed")] == [4]
    assert events(tmp_path, "resumed")[0]["name"] == snapshots[-1]["name"]
    assert [event["step"] for event in events(tmp_path, "closed")] == [4, 4]
    assert found[-1]["event"] == "closed"


def test_a_callback_gets_what_the_handle_tells(tmp_path: Path) -> None:
    told: list[pysnap.SnapshotInfo] = []
    values = {"x": torch.zeros(300_000)}
    with pysnap.Snapshotter(
        tmp_path, values=values, on_durable=told.append, codec="fast"
    ) as snapshotter:
        with snapshotter.step():
            pass
        snapshotter.report(loss=float("inf"))
        info = snapshotter.save(tag=("a", "b")).wait()
    assert told == [info] and info.step == 1 and info.epoch == 0 and info.tags == ("a", "b")
    assert info.metrics == {"loss": float("inf")} and info.seconds > 0
    assert info.ratio == info.raw_bytes / info.stored_bytes > 10


class Writer:
    """As torch.utils.tensorboard.SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def test_tensorboard_gets_scalars(tmp_path: Path) -> None:
    writer = Writer()
    with pysnap.Snapshotter(
        tmp_path, x=torch.zeros(1000), every=1, tensorboard=writer
    ) as snapshotter:
        with snapshotter.step():
            pass
        snapshotter._committer.wait_idle()
        last = snapshotter.stats().last
    assert last is not None
    names = ("stall_seconds", "staged_seconds", "durable_seconds", "raw_bytes", "stored_bytes")
    expected = [(f"pysnap/{name}", getattr(last, name), 1) for name in (*names, "ratio")]
    assert writer.scalars == expected


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_writer_or_a_callback_raises_never_reaches_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    class Broken:
        def add_scalar(self, *_: object) -> None:
            raise error("mine")

    with pysnap.Snapshotter(
        tmp_path,
        x=torch.zeros(10),
        every=1,
        tensorboard=Broken(),
        on_durable=Broken().add_scalar,
        on_error="raise",
    ) as snapshotter:
        for _ in snapshotter.steps(3):
            with snapshotter.step():
                pass
            snapshotter._committer.wait_idle()
    assert snapshotter.stats().durable == 3 and snapshotter.stats().failed == 0
    for step in (1, 2, 3):
        assert f"tensorboard failed at step {step}" in caplog.messages
        assert f"on_durable failed for the snapshot of step {step}" in caplog.messages


def test_ctrl_c_in_a_callback_of_the_main_thread_is_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: pysnap.Failure) -> None:
        raise KeyboardInterrupt

    def refused(*_: object, **__: object) -> None:
        raise pysnap.StorageError(12, "no memory")

    with pysnap.Snapshotter(tmp_path, x=torch.zeros(10), on_error=interrupted) as snapshotter:
        with monkeypatch.context() as patch:
            patch.setattr(snapshotter._stager, "begin", refused)
            with pytest.raises(KeyboardInterrupt):
                snapshotter.save()
        snapshotter.save().wait()


def test_what_cannot_be_a_writer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pysnap.ConfigError, match="add_scalar"):
        pysnap.Snapshotter(tmp_path, x=torch.zeros(1), tensorboard="logs")  # type: ignore[arg-type]


# The timeline


@pytest.fixture
def timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "trace.json"
    monkeypatch.setenv("PYSNAP_TRACE", str(path))
    _engine.take_spans()
    yield path
    trace.end()


def spans(path: Path) -> dict[str, set[str]]:
    """The names of the spans of each thread."""
    entries = json.loads(path.read_text())
    names = {e["tid"]: e["args"]["name"] for e in entries if e["ph"] == "M"}
    found: dict[str, set[str]] = {}
    for entry in entries:
        if entry["ph"] == "X":
            assert entry["ts"] > 0 and entry["dur"] >= 0 and entry["pid"] == os.getpid()
            found.setdefault(names[entry["tid"]], set()).add(entry["name"])
    return found


def test_every_thread_has_its_phases(tmp_path: Path, timeline: Path) -> None:
    model = torch.nn.Linear(1500, 1500)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pysnap.Snapshotter(
        tmp_path / "run", model=model, optimizer=optimizer, every=1, on_durable=lambda _: None
    ) as snapshotter:
        for _ in range(2):
            with snapshotter.step():
                model(torch.ones(1, 1500)).sum().backward()
                optimizer.step()
        snapshotter.save().wait()
        snapshotter._committer.close()
        # Whole after every snapshot, not only in the end.
        assert spans(timeline)["MainThread"] >= {"step", "plan", "capture", "gate"}
        snapshotter.resume()
    found = spans(timeline)
    assert found["pysnap-work"] | found.get("pysnap-write", set()) == {"encode", "write"}
    assert "copy" in found["MainThread"] | found["pysnap-copy"]
    assert found["pysnap-commit"] >= {
        "open pack",
        "wait until staged",
        "wait until written",
        "make pack durable",
        "retention",
        "callback",
        "writing",
        "syncing directory",
    }
    assert any(name.startswith("renaming .partial-") for name in found["pysnap-commit"])
    assert "map" in found["pysnap-grow"]
    assert {"read", "put"} <= found["MainThread"] | found.get("pysnap-read", set())


def test_off_nothing_is_noted(tmp_path: Path) -> None:
    _engine.take_spans()
    with pysnap.Snapshotter(tmp_path, x=torch.zeros(10)) as snapshotter:
        snapshotter.save().wait()
    assert len(_engine.take_spans()[0]) == 0
    assert trace.span("x") is trace.span("y")


def test_a_timeline_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_TRACE", str(tmp_path / "none" / "trace.json"))
    with pytest.raises(pysnap.ConfigError, match=r"PYSNAP_TRACE.*No such file"):
        pysnap.Snapshotter(tmp_path / "run", x=torch.zeros(1))


def test_a_timeline_that_cannot_be_written_ends_and_fails_nothing(
    tmp_path: Path,
    timeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pysnap.Snapshotter(tmp_path / "run", x=torch.zeros(1)) as snapshotter:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(trace._List, "_put", full)
        for _ in range(2):
            snapshotter.save().wait()
    assert caplog.text.count("tracing ends") == 1 and "trace.json" in caplog.text
    assert snapshotter.stats().durable == 2
    assert json.loads(timeline.read_text()) == []


def test_a_second_snapshotter_goes_on_in_the_same_file_and_a_new_process_begins_anew(
    tmp_path: Path, timeline: Path
) -> None:
    timeline.write_text("what an older run left" * 1000)
    for name in ("one", "two"):
        with pysnap.Snapshotter(tmp_path / name, x=torch.zeros(1)) as snapshotter:
            snapshotter.save()
    captures = [e for e in json.loads(timeline.read_text()) if e["name"] == "capture"]
    assert len(captures) == 2


def test_a_killed_process_leaves_a_timeline_that_can_be_read(tmp_path: Path) -> None:
    code = """
import os, signal, sys, torch, pysnap
snapshotter = pysnap.Snapshotter("run", x=torch.zeros(10))
snapshotter.save().wait()
snapshotter._committer.close()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYSNAP_TRACE": "trace.json"},
        timeout=120,
        check=False,
    )
    assert "capture" in {e["name"] for e in json.loads((tmp_path / "trace.json").read_text())}


def recovered(data: bytes) -> list[dict[str, Any]]:
    """The entries of a timeline without its end: whole lines, behind which one may be cut."""
    first, *lines = data.split(b"\n")
    assert first == b"["
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        if line in (b"", b"]"):
            continue
        try:
            entries.append(json.loads(line.removeprefix(b",")))
        except ValueError:
            # What stood behind it before was the end of the list.
            assert set(b"".join(lines[number + 1 :])) <= set(b"]")
    return entries


def test_a_write_that_is_cut_anywhere_leaves_whole_lines_and_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    pwrite = os.pwrite
    batches = [['{"a": 1}', '{"b": "]"}'], ['{"c": 3}'], ['{"d": ","}', '{"e": 5}']]
    for broken in range(len(batches)):
        before = [json.loads(item) for batch in batches[:broken] for item in batch]
        new = [json.loads(item) for item in batches[broken]]
        size = sum(len(item) + 2 for item in batches[broken]) + 2
        for cut in range(size):
            file = trace._List(path)
            for batch in batches[:broken]:
                file.extend(batch)
            assert json.loads(path.read_bytes()) == before
            with monkeypatch.context() as patch:
                patch.setattr(
                    trace._List,
                    "_put",
                    lambda self, data, cut=cut: pwrite(self._descriptor, data[:cut], self._end),
                )
                file.extend(batches[broken])
            file.close()
            left = recovered(path.read_bytes())
            assert left == [*before, *new][: len(left)] and len(left) >= len(before), cut


def test_a_process_that_is_killed_while_it_writes_leaves_what_it_wrote(tmp_path: Path) -> None:
    code = """
import torch, pysnap
x = torch.zeros(10)
with pysnap.Snapshotter("run", every=1, x=x) as snapshotter:
    for _ in snapshotter.steps(10**9):
        with snapshotter.step():
            x += 1
"""
    path = tmp_path / "trace.json"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYSNAP_TRACE": str(path), "PYSNAP_EVERY": "1"},
    )
    try:
        while process.poll() is None and (not path.exists() or path.stat().st_size < 200_000):
            threading.Event().wait(0.01)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    entries = recovered(path.read_bytes())
    # No line is lost before the cut one.
    assert {"capture", "retention", "thread_name"} <= {entry["name"] for entry in entries}
    assert len(entries) >= path.read_bytes().count(b"\n") - 3


def test_a_forked_child_leaves_the_timeline_to_its_parent(tmp_path: Path, timeline: Path) -> None:
    with pysnap.Snapshotter(tmp_path / "run", x=torch.zeros(10)) as snapshotter:
        child = os.fork()
        if child == 0:
            with trace.span("of the fork"):
                trace.write()
            os._exit(trace._active is not None)
        assert os.waitpid(child, 0)[1] == 0
        snapshotter.save()
    assert "of the fork" not in timeline.read_text() and "capture" in timeline.read_text()


def test_spans_of_several_threads_at_once(tmp_path: Path, timeline: Path) -> None:
    trace.begin(str(timeline))

    def body() -> None:
        for _ in range(200):
            with trace.span("mine"):
                trace.write()

    threads = [threading.Thread(target=body, name=f"t{i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.write()
    entries = json.loads(timeline.read_text())
    assert sum(entry["name"] == "mine" for entry in entries) == 800
