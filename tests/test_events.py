"""The event log: whole lines in any order of failures, and never an error for training."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from pysnap import storage
from pysnap.errors import StorageError
from pysnap.events import FILE, EventLog, read_events


def test_what_is_added_is_read_in_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for step in range(100):
        log.add("metrics", step=step, values={"loss": 0.5, "odd": "nan"})
    log.close()
    log.close()
    log.add("closed", step=100)  # behind the end: nothing
    events = list(read_events(tmp_path))
    assert [event["step"] for event in events] == list(range(100))
    assert events[0]["values"] == {"loss": 0.5, "odd": "nan"} and events[0]["time"] > 1.7e9
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_second_run_appends(tmp_path: Path) -> None:
    for step in range(2):
        log = EventLog(tmp_path)
        log.add("run", step=step)
        log.close()
    assert [event["step"] for event in read_events(tmp_path)] == [0, 1]


def test_no_log_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path)) == []
    EventLog(tmp_path).close()
    assert not (tmp_path / FILE).exists()


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    good = b'{"time": 1.5, "event": "closed", "step": 1}'
    lines = [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b"null",
        b'{"event": "no time"}',
        b'{"time": 1, "event": 7}',
        b"[" * 100_000,
        b'{"time": 1, "event": "long", "x": "' + b"y" * 2**20 + good,
        good,
    ]
    (tmp_path / FILE).write_bytes(b"\n".join(lines) + b"\n" + b'{"time": 2, "event": "closed"}')
    assert [event["event"] for event in read_events(tmp_path)] == ["closed"]


def test_a_line_that_a_dead_writer_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"time": 1, "event": "cl')
    log = EventLog(tmp_path)
    log.add("run", pid=1)
    log.close()
    assert [event["event"] for event in read_events(tmp_path)] == ["run"]


def test_a_line_that_a_full_disk_cut_short_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = storage.AppendedLines(tmp_path / "x")
    write = os.write
    room = [3, 0, 100, 100]
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: room.pop(0)]))
    for _ in range(2):
        with pytest.raises(StorageError) as error:
            lines.add(b"first")
        assert error.value.errno == 28
    lines.add(b"second")
    lines.add(b"third")
    lines.close()
    assert (tmp_path / "x").read_bytes() == b"fir\nsecond\nthird\n"


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_what_is_no_file_is_not_written_to_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = tmp_path / FILE
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        (tmp_path / "target").write_bytes(b"")
        path.symlink_to("target")
    else:
        os.mkfifo(path)
    log = EventLog(tmp_path)
    for _ in range(3):
        log.add("run", pid=1)
    log.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "events are lost" in caplog.text and FILE in caplog.text
    with pytest.raises(StorageError):
        list(read_events(tmp_path))
    if kind == "link":
        assert (tmp_path / "target").read_bytes() == b""


def test_a_disk_that_hangs_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, entered = threading.Event(), threading.Event()
    add = storage.AppendedLines.add

    def stuck(lines: storage.AppendedLines, line: bytes) -> None:
        entered.set()
        hangs.wait()
        add(lines, line)

    monkeypatch.setattr(storage.AppendedLines, "add", stuck)
    log = EventLog(tmp_path)
    log.add("run", pid=1)
    entered.wait()
    log.add("closed", step=1)  # returns at once
    assert not log.flush(0)
    hangs.set()
    assert log.flush(60)
    log.close()
    assert [event["event"] for event in read_events(tmp_path)] == ["run", "closed"]


def test_a_forked_child_adds_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.add("run", pid=1)
    child = os.fork()
    if child == 0:
        log.add("closed", step=1)
        log.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    log.close()
    assert [event["event"] for event in read_events(tmp_path)] == ["run"]


def test_lines_are_json_for_anybody(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.add("run", command=["train\udcff.py", "ä\n"])
    log.close()
    text = (tmp_path / FILE).read_bytes()
    assert text.isascii() and text.count(b"\n") == 1
    assert json.loads(text)["command"] == ["train\udcff.py", "ä\n"]
