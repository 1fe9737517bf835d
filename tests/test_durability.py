"""What is made durable, in which order, and what is told when that fails. tests/faults tries the
same by what power cuts leave and by failing every operation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pysnap
from pysnap import storage
from pysnap.repository import discard, list_snapshots


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """The calls of storage that make durable or remove, in their order."""
    made: list[tuple[str, Path]] = []

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(storage, name)

        def call(path: Path, *arguments: Any) -> Any:
            made.append((name, path))
            return function(path, *arguments)

        return call

    for name in ("sync_directory", "remove_directory"):
        monkeypatch.setattr(storage, name, watched(name))
    return made


def test_trash_of_a_killed_writer_is_durable_before_it_is_unlinked(
    tmp_path: Path, calls: list[tuple[str, Path]]
) -> None:
    """A power cut could bring a removed snapshot back, half empty: reported as damaged."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        path = snapshotter.save().wait().path
    trash = tmp_path / ".trash-dead"
    os.rename(path, trash)
    calls.clear()
    pysnap.Snapshotter(tmp_path, values={"a": 1}).close()
    assert calls == [("sync_directory", tmp_path), ("remove_directory", trash)]


def test_directories_that_a_killed_process_made_for_a_repository_are_durable(
    tmp_path: Path, calls: list[tuple[str, Path]]
) -> None:
    """A power cut could take the whole repository away, with what `wait()` had acknowledged."""
    root = tmp_path / "runs" / "gpt"
    root.mkdir(parents=True)
    with pysnap.Snapshotter(root, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
    synced = [path for name, path in calls if name == "sync_directory"]
    assert {root, root.parent, tmp_path} <= set(synced)
    header = synced.index(root)
    assert synced.index(root.parent) < header and synced.index(tmp_path) < header


def test_directories_above_a_repository_may_be_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        if path == tmp_path:
            raise pysnap.StorageError(13, f"syncing directory {path} failed", str(path))

    monkeypatch.setattr(storage, "sync_directory", refuse)
    (tmp_path / "run").mkdir()
    pysnap.Snapshotter(tmp_path / "run", values={"a": 1}).close()
    with pytest.raises(pysnap.StorageError, match="syncing"):
        pysnap.Snapshotter(tmp_path / "new", values={"a": 1})


# What the file system does not tell


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, where: Callable[[Path], bool]
) -> None:
    """Calls of os.`name` on some paths fail with this errno."""
    function = getattr(os, name)

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path, (str, Path)) and where(Path(path)):
            raise OSError(number, os.strerror(number), str(path))
        return function(path, *arguments, **options)

    monkeypatch.setattr(os, name, call)


def test_a_full_disk_does_not_keep_a_repository_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text in the lock file could not be written: opening failed, and the lock stayed taken."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pysnap.Snapshotter(tmp_path, values={"a": 2}) as snapshotter:
            assert snapshotter.resume() is not None
    pysnap.Snapshotter(tmp_path, values={"a": 1}).close()


def test_a_snapshot_that_cannot_be_looked_at_is_not_taken_for_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training began anew, without a word, while the file system gave errors."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
    for name in ("open", "lstat"):
        failing(monkeypatch, name, 116, lambda path: path.parent.name == "step-000000000")
    failing(monkeypatch, "lstat", 116, lambda path: path.name == "step-000000000")
    assert len(list_snapshots(tmp_path).damaged) == 1
    with (
        pysnap.Snapshotter(tmp_path, values={"a": 2}) as snapshotter,
        pytest.raises(pysnap.CorruptError, match="none"),
    ):
        snapshotter.resume()


def test_a_header_that_cannot_be_looked_at_is_not_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pysnap.Snapshotter(tmp_path, values={"a": 1}).close()
    header = (tmp_path / ".pysnap").read_bytes()
    with monkeypatch.context() as patch:
        failing(patch, "lstat", 5, lambda path: path.name == ".pysnap")
        with pytest.raises(pysnap.StorageError, match=r"looking for .*Input/output error"):
            pysnap.Snapshotter(tmp_path, values={"a": 1})
    assert (tmp_path / ".pysnap").read_bytes() == header


# A commit of which nobody knows whether it is durable


def unsynced(monkeypatch: pytest.MonkeyPatch, root: Path, sync: Callable[[Path], None]) -> None:
    """Syncing the repository fails while it holds a snapshot of step 2."""

    def fail(path: Path) -> None:
        if path == root and any(path.glob("step-*2")):
            raise pysnap.StorageError(5, f"syncing directory {path} failed: EIO", str(path))
        sync(path)

    monkeypatch.setattr(storage, "sync_directory", fail)


def test_a_commit_that_may_not_be_durable_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was reported as failed and stayed visible; retention counted it and deleted a durable
    one for it."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, keep=pysnap.Keep(last=2)) as snapshotter:
        for fails in (False, True, False):
            with snapshotter.step():
                pass
            with monkeypatch.context() as patch:
                unsynced(patch, tmp_path, storage.sync_directory)
                handle = snapshotter.save()
                if fails:
                    with pytest.raises(pysnap.StorageError, match=r"step 2 .*syncing"):
                        handle.wait()
                else:
                    handle.wait()
        names = sorted(path.name for path in tmp_path.glob("step-*"))
        assert names == ["step-000000001", "step-000000003"]
        assert not list(tmp_path.glob(".partial-*"))


def test_a_commit_that_cannot_be_taken_back_does_not_count_for_retention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = storage.rename

    def one_way(source: Path, target: Path) -> None:
        if target.name.startswith(".partial-"):
            raise pysnap.StorageError(5, f"renaming {source} failed: EIO", str(source))
        rename(source, target)

    with pysnap.Snapshotter(tmp_path, values={"a": 1}, keep=pysnap.Keep(last=2)) as snapshotter:
        for step in (1, 2, 3):
            with snapshotter.step():
                pass
            with monkeypatch.context() as patch:
                if step == 2:
                    unsynced(patch, tmp_path, storage.sync_directory)
                    patch.setattr(storage, "rename", one_way)
                handle = snapshotter.save()
                handle._done.wait()
                assert (handle.error is not None) == (step == 2)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-000000001", "step-000000002", "step-000000003"]


def test_a_step_of_which_the_commit_failed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.progress.step = 2
        with monkeypatch.context() as patch:
            unsynced(patch, tmp_path, storage.sync_directory)
            with pytest.raises(pysnap.StorageError):
                snapshotter.save().wait()
        assert snapshotter.save().wait().path.name == "step-000000002"
        # It counts again.
        assert [s.step for s in snapshotter._repository.durable()] == [2]


def test_a_name_that_became_visible_is_synced_before_it_is_unlinked(
    tmp_path: Path, calls: list[tuple[str, Path]]
) -> None:
    """What a failed commit left: a power cut may bring it back, and it was reported as damaged."""
    partial = tmp_path / ".partial-dead"
    partial.mkdir()
    discard(partial)
    assert calls == [("sync_directory", tmp_path), ("remove_directory", partial)]


def test_the_error_of_a_handle_names_the_step(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.progress.step = 7
        os.rename(tmp_path, tmp_path.with_suffix(".away"))
        with pytest.raises(pysnap.StorageError, match="the snapshot of step 7 failed: ") as caught:
            snapshotter.save().wait()
        os.rename(tmp_path.with_suffix(".away"), tmp_path)
        assert caught.value.errno == 2 and str(tmp_path) in str(caught.value.filename)
        snapshotter.save().wait()


def test_a_manifest_that_cannot_be_read_at_the_beginning_does_not_become_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk gave errors, a run began to count its snapshots anew; later, the old ones were
    taken for newer ones, resumed from and kept."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
        snapshotter.save().wait()
    with monkeypatch.context() as patch:
        failing(patch, "open", 5, lambda path: path.name == "manifest.json")
        snapshotter = pysnap.Snapshotter(tmp_path, values={"a": 1})
    with snapshotter:
        newest = snapshotter.save().wait().path
    assert list_snapshots(tmp_path).snapshots[0].path == newest


def test_a_lock_that_cannot_be_looked_at_is_told_as_an_error_of_pysnap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error was one of Python's, without a path and a step."""

    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "fstat", stale)
            handle = snapshotter.save()
            handle._done.wait()
        with pytest.raises(pysnap.StorageError, match=r"step 0 .*\.writer failed: Stale"):
            handle.wait()
        snapshotter.save().wait()


def test_a_snapshot_that_cannot_be_looked_at_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error of the disk kept the whole repository closed, with an error of Python's."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
        with snapshotter.step():
            pass
        snapshotter.save().wait()
    failing(monkeypatch, "lstat", 5, lambda path: path.name == "step-000000001")
    with pysnap.Snapshotter(tmp_path, values={"a": 2}) as snapshotter:
        resumed = snapshotter.resume()
        assert resumed is not None and resumed.step == 0
