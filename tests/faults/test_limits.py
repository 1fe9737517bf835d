"""Limits of the system: memory, threads, files, their lengths, pinned memory. What is refused
fails one snapshot and is told; training goes on, and the next one works when there is room again
(P6, P8)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import kernel
import pytest
from driving import temporary_directory
from programs import Zygote

HARNESS = "limits"

ROOT = Path(__file__).parent.parent.parent

# `trial(limit)` sets a limit, takes a snapshot that may fail, lifts the limit, and takes one that
# may not. Whatever happens, the newest durable one is whole.
TRIALS = """
import logging, os, resource, sys, threading
import torch, pysnap
logging.getLogger("pysnap").setLevel(logging.CRITICAL)

values = {"x": torch.randn(60_000), "y": torch.zeros(1)}

def make(**options):
    return pysnap.Snapshotter("run", values=values, keep=pysnap.Keep(last=2), **options)

def limited(kind, limit):
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (hard if limit is None else limit, hard))

def step(snapshotter):
    with snapshotter.step():
        values["y"] += 1
    # Not by a cadence, which waits after a failure.
    handle = snapshotter.save()
    snapshotter._committer.wait_idle()
    return handle.error

def check(step):
    state = pysnap.load("run")
    assert state["values"]["y"].item() == state["progress"]["step"] == step, state["progress"]
    assert torch.equal(state["values"]["x"], values["x"])

outcomes = []

def trial(snapshotter, kind, limit):
    limited(kind, limit)
    try:
        error = step(snapshotter)
    finally:
        limited(kind, None)
    outcomes.append(type(error).__name__)
    assert isinstance(error, (pysnap.Error, MemoryError, RuntimeError, type(None))), repr(error)
    error = step(snapshotter)
    assert error is None, repr(error)
    check(snapshotter.progress.step)
"""


def outcomes(text: str) -> set[str]:
    return set(text.split())


def test_every_number_of_open_files(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None]
) -> None:
    code = """
    snapshotter = make()
    used = len(os.listdir("/proc/self/fd")) - 1
    for more in range(int(sys.argv[1])):
        trial(snapshotter, resource.RLIMIT_NOFILE, used + more)
    snapshotter.close()
    print(*outcomes)
    """
    done = zygote.run(tmp_path, TRIALS + dedent(code), 8)
    assert done.status == 0, done.err
    assert outcomes(done.out) == {"StorageError", "NoneType"}
    count(8)


def test_every_length_of_files(tmp_path: Path, zygote: Zygote, count: Callable[..., None]) -> None:
    code = """
    snapshotter = make(codec="none")
    for pages in range(64):
        trial(snapshotter, resource.RLIMIT_FSIZE, pages * 4096 + 100)
    snapshotter.close()
    print(*outcomes)
    """
    done = zygote.run(tmp_path, TRIALS + dedent(code))
    assert done.status == 0, done.err
    assert outcomes(done.out) == {"StorageError", "NoneType"}
    count(64)


def test_every_amount_of_memory(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None], full: bool
) -> None:
    """Each with an engine that has no staging memory yet, and none for its encoders."""
    trials, spacing = (700, 64 << 10) if full else (44, 1 << 20)
    code = """
    def used():
        return int(open("/proc/self/statm").read().split()[0]) * 4096
    for number in range(int(sys.argv[1])):
        snapshotter = make(workers=1)
        snapshotter.progress.step = int(values["y"])
        trial(snapshotter, resource.RLIMIT_AS, used() + number * int(sys.argv[2]))
        snapshotter.close()
    print(*outcomes)
    """
    staging = {"PYSNAP_CHUNK_SIZE": "64KiB", "PYSNAP_HOST_MEMORY": "256KiB"}
    done = zygote.run(tmp_path, TRIALS + dedent(code), trials, spacing, **staging)
    assert done.status == 0, done.err
    assert "NoneType" in outcomes(done.out) and len(outcomes(done.out)) > 1, done.out
    count(trials)


def test_a_memory_cgroup_bounds_the_staging_memory(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None]
) -> None:
    """A copy of the state is more than what the group may have beside it."""
    code = """
    input()
    values["x"] = torch.ones(60 << 20)
    snapshotter = make()
    for _ in range(3):
        assert step(snapshotter) is None
    assert pysnap.open("run")["values/y"][0].item() == 3
    snapshotter.close()
    """
    with kernel.cgroup("memory", memory__limit_in_bytes=str(400 << 20)) as group:
        program = zygote.start(tmp_path, TRIALS + dedent(code), PYSNAP_CODEC="none")
        try:
            (group / "cgroup.procs").write_text(str(program.pid))
            program.tell()
            done = program.wait()
        finally:
            program.close()
    assert done.status == 0, done.err
    count()


THREADS = """
def attempt(more, limit):
    # While it is made, and then for the thread that commits.
    limit(more)
    try:
        snapshotter = make(workers=2)
    except pysnap.StorageError as error:
        assert "thread" in str(error), error
        outcomes.append("refused")
        return
    finally:
        limit(None)
    limit(0)
    error = step(snapshotter)
    limit(None)
    assert isinstance(error, RuntimeError), repr(error)
    assert step(snapshotter) is None
    check(snapshotter.progress.step)
    snapshotter.close()
    values["y"].zero_()
    import shutil; shutil.rmtree("run")
    outcomes.append("made")
"""


def test_every_number_of_threads(zygote: Zygote, count: Callable[..., None]) -> None:
    """For a user that is not root, whom no cgroup is needed for."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user who has no other threads")
    code = """
    user = 61_234
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    def limit(more):
        threads = len(os.listdir("/proc/self/task"))
        limited(resource.RLIMIT_NPROC, None if more is None else threads + more)
    for more in range(12):
        attempt(more, limit)
    print(*outcomes)
    """
    # Not tmp_path, which lies in a folder that is root's alone.
    with temporary_directory() as folder:
        folder.chmod(0o777)
        done = zygote.run(folder, TRIALS + THREADS + dedent(code))
    assert done.status == 0, done.err
    assert outcomes(done.out) == {"refused", "made"}, done.out
    count(12)


def test_every_number_of_threads_in_a_group(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None]
) -> None:
    code = """
    group = sys.argv[1]
    def limit(more):
        threads = len(os.listdir("/proc/self/task"))
        open(f"{group}/pids.max", "w").write("max" if more is None else str(threads + more))
    input()
    for more in range(12):
        attempt(more, limit)
    print(*outcomes)
    """
    with kernel.cgroup("pids") as group:
        program = zygote.start(tmp_path, TRIALS + THREADS + dedent(code), group)
        try:
            (group / "cgroup.procs").write_text(str(program.pid))
            program.tell()
            done = program.wait()
        finally:
            program.close()
    assert done.status == 0, done.err
    assert outcomes(done.out) == {"refused", "made"}, done.out
    count(12)
