"""Marks: tags, a pin and a note, changed beside a writer and by several processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pysnap
from pysnap import notes, storage
from pysnap.errors import BusyError, ConfigError, CorruptError, NotFoundError
from pysnap.notes import Notes
from pysnap.repository import Repository, list_snapshots
from pysnap.verify import verify_snapshot


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return pysnap.save(tmp_path / "one", {"w": torch.ones(3)})


def test_marks_are_added_and_removed(snapshot: Path) -> None:
    notes.add_tags(snapshot, "good", "paper")
    notes.add_tags(str(snapshot), "good")
    notes.pin(snapshot)
    notes.write_note(snapshot, "läuft\nbesser")
    assert Notes.read(snapshot) == Notes(tags=("good", "paper"), pinned=True, note="läuft\nbesser")
    notes.remove_tags(snapshot, "good", "never")
    notes.pin(snapshot, False)
    assert notes.write_note(snapshot, "") == Notes.read(snapshot) == Notes(tags=("paper",))
    assert verify_snapshot(snapshot).remarks == []


@pytest.mark.parametrize("tag", ["", "a b", "-x", "a/b", "é", "x" * 65, "a\n", "\x1b[31m"])
def test_an_odd_tag_is_refused_and_nothing_changes(snapshot: Path, tag: str) -> None:
    with pytest.raises(ConfigError, match="is no tag"):
        notes.add_tags(snapshot, "fine", tag)
    assert Notes.read(snapshot) == Notes()


def test_a_note_that_could_not_be_read_again_is_refused(snapshot: Path) -> None:
    with pytest.raises(ConfigError, match="shorten"):
        notes.write_note(snapshot, "x" * (2**16 + 1))
    with pytest.raises(ConfigError, match="no text"):
        notes.write_note(snapshot, "\udc80")


def test_damaged_notes_are_not_replaced(snapshot: Path) -> None:
    (snapshot / "notes.json").write_bytes(b"{")
    with pytest.raises(CorruptError, match=r"notes\.json is damaged"):
        notes.add_tags(snapshot, "good")
    assert (snapshot / "notes.json").read_bytes() == b"{"


def test_processes_that_tag_at_once_lose_nothing(snapshot: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pysnap import notes\n"
        "sys.stdin.read(1)\n"
        "for i in range(20): notes.add_tags(Path(sys.argv[1]), f'{sys.argv[2]}-{i}')"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, snapshot, name], stdin=subprocess.PIPE)
        for name in ("a", "b", "c")
    ]
    for child in children:
        child.communicate(b"x", timeout=60)
    assert [child.returncode for child in children] == [0, 0, 0]
    expected = {f"{name}-{i}" for name in "abc" for i in range(20)}
    assert set(Notes.read(snapshot).tags) == expected
    assert {path.name for path in snapshot.iterdir()} == {"0.pack", "manifest.json", "notes.json"}


def test_a_lock_that_is_held_is_told(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open(snapshot, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(BusyError, match="another process"), notes.locked(snapshot, 0):
            pass
    finally:
        os.close(descriptor)
    notes.pin(snapshot)


def test_a_snapshot_that_is_gone_is_told(snapshot: Path) -> None:
    with pytest.raises(NotFoundError, match="is gone"):
        notes.pin(snapshot.parent / "two")


@pytest.mark.parametrize("by_another", [False, True])
def test_a_snapshot_replaced_while_the_lock_was_taken_is_not_marked(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, by_another: bool
) -> None:
    trash = snapshot.with_name("trash")

    def replaced(descriptor: int, how: int) -> None:
        snapshot.rename(trash)
        if by_another:
            snapshot.mkdir()

    monkeypatch.setattr(storage.fcntl, "flock", replaced)
    with pytest.raises(NotFoundError, match="is gone"):
        notes.pin(snapshot)
    assert not (trash / "notes.json").exists() and not (snapshot / "notes.json").exists()


def test_what_a_killed_editor_left_is_removed(snapshot: Path) -> None:
    (snapshot / ".notes.json-dead").write_bytes(b"half")
    assert verify_snapshot(snapshot).extra == []
    notes.pin(snapshot)
    assert not (snapshot / ".notes.json-dead").exists()


def run(root: Path, steps: int, before: dict[int, object] | None = None) -> None:
    model = torch.nn.Linear(2, 2)
    with pysnap.Snapshotter(
        root, model=model, every="1 step", keep=pysnap.Keep(last=1)
    ) as snapshotter:
        for step in range(1, steps + 1):
            with snapshotter.step():
                pass
            snapshotter.save().wait()
            if before and step in before:
                before[step](root)  # type: ignore[operator]


def test_marks_set_while_the_run_goes_on_hold_what_they_mark(tmp_path: Path) -> None:
    def mark(root: Path) -> None:
        notes.add_tags(list_snapshots(root).snapshots[0].path, "good")

    def pin(root: Path) -> None:
        notes.pin(list_snapshots(root).snapshots[0].path)

    run(tmp_path / "r", 5, {1: mark, 3: pin})
    steps = {snapshot.step for snapshot in list_snapshots(tmp_path / "r").snapshots}
    assert steps == {1, 3, 5}


def test_a_mark_that_comes_between_the_plan_and_the_deletion_holds(tmp_path: Path) -> None:
    root = tmp_path / "r"
    run(root, 1)
    path = list_snapshots(root).snapshots[0].path
    repository = Repository(root)
    try:
        notes.add_tags(path, "late")
        assert not repository.delete(path)
        assert path.exists()
        notes.remove_tags(path, "late")
        with notes.locked(path):
            assert not repository.delete(path)
        assert repository.delete(path)
        assert not path.exists()
    finally:
        repository.close()


def test_marks_survive_copying(snapshot: Path) -> None:
    notes.add_tags(snapshot, "good")
    copy = snapshot.with_name("copy")
    subprocess.run(["cp", "-r", snapshot, copy], check=True)
    assert Notes.read(copy).tags == ("good",)
