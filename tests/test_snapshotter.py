"""The Snapshotter as a service: cadence, handles, failures, exit, fork, signals."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import Run, assert_same

import pysnap
from pysnap import repository, storage


def steps_on_disk(path: Path) -> list[int]:
    return sorted(snapshot.step for snapshot in repository.list_snapshots(path).snapshots)


def run_python(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=path.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def slow_disk(snapshotter: pysnap.Snapshotter) -> threading.Event:
    """Nothing is committed before the event is set."""
    release = threading.Event()
    commit = snapshotter._committer._commit

    def slow(*arguments: object) -> object:
        release.wait()
        return commit(*arguments)  # type: ignore[arg-type]  # the arguments are passed through

    snapshotter._committer._commit = slow  # type: ignore[method-assign,assignment]  # a slow disk
    return release


# Cadence and retention


def test_every_n_steps_and_the_last_three_are_kept(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every="2 steps") as snapshotter:
        for _ in range(12):
            with snapshotter.step():
                pass
            snapshotter._committer.wait_idle()
    assert steps_on_disk(tmp_path) == [8, 10, 12]
    assert snapshotter.stats().durable == 6


def test_the_environment_changes_the_cadence_of_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYSNAP_EVERY", "3")
    caplog.set_level(logging.INFO, "pysnap")
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every="1 step") as snapshotter:
        for _ in range(4):
            with snapshotter.step():
                pass
    assert steps_on_disk(tmp_path) == [3]
    assert "PYSNAP_EVERY" in caplog.records[0].message and "3 steps" in caplog.records[0].message


def test_off_takes_nothing_but_save_does(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every="off") as snapshotter:
        with snapshotter.step():
            pass
        assert steps_on_disk(tmp_path) == []
        snapshotter.save().wait()
    assert steps_on_disk(tmp_path) == [1]


def test_a_due_snapshot_while_one_is_in_flight_is_taken_late_and_counted(tmp_path: Path) -> None:
    with pysnap.Snapshotter(
        tmp_path, values={"a": 1}, every=1, keep=pysnap.Keep(last=None)
    ) as snapshotter:
        release = slow_disk(snapshotter)
        for _ in range(3):
            with snapshotter.step():
                pass
        release.set()
        snapshotter._committer.wait_idle()
        with snapshotter.step():
            pass
    assert steps_on_disk(tmp_path) == [1, 4]
    assert snapshotter.stats().late == 1


def test_an_exception_in_a_step_takes_no_snapshot(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every=1) as snapshotter:
        with pytest.raises(ValueError, match="mine"), snapshotter.step():
            raise ValueError("mine")
        assert snapshotter.progress.step == 0
    assert steps_on_disk(tmp_path) == []


# One moment


def test_what_training_writes_after_the_step_is_not_in_the_snapshot(tmp_path: Path) -> None:
    values = {"x": torch.zeros(2_000_000)}
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        for value in range(1, 6):
            values["x"].fill_(value)
            handle = snapshotter.save()
            values["x"].fill_(-1)
            handle.wait()
            assert (pysnap.load(tmp_path)["values"]["x"] == value).all()


def test_staging_smaller_than_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "16KiB")
    values = {"x": torch.randn(300_000)}
    with pysnap.Snapshotter(tmp_path, values=values, host_memory="64KiB") as snapshotter:
        handle = snapshotter.save()
        expected = values["x"].clone()
        values["x"].zero_()
        handle.wait()
    assert_same(pysnap.load(tmp_path)["values"]["x"], expected)


# Handles and callbacks


def test_a_handle_tells_the_way_of_a_snapshot(tmp_path: Path) -> None:
    told: list[pysnap.SnapshotInfo] = []
    with pysnap.Snapshotter(
        tmp_path, values={"x": torch.randn(1000)}, on_durable=told.append
    ) as snapshotter:
        handle = snapshotter.save()
        assert handle.wait_staged()
        info = handle.wait()
        assert handle.done() and info.path.is_dir() and info.step == 0
        assert 0 <= info.stall_seconds <= info.durable_seconds
        assert info.raw_bytes == 4000 and 0 < info.stored_bytes <= 4000
    assert told == [info] and snapshotter.stats().last == info


def test_a_callback_that_fails_does_not_fail_the_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: pysnap.SnapshotInfo) -> None:
        raise RuntimeError("mine")

    with pysnap.Snapshotter(tmp_path, values={"a": 1}, on_durable=broken) as snapshotter:
        snapshotter.save().wait()
    assert "on_durable failed" in caplog.text and snapshotter.stats().failed == 0


# Failures


def test_a_background_failure_names_errno_path_and_step_and_the_next_one_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository_path = tmp_path / "run"
    snapshotter = pysnap.Snapshotter(repository_path, values={"x": torch.randn(5000)}, every=1)
    resource_limit(4096)
    try:
        with snapshotter.step():
            pass
        snapshotter._committer.wait_idle()
    finally:
        resource_limit(None)
    assert (
        "step 1 failed" in caplog.text
        and "0.pack" in caplog.text
        and os.strerror(errno.EFBIG) in caplog.text
    )
    assert snapshotter.stats().failed == 1
    with snapshotter.step():
        pass
    snapshotter.close()
    assert steps_on_disk(repository_path) == [2]
    assert not list(repository_path.glob(".partial-*"))


def test_a_limit_on_the_length_of_files_does_not_kill_the_process(tmp_path: Path) -> None:
    """Where a program had put the signal's default back, the manifest's write killed it."""
    code = """
import resource, signal, sys, pysnap
values = {"text": "x" * 100_000}
with pysnap.Snapshotter(sys.argv[1], values=values) as snapshotter:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    try:
        snapshotter.save().wait()
    except pysnap.StorageError as error:
        print(error.errno)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    snapshotter.save().wait()
"""
    done = run_python(code, tmp_path / "run")
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr


def resource_limit(size: int | None) -> None:
    """Let no file grow past `size`: a full disk without a disk."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def fail_writes(snapshotter: pysnap.Snapshotter) -> None:
    def broken(*_: object) -> None:
        raise pysnap.StorageError(errno.EIO, "writing failed", "0.pack")

    snapshotter._stager.begin = lambda state, **_: FailingCapture()  # type: ignore[method-assign,assignment,return-value]  # a broken disk


class FailingCapture:
    """A capture whose disk is broken."""

    size = 0

    def let_pass(self) -> None: ...

    def copy(self) -> None: ...

    def gate(self) -> None: ...

    def abort(self) -> None: ...

    def write(self, *_: object, **__: object) -> None:
        raise pysnap.StorageError(errno.EIO, "writing failed", "0.pack")


def test_close_raises_if_the_newest_snapshot_failed(tmp_path: Path) -> None:
    snapshotter = pysnap.Snapshotter(tmp_path, values={"a": 1}, every=1)
    fail_writes(snapshotter)
    with snapshotter.step():
        pass
    with pytest.raises(pysnap.StorageError, match="writing failed"):
        snapshotter.close()
    snapshotter.close()


def test_on_error_raise_tells_at_the_next_step_once(tmp_path: Path) -> None:
    with pysnap.Snapshotter(
        tmp_path, values={"a": 1}, every="5 steps", on_error="raise"
    ) as snapshotter:
        begin = snapshotter._stager.begin
        fail_writes(snapshotter)
        for _ in range(5):
            with snapshotter.step():
                pass
        snapshotter._committer.wait_idle()
        snapshotter._stager.begin = begin  # type: ignore[method-assign]  # the disk works again
        with pytest.raises(pysnap.StorageError, match="writing failed"), snapshotter.step():
            pass
        for _ in range(4):
            with snapshotter.step():
                pass
    assert steps_on_disk(tmp_path) == [10]


def test_a_failure_does_not_hide_the_programs_own_exception(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError, match="mine"),
        pysnap.Snapshotter(tmp_path, values={"a": 1}, every=1) as snapshotter,
    ):
        fail_writes(snapshotter)
        with snapshotter.step():
            pass
        raise KeyError("mine")


FULL_DISK = """
import logging, os, subprocess, sys
import torch, pysnap
logging.basicConfig()
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", "disk"], check=True)
values = {"x": torch.randn(200_000), "y": torch.zeros(10)}
with pysnap.Snapshotter("disk/run", values=values, every=1) as snapshotter:
    with snapshotter.step():
        values["y"] += 1
    snapshotter._committer.wait_idle()
    filler = os.open("disk/filler", os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(filler, bytes(65536)):
            pass
    except OSError:
        os.close(filler)
    with snapshotter.step():
        values["y"] += 1
    snapshotter._committer.wait_idle()
    print(snapshotter.stats().durable, snapshotter.stats().failed, sorted(os.listdir("disk/run")))
    os.unlink("disk/filler")
    with snapshotter.step():
        values["y"] += 1
print(pysnap.load("disk/run")["values"]["y"][0].item())
"""


def test_a_full_disk_fails_one_snapshot_loses_none_and_the_next_works(tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip(
            "this machine allows no user namespaces, so no small file system can be mounted"
        )
    done = subprocess.run(
        [*namespace, sys.executable, "-c", FULL_DISK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts, value = done.stdout.splitlines()
    assert counts == "1 1 ['.pysnap', '.writer', 'events.jsonl', 'latest', 'step-000000001']"
    assert value == "3.0"
    assert "No space left" in done.stderr and "step 2 failed" in done.stderr


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": "often"}, "often"),
        ({"every": "0"}, "every"),
        ({"host_memory": "lots"}, "host_memory"),
        ({"codec": "gzip"}, "codec"),
        ({"model": 5}, "model"),
        ({"rng": {}}, "rng"),
        ({"metadata": {"a": print}}, "metadata"),
    ],
)
def test_bad_arguments_are_refused_at_the_door(
    tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(pysnap.ConfigError, match=words):
        pysnap.Snapshotter(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variable",
    [
        "PYSNAP_EVERY",
        "PYSNAP_HOST_MEMORY",
        "PYSNAP_WORKERS",
        "PYSNAP_NICE",
        "PYSNAP_DIRECT_IO",
        "PYSNAP_EVRY",
    ],
)
def test_bad_environment_variables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(pysnap.ConfigError, match=variable):
        pysnap.Snapshotter(tmp_path / "run", values={"a": 1})


def test_a_file_where_the_repository_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(pysnap.StorageError, match="run"):
        pysnap.Snapshotter(tmp_path / "run", values={"a": 1})
    assert (tmp_path / "run").read_text() == "mine"


def test_a_snapshot_that_cannot_be_removed_does_not_fail_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: repository.Repository, path: Path) -> None:
        raise pysnap.StorageError(errno.EPERM, f"renaming {path} failed", str(path))

    monkeypatch.setattr(repository.Repository, "delete", refused)
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, keep=pysnap.Keep(last=1)) as snapshotter:
        snapshotter.save().wait()
        assert snapshotter.save().wait().path.name == "step-000000000.1"
    assert "could not be removed" in caplog.text and snapshotter.stats().failed == 0


def test_a_path_that_is_no_text_is_refused_before_training(tmp_path: Path) -> None:
    """The first snapshot failed, with an error of the extension's about its arguments."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    with pytest.raises(pysnap.ConfigError, match=r"run\\udcff is not UTF-8"):
        pysnap.Snapshotter(path, values={"a": 1})
    assert not path.exists()
    with pytest.raises(pysnap.ConfigError, match="not UTF-8"):
        pysnap.Snapshotter(tmp_path / "\ud800", values={"a": 1})
    with pysnap.Snapshotter(tmp_path / "run", values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
    (tmp_path / "run").rename(path)
    with pytest.raises(pysnap.ConfigError, match="not UTF-8"):
        pysnap.load(path)


def test_a_directory_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(pysnap.NotFoundError, match=r"thesis\.tex"):
        pysnap.Snapshotter(tmp_path, values={"a": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["moved", "replaced", "empty", "link"])
def test_a_repository_that_is_moved_or_replaced_fails_snapshots_until_it_is_back(
    tmp_path: Path, damage: str
) -> None:
    """A snapshot was written into another directory, for which this process held no lock."""
    root, real, away, other = (tmp_path / name for name in ("run", "real", "away", "other"))
    pysnap.Snapshotter(other, values={"a": 2}).close()
    real.mkdir()
    if damage == "link":
        root.symlink_to(real)
    with pysnap.Snapshotter(root, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
        if damage == "link":
            root.unlink()
            root.symlink_to(other)
        else:
            root.rename(away)
            if damage == "replaced":
                other.rename(root)
            elif damage == "empty":
                root.mkdir()
        before = sorted(root.rglob("*"))
        with pytest.raises(pysnap.StorageError, match="put it back") as told:
            snapshotter.save().wait()
        assert told.value.errno in (errno.ENOENT, errno.ESTALE)
        assert told.value.filename == str(root) and sorted(root.rglob("*")) == before

        if damage == "link":
            root.unlink()
            root.symlink_to(real)
        else:
            if root.exists():
                shutil.rmtree(root)
            away.rename(root)
        assert snapshotter.save().wait().path.name == "step-000000000.1"


def test_a_repository_that_is_removed_is_not_made_again(tmp_path: Path) -> None:
    snapshotter = pysnap.Snapshotter(tmp_path / "run", values={"a": 1}, every=1)
    assert snapshotter._events.flush(60)  # or it may be made while the directory is removed
    shutil.rmtree(tmp_path / "run")
    for _ in range(2):
        with snapshotter.step():
            pass
        snapshotter._committer.wait_idle()
    with pytest.raises(pysnap.StorageError, match="run is gone"):
        snapshotter.close()
    assert snapshotter.stats().failed == 2 and not (tmp_path / "run").exists()


def test_an_unwritable_path(tmp_path: Path) -> None:
    with pytest.raises(pysnap.StorageError, match="/proc/nowhere"):
        pysnap.Snapshotter("/proc/nowhere/run", values={"a": 1})


def test_a_repository_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
    (tmp_path / ".pysnap").write_text('{"pysnap": "repository", "format": 2, "id": "x"}')
    with pytest.raises(pysnap.FormatError, match="format 2"):
        pysnap.Snapshotter(tmp_path, values={"a": 1})
    with pytest.raises(pysnap.FormatError, match="format 2"):
        pysnap.load(tmp_path)


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        pysnap.Snapshotter(tmp_path, values={"a": 1}),
        pytest.raises(pysnap.BusyError, match=f"process {os.getpid()}"),
    ):
        pysnap.Snapshotter(tmp_path, values={"a": 1})
    pysnap.Snapshotter(tmp_path, values={"a": 1}).close()


def test_an_object_that_cannot_be_stored_is_refused_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(pysnap.StateError, match="hook"):
        pysnap.Snapshotter(tmp_path / "run", values={"hook": print})


# Processes

TRAIN = """
import os, sys, signal, torch, pysnap
values = {"x": torch.arange(3_000_000)}
snapshotter = pysnap.Snapshotter(sys.argv[1], values=values, every=1)
with snapshotter.step():
    pass
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('mine')", 1),
        ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
        ("del snapshotter", 0),
        ("snapshotter.close()", 0),
    ],
    ids=["end", "sys.exit", "exception", "ctrl-c", "del", "close"],
)
def test_a_snapshot_in_flight_is_durable_however_the_interpreter_ends(
    tmp_path: Path, ending: str, status: int
) -> None:
    done = run_python(TRAIN + ending, tmp_path / "run")
    assert done.returncode == status, done.stderr
    assert steps_on_disk(tmp_path / "run") == [1]
    assert_same(pysnap.load(tmp_path / "run")["values"]["x"], torch.arange(3_000_000))


def test_ctrl_c_ends_a_capture_that_waits_for_a_stuck_disk(tmp_path: Path) -> None:
    code = """
import os, sys, signal, threading, torch, pysnap
values = {"x": torch.arange(100_000)}
snapshotter = pysnap.Snapshotter(sys.argv[1], values=values)
stuck = threading.Event()
begin = snapshotter._repository.begin
def wait():
    threading.Timer(0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    stuck.wait()
    return begin()
snapshotter._repository.begin = wait
try:
    snapshotter.save()
except KeyboardInterrupt:
    stuck.set()
    print("interrupted")
"""
    done = run_python(code, tmp_path / "run", PYSNAP_CHUNK_SIZE="4KiB", PYSNAP_HOST_MEMORY="8KiB")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "interrupted\n"
    assert steps_on_disk(tmp_path / "run") == []


def test_ctrl_c_before_the_capture_begins_leaves_nothing_waiting(tmp_path: Path) -> None:
    """The committing thread waited for ever for a capture that Ctrl-C had ended before it began."""
    snapshotter = pysnap.Snapshotter(tmp_path, values={"a": torch.ones(3)})
    start = snapshotter._committer._start

    def interrupted(run: Callable[[], object]) -> None:
        start(run)
        raise KeyboardInterrupt

    snapshotter._committer._start = interrupted  # type: ignore[method-assign]  # Ctrl-C right there
    with pytest.raises(KeyboardInterrupt):
        snapshotter.save()
    snapshotter._committer._start = start  # type: ignore[method-assign]  # put back
    snapshotter.save().wait()
    snapshotter.close()
    assert snapshotter.stats().failed == 1


def test_no_more_threads_fails_the_snapshot_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:

        def refused(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            handle = snapshotter.save()
        with pytest.raises(RuntimeError, match="new thread"):
            handle.wait()
        snapshotter.save().wait()


def test_an_exception_of_a_signal_handler_is_not_taken_for_a_refused_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RuntimeError of the program's own was swallowed when it came while the thread started."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        start = snapshotter._committer._start

        def interrupted(run: Callable[[], object]) -> None:
            start(run)
            raise RuntimeError("mine")

        with monkeypatch.context() as patch:
            patch.setattr(snapshotter._committer, "_start", interrupted)
            with pytest.raises(RuntimeError, match="mine"):
                snapshotter.save()
        snapshotter.save().wait()


def test_what_is_given_up_before_the_committing_thread_begins_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        committer = snapshotter._committer
        runs: list[Callable[[], object]] = []

        def interrupted(run: Callable[[], object]) -> None:
            runs.append(run)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(committer, "_start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                snapshotter.save()
        snapshotter.save().wait()
        runs[0]()
        assert (snapshotter.stats().failed, snapshotter.stats().durable) == (1, 1)
        snapshotter.save().wait()


def test_no_memory_left_fails_the_snapshot_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise MemoryError

    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        with monkeypatch.context() as patch:
            patch.setattr(snapshotter._stager, "begin", refused)
            handle = snapshotter.save()
        with pytest.raises(MemoryError):
            handle.wait()
        snapshotter.save().wait()


def test_a_snapshot_that_hardly_has_memory_starts_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread died before it could say so, and training waited for ever for its start."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    started: list[threading.Thread] = []
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        with monkeypatch.context() as patch:
            patch.setattr("mmap.mmap", refused)
            patch.setattr(threading.Thread, "start", started.append)
            handle = snapshotter.save()
        with pytest.raises(MemoryError, match="32 MiB"):
            handle.wait()
        assert not started
        snapshotter.save().wait()


def test_an_exception_of_a_state_dict_is_the_programs_own(tmp_path: Path) -> None:
    class Part:
        broken = False

        def state_dict(self) -> dict[str, int]:
            if self.broken:
                raise LookupError("mine")
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    part = Part()
    with pysnap.Snapshotter(tmp_path, part=part) as snapshotter:
        part.broken = True
        with pytest.raises(LookupError, match="mine"):
            snapshotter.save()
        part.broken = False
        snapshotter.save().wait()


def test_what_cannot_be_stored_later_fails_the_snapshot_not_the_training(tmp_path: Path) -> None:
    values: dict[str, object] = {"a": 1}
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        values["hook"] = print
        with pytest.raises(pysnap.StateError, match="values/hook"):
            snapshotter.save().wait()
        del values["hook"]
        snapshotter.save().wait()


@pytest.mark.parametrize("place", ["begin", "thread", "start"])
def test_ctrl_c_anywhere_before_the_capture_fails_its_handle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """save() and close() hung after a Ctrl-C between the lines of take()."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    snapshotter = pysnap.Snapshotter(tmp_path, values={"a": 1})
    with monkeypatch.context() as patch:
        if place == "begin":
            patch.setattr(snapshotter._stager, "begin", interrupted)
        else:
            patch.setattr(
                threading.Thread, "__init__" if place == "thread" else "start", interrupted
            )
        with pytest.raises(KeyboardInterrupt):
            snapshotter.save()
    snapshotter.save().wait()
    snapshotter.close()
    assert snapshotter.stats().failed == 1


def test_ctrl_c_that_was_caught_is_not_raised_again(tmp_path: Path) -> None:
    snapshotter = pysnap.Snapshotter(tmp_path, values={"a": 1})

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    snapshotter._stager.begin = interrupted  # type: ignore[method-assign,assignment]  # Ctrl-C there
    with pytest.raises(KeyboardInterrupt):
        snapshotter.save()
    snapshotter.close()


def test_any_exception_of_retention_leaves_the_snapshot_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """wait() hung when retention met an error that was no pysnap.Error."""

    def refused(_: object) -> None:
        raise PermissionError("mine")

    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        monkeypatch.setattr(repository.Repository, "list", refused)
        assert snapshotter.save().wait().path.is_dir()
    assert "could not be removed" in caplog.text


def test_a_snapshot_that_is_still_due_is_taken_by_close(tmp_path: Path) -> None:
    """The last snapshot of a run was lost when it was due while another was in flight."""
    values = {"a": 0}
    snapshotter = pysnap.Snapshotter(tmp_path, values=values, every=1)
    release = slow_disk(snapshotter)
    for _ in range(3):
        with snapshotter.step():
            values["a"] += 1
    release.set()
    snapshotter.close()
    assert pysnap.load(tmp_path)["values"] == {"a": 3}


def test_close_takes_no_snapshot_of_a_step_that_an_exception_left_half_done(tmp_path: Path) -> None:
    values = {"a": 0}
    snapshotter = pysnap.Snapshotter(tmp_path, values=values, every=1)
    release = slow_disk(snapshotter)
    for _ in range(2):
        with snapshotter.step():
            values["a"] += 1
    with pytest.raises(ValueError, match="mine"), snapshotter.step():
        values["a"] = -1
        raise ValueError("mine")
    release.set()
    snapshotter.close()
    assert pysnap.load(tmp_path)["values"] == {"a": 1}


def test_a_name_that_is_used_again_is_not_taken_for_the_snapshot_that_had_it(
    tmp_path: Path,
) -> None:
    """Retention removed the snapshot that was just committed."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, keep=pysnap.Keep(last=1)) as snapshotter:
        for step in (5, 10, 5):
            snapshotter.progress.step = step
            info = snapshotter.save().wait()
        assert info.path.is_dir()


def test_a_program_may_change_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with pysnap.Snapshotter("runs/gpt", values={"a": 1}) as snapshotter:
        monkeypatch.chdir(tmp_path / "elsewhere")
        snapshotter.save().wait()
    assert steps_on_disk(tmp_path / "runs" / "gpt") == [0]


def test_somebody_elses_folder_in_a_snapshot_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, keep=pysnap.Keep(last=1)) as snapshotter:
        path = snapshotter.save().wait().path
        (path / ".ipynb_checkpoints").mkdir()
        snapshotter.progress.step = 1
        snapshotter.save().wait()
    pysnap.Snapshotter(tmp_path, values={"a": 1}).close()
    assert steps_on_disk(tmp_path) == [1]
    assert "what a killed writer left stays" in caplog.text


def test_a_forked_child_is_inert(tmp_path: Path) -> None:
    code = """
import os, sys, torch, pysnap
values = {"x": torch.arange(3_000_000)}
snapshotter = pysnap.Snapshotter(sys.argv[1], values=values, every=1)
with snapshotter.step():
    pass
child = os.fork()
if child == 0:
    handle = pysnap.commit.Handle(1)
    handle._owner = os.getppid()  # as of one that the parent has only begun
    for call in (snapshotter.save, snapshotter.close, snapshotter.resume, handle.wait):
        try:
            call()
        except pysnap.ClosedError:
            os.write(1, b"refused\\n")
    del snapshotter
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
snapshotter.close()
"""
    done = run_python(code, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused\n" * 4
    assert steps_on_disk(tmp_path / "run") == [1]


def test_a_worker_that_outlives_a_killed_trainer_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = """
import os, sys, signal, pysnap
snapshotter = pysnap.Snapshotter(sys.argv[1], values={"a": 1})
read, write = os.pipe()
if os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    os.close(1)
    os.close(2)
    signal.pause()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(code, tmp_path / "run")
    worker = int(done.stdout)
    try:
        pysnap.Snapshotter(tmp_path / "run", values={"a": 1}).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_workers_of_a_data_loader_do_not_disturb(tmp_path: Path) -> None:
    run = Run()
    workers = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.arange(40)), batch_size=4, num_workers=2
    )
    with pysnap.Snapshotter(tmp_path, **run.parts, every=1) as snapshotter:
        for _ in workers:
            with snapshotter.step():
                pass
        snapshotter.save().wait()
    assert steps_on_disk(tmp_path)[-1] == 10


# Readers


def test_a_reader_finds_what_replaces_the_snapshot_that_retention_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep=1, a reader that had listed the one snapshot was told that there is none."""
    values = {"a": 0}
    keep = pysnap.Keep(last=1)
    with pysnap.Snapshotter(tmp_path, values=values, keep=keep, every=1) as snapshotter:
        snapshotter.save().wait()
        names = repository.snapshot_names

        def late(root: Path) -> list[str]:
            monkeypatch.undo()
            found = names(root)
            with snapshotter.step():
                values["a"] += 1
            snapshotter._committer.wait_idle()
            return found

        monkeypatch.setattr(repository, "snapshot_names", late)
        assert pysnap.load(tmp_path)["values"] == {"a": 1}


# Leftovers


def test_leftovers_of_a_killed_writer_are_invisible_and_collected(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
    for name in (".partial-dead", ".trash-dead"):
        storage.make_directory(tmp_path / name)
        (tmp_path / name / "0.pack").write_bytes(b"x")
    assert pysnap.load(tmp_path)["values"] == {"a": 1}
    pysnap.Snapshotter(tmp_path, values={"a": 1}).close()
    assert not list(tmp_path.glob(".partial-*")) and not list(tmp_path.glob(".trash-*"))


def test_a_save_inside_a_snapshot_that_is_being_taken_does_not_wait_for_itself(
    tmp_path: Path,
) -> None:
    """As in the handler of a signal that comes during the copy."""

    class Saves:
        def state_dict(self) -> dict[str, int]:
            if armed:
                armed.clear()
                with pytest.raises(pysnap.Error, match="signal handler"):
                    snapshotter.save()
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    armed: list[bool] = []
    with pysnap.Snapshotter(tmp_path, saves=Saves()) as snapshotter:
        armed.append(True)
        snapshotter.save().wait()
        assert not armed


def test_a_lock_that_cannot_be_looked_at_fails_one_snapshot_with_an_error_of_pysnap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handle told an OSError."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        lock = snapshotter._repository._lock._descriptor
        fstat = os.fstat

        def broken(descriptor: int) -> os.stat_result:
            if descriptor == lock:
                raise OSError(errno.EIO, "mine")
            return fstat(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", broken)
            with pytest.raises(pysnap.StorageError, match=r"\.writer"):
                snapshotter.save().wait()
        snapshotter.save().wait()
