"""Many processes and one repository: writers that contend, are stopped and killed, forks in the
middle of a snapshot, workers that outlive their trainer, readers beside retention (P9, P10)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Program, Zygote

import pysnap
from pysnap.repository import list_snapshots

HARNESS = "processes"

Count = Callable[..., None]


@contextlib.contextmanager
def running(*programs: Program) -> Iterator[None]:
    try:
        yield
    finally:
        for program in programs:
            program.close()


# Forks

# The capture waits for slots when another thread forks: the child ends in its own way, and the
# parent's snapshot becomes durable.
FORK = """
import atexit, os, sys, threading, torch, pysnap
values = {"x": torch.arange(50_000)}
snapshotter = pysnap.Snapshotter("run", values=values, every=1)
begin, forked = snapshotter._repository.begin, threading.Event()
def stuck():
    child = os.fork()
    if child == 0:
        atexit.register(os.write, 1, b"atexit\\n")
        handle = snapshotter._committer.newest
        for call in (snapshotter.save, snapshotter.close, handle.wait, handle.wait_staged):
            try:
                call()
            except pysnap.ClosedError:
                os.write(1, b"refused\\n")
        snapshotter.stats()
        %s
    status = os.waitpid(child, 0)[1]
    os.write(1, b"%%d\\n" %% status)
    return begin()
snapshotter._repository.begin = stuck
with snapshotter.step():
    pass
snapshotter.close()
"""
CHILDREN = {
    "os._exit": ("os._exit(0)", ["0"]),
    "atexit": ("atexit._run_exitfuncs(); os._exit(0)", ["atexit", "0"]),
    "collected": (
        "import gc; globals().pop('snapshotter'); del handle; gc.collect(); os._exit(0)",
        ["0"],
    ),
    "thread": (
        "thread = threading.Thread(target=int); thread.start(); thread.join(); os._exit(0)",
        ["0"],
    ),
    "own": (
        "pysnap.save('own', values); assert pysnap.load('own'); os._exit(0)",
        ["0"],
    ),
}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_fork_in_the_middle_of_a_capture(
    tmp_path: Path, zygote: Zygote, count: Count, child: str
) -> None:
    code, told = CHILDREN[child]
    staging = {"PYSNAP_CHUNK_SIZE": "4KiB", "PYSNAP_HOST_MEMORY": "16KiB"}
    done = zygote.run(tmp_path, FORK % code, **staging)
    assert done.status == 0, done.err
    assert done.out.split() == ["refused"] * 4 + told
    assert torch.equal(pysnap.load(tmp_path / "run")["values"]["x"], torch.arange(50_000))
    count()


# The main thread forks while the committing thread is inside; the child's end is the interpreter's.
FORK_MAIN = """
import os, sys, threading, torch, pysnap
snapshotter = pysnap.Snapshotter("run", values={"x": torch.arange(50_000)}, every=1)
reached, go = threading.Event(), threading.Event()
commit = snapshotter._repository.commit
def held(*arguments):
    reached.set()
    go.wait()
    return commit(*arguments)
snapshotter._repository.commit = held
with snapshotter.step():
    pass
reached.wait()
child = os.fork()
if child == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
go.set()
"""


def test_a_child_that_ends_as_a_program_does(tmp_path: Path, zygote: Zygote, count: Count) -> None:
    done = zygote.run(tmp_path, FORK_MAIN)
    assert (done.status, done.out) == (0, "7\n"), done.err
    assert list_snapshots(tmp_path / "run").snapshots[0].step == 1
    count()


WORKERS = """
import os, signal, threading, torch, torch.utils.data, pysnap

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        os.write(1, b"%d\\n" % os.getpid())
        signal.pause()

snapshotter = pysnap.Snapshotter("run", values={"x": torch.arange(50_000)}, every=1)
commit = snapshotter._repository.commit
reached = threading.Event()
def held(*arguments):
    reached.set()
    threading.Event().wait()
snapshotter._repository.commit = held
with snapshotter.step():
    pass
reached.wait()
next(iter(torch.utils.data.DataLoader(Slow(), num_workers=2)))
"""


def test_workers_that_outlive_a_killed_trainer_keep_nothing(
    tmp_path: Path, zygote: Zygote, count: Count
) -> None:
    program = zygote.start(tmp_path, WORKERS)
    workers: list[int] = []
    with running(program):
        try:
            workers += [int(program.hear()) for _ in range(2)]
            program.signal(signal.SIGKILL)
            assert program.wait().status == -signal.SIGKILL
            assert list((tmp_path / "run").glob(".partial-*"))
            with pysnap.Snapshotter(tmp_path / "run", values={"x": 1}) as snapshotter:
                assert not list((tmp_path / "run").glob(".partial-*"))
                snapshotter.save().wait()
            for worker in workers:
                os.kill(worker, 0)
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
    count()


# Writers

WRITER = """
import os, sys, torch, pysnap
name = sys.argv[1]
values = {"writer": name, "x": torch.zeros(20_000), "y": 0}
try:
    snapshotter = pysnap.Snapshotter("run", values=values, every=1, keep=pysnap.Keep(last=2))
except pysnap.BusyError as error:
    print("busy", error)
    sys.exit()
snapshotter.resume(only=["progress"])
print("writes", os.getpid())
while True:
    with snapshotter.step():
        values["y"] = snapshotter.progress.step + 1
        values["x"].fill_(values["y"])
    print("durable", snapshotter._committer.newest.wait().step)
"""


def test_a_stopped_writer_keeps_the_repository_and_is_named(
    tmp_path: Path, zygote: Zygote, count: Count
) -> None:
    first, rest = zygote.start(tmp_path, WRITER, "first"), []
    with running(first):
        assert first.hear() == f"writes {first.pid}"
        first.signal(signal.SIGSTOP)
        first.wait_stopped()
        for name in ("second", "third"):
            done = zygote.run(tmp_path, WRITER, name)
            assert f"process {first.pid} on {os.uname().nodename}" in done.out
            rest.append(done)
            count()
        # Readers do not mind.
        with contextlib.suppress(pysnap.NotFoundError):
            pysnap.load(tmp_path / "run")
        first.signal(signal.SIGKILL)
        first.wait()
    pysnap.Snapshotter(tmp_path / "run", values={"a": 1}).close()


def test_writers_that_contend_and_are_killed(
    tmp_path: Path, zygote: Zygote, count: Count, full: bool
) -> None:
    """In each round a few begin at the same moment, one of them writes; it is stopped or not, and
    killed at any moment. What it said was durable is there, whole, in the next round."""
    rng = random.Random(5)
    durable = 0
    for number in range(150 if full else 12):
        programs = [zygote.start(tmp_path, WRITER, name) for name in "abc"[: rng.randint(2, 3)]]
        with running(*programs):
            answers = [(program, program.hear()) for program in programs]
            (writer,) = (p for p, answer in answers if answer.startswith("writes"))
            for program, answer in answers:
                if program is not writer:
                    assert answer.startswith("busy") and program.wait().status == 0
            for _ in range(rng.randint(1, 3)):
                durable = max(durable, int(writer.hear().removeprefix("durable ")))
                check_readers(tmp_path / "run")
            if rng.random() < 0.5:
                writer.signal(signal.SIGSTOP)
                writer.wait_stopped()
                check_readers(tmp_path / "run")
            writer.signal(signal.SIGKILL)
            told = [line for line in writer.wait().out.splitlines() if line.startswith("durable")]
            durable = max(durable, *(int(line.removeprefix("durable ")) for line in told))
        newest = check_readers(tmp_path / "run")
        assert newest >= durable, f"round {number} lost what was durable"
        count()
    # What the last one left is collected, by who has the lock.
    pysnap.Snapshotter(tmp_path / "run", values={"a": 1}).close()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in left if name.startswith((".partial-", ".trash-"))], left


def check_readers(root: Path) -> int:
    """Whatever a writer does meanwhile, the newest snapshot is whole; its step."""
    state = pysnap.load(root)
    step = int(state["progress"]["step"])
    assert state["values"]["y"] == step and (state["values"]["x"] == step).all()
    opened = pysnap.open(root)
    with contextlib.suppress(pysnap.NotFoundError):
        assert opened["values/x"][:5].unique().numel() == 1
    assert not list_snapshots(root).damaged
    return step


def test_leftovers_are_left_alone_by_who_has_no_lock(
    tmp_path: Path, zygote: Zygote, count: Count
) -> None:
    writer = zygote.start(tmp_path, WORKERS.partition("next(iter")[0] + "print('held')\ninput()")
    with running(writer):
        assert writer.hear() == "held"
        before = sorted((tmp_path / "run").rglob("*"))
        assert [path for path in before if path.name.startswith(".partial-")]
        with pytest.raises(pysnap.BusyError):
            pysnap.Snapshotter(tmp_path / "run", values={"x": 1})
        with pytest.raises(pysnap.NotFoundError):
            pysnap.load(tmp_path / "run")
        assert sorted((tmp_path / "run").rglob("*")) == before
        count()


# Readers beside retention


# The calls of a reader between which the writer commits a snapshot and removes the one that is
# being read.
def opened(root: Path) -> Any:
    view = pysnap.open(root)
    try:
        return view["values/x"][:]
    except pysnap.NotFoundError:
        # It was there when it was opened.
        return None


READS: dict[str, Callable[[Path], Any]] = {
    "list": lambda root: [s.step for s in list_snapshots(root).snapshots],
    "load": lambda root: pysnap.load(root)["values"],
    "open": opened,
}
CALLS = [
    ("pysnap.storage", "list_directory"),
    ("pysnap.storage", "read_file"),
    ("pysnap._engine", "restore"),
]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", range(len(CALLS)), ids=[name for _, name in CALLS])
@pytest.mark.parametrize("read", READS)
def test_a_snapshot_that_is_removed_between_two_calls_of_a_reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: Count,
    read: str,
    call: int,
    moment: str,
) -> None:
    """At the first, the second, ... call, until the reader makes no more of them."""
    values = {"x": torch.zeros(2000)}
    root = tmp_path / "run"
    with pysnap.Snapshotter(root, values=values, keep=pysnap.Keep(last=1)) as snapshotter:
        snapshotter.save().wait()

        def advance() -> None:
            snapshotter.progress.step += 1
            values["x"] += 1
            snapshotter.save().wait()

        module, name = CALLS[call]
        original = getattr(__import__(module, fromlist=[name]), name)
        for turn in range(50):
            calls = 0
            inside = False

            def hooked(
                *arguments: Any, turn: int = turn, original: Any = original, **options: Any
            ) -> Any:
                nonlocal calls, inside
                now = not inside and calls == turn
                calls += not inside
                if now and moment == "before":
                    inside = True
                    advance()
                    inside = False
                result = original(*arguments, **options)
                if now and moment == "after":
                    inside = True
                    advance()
                    inside = False
                return result

            with monkeypatch.context() as patch:
                patch.setattr(f"{module}.{name}", hooked)
                seen = READS[read](root)
            if calls <= turn:
                break
            newest = snapshotter.progress.step
            if read == "list":
                assert set(seen) <= {newest, newest - 1}, seen
            else:
                x = seen["x"] if read == "load" else seen
                assert x is None or ((x == x[0]).all() and x[0] in (newest, newest - 1))
            count()
        assert turn < 49
