"""Disks that are frozen, slow, full, read-only or gone: training goes on, waits end at their bound,
errors name the path, and the next snapshot works when the disk does (P6, P7, P8)."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import kernel
import pytest
from programs import Zygote

from pysnap.repository import list_snapshots

HARNESS = "disks"

# A state that fits into the staging memory: no step waits for the disk.
FROZEN = """
import sys, torch, pysnap
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
def train():
    optimizer.zero_grad()
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
train()
snapshotter = pysnap.Snapshotter("disk/run", model=model, optimizer=optimizer, every=1)
print("ready")
input()
for _ in range(20):
    with snapshotter.step():
        train()
handle = snapshotter._committer.newest
assert handle.wait_staged(60) and not handle.done()
try:
    handle.wait(0.01)
except TimeoutError as error:
    print(error)
print(snapshotter.stats().late)
{end}
"""


@pytest.mark.parametrize("end", ["snapshotter.close()", "", "sys.exit(0)"])
def test_training_goes_on_beside_a_frozen_disk(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None], end: str
) -> None:
    with (
        kernel.ext4(tmp_path) as disk,
        contextlib.closing(zygote.start(tmp_path, FROZEN.format(end=end))) as program,
    ):
        assert program.hear() == "ready"
        kernel.freeze(disk)
        program.tell()
        assert program.hear() == "the snapshot of step 1 is not durable after 0.01 s"
        assert program.hear() == "1"
        assert kernel.is_stuck(program.pid)
        kernel.thaw(disk)
        done = program.wait()
        assert done.status == 0, done.err
        # close() takes the one that was due while the disk was frozen.
        steps = [snapshot.step for snapshot in list_snapshots(disk / "run").snapshots]
        assert steps == ([20, 1] if "close" in end else [1])
        count()


def test_sigkill_of_a_process_on_a_frozen_disk_waits_for_the_kernel(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None]
) -> None:
    with (
        kernel.ext4(tmp_path) as disk,
        contextlib.closing(zygote.start(tmp_path, FROZEN.format(end="input()"))) as program,
    ):
        program.hear()
        kernel.freeze(disk)
        program.tell()
        program.hear()
        program.hear()
        program.signal(signal.SIGKILL)
        assert kernel.is_stuck(program.pid)
        kernel.thaw(disk)
        assert program.wait().status == -signal.SIGKILL
        assert len(list_snapshots(disk / "run").snapshots) <= 1
        count()


# A state that is larger: a step waits, until the snapshot is given up.
LARGE = """
import logging, torch, pysnap
from pysnap import capture
logging.basicConfig()
capture.DISK_SECONDS = float({seconds})
values = {{"x": torch.randn(400_000)}}
snapshotter = pysnap.Snapshotter("disk/run", values=values, every=1, codec="none")
print("ready")
input()
for _ in range(3):
    with snapshotter.step():
        values["x"] += 1
print("stepped")
{end}
"""
SMALL_STAGING = {"PYSNAP_CHUNK_SIZE": "64KiB", "PYSNAP_HOST_MEMORY": "128KiB"}


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_step_that_waits_for_a_frozen_disk_goes_on(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None], overlap: str
) -> None:
    end = """
input()
try:
    snapshotter._committer.newest.wait()
except pysnap.StorageError as error:
    print(error.errno, snapshotter.stats().late)
snapshotter.close()
"""
    code = LARGE.format(seconds=1, end=end)
    with (
        kernel.ext4(tmp_path) as disk,
        contextlib.closing(
            zygote.start(tmp_path, code, **SMALL_STAGING, PYSNAP_OVERLAP=overlap)
        ) as program,
    ):
        program.hear()
        kernel.freeze(disk)
        program.tell()
        assert program.hear() == "stepped"
        assert kernel.is_stuck(program.pid)
        kernel.thaw(disk)
        program.tell()
        assert program.hear() == f"{errno.ETIMEDOUT} 1"
        done = program.wait()
        assert done.status == 0 and "given up" in done.err, done.err
        assert [snapshot.step for snapshot in list_snapshots(disk / "run").snapshots] == [3]
        count()


def test_a_slow_disk_is_waited_for_as_long_as_it_moves(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None]
) -> None:
    """1.6 MB at 512 KiB/s take longer than the bound of a wait in which nothing moves."""
    with kernel.ext4(tmp_path) as disk:
        device = os.stat(disk).st_dev
        limit = f"{os.major(device)}:{os.minor(device)} {512 << 10}"
        code = LARGE.format(seconds=2, end="snapshotter.close()")
        with (
            kernel.cgroup("blkio", blkio__throttle__write_bps_device=limit) as group,
            contextlib.closing(zygote.start(tmp_path, code, **SMALL_STAGING)) as program,
        ):
            program.hear()
            (group / "cgroup.procs").write_text(str(program.pid))
            program.tell()
            done = program.wait()
        assert done.status == 0, done.err
        assert "given up" not in done.err
        assert list_snapshots(disk / "run").snapshots[0].step == 3
        count()


# One file system in memory, filled to the last page or the last file but `left`.
FULL = """
import os, sys, torch, pysnap
import kernel
kernel.private_mounts()
kernel.mount_tmpfs("disk", "size=1m,nr_inodes=60")
values = {"x": torch.zeros(6000), "y": torch.zeros(1)}
snapshotter = pysnap.Snapshotter("disk/run", values=values, keep=pysnap.Keep(last=1), codec="none")
snapshotter.save().wait()
what, before = sys.argv[1], 0.0

def fill(left):
    if what == "files":
        for number in range(os.statvfs("disk").f_ffree - left):
            open(f"disk/filler-{number}", "w").close()
    else:
        free = os.statvfs("disk").f_bavail - left
        with open("disk/filler-0", "wb") as file:
            file.write(bytes(4096 * free))

outcomes = set()
for left in range(int(sys.argv[2])):
    fill(left)
    snapshotter.progress.step += 1
    values["y"] += 1
    try:
        snapshotter.save().wait()
        outcomes.add("durable")
        before += 1
    except pysnap.StorageError as error:
        assert error.errno == 28 and "disk/run" in str(error), error
        values["y"] -= 1
        outcomes.add("refused")
    assert pysnap.load("disk/run")["values"]["y"].item() == before
    leftovers = [name for name in os.listdir("disk/run") if name.startswith((".p", ".t"))]
    assert leftovers == [".pysnap"], leftovers
    for name in os.listdir("disk"):
        if name.startswith("filler"):
            os.unlink(f"disk/{name}")
snapshotter.save().wait()
snapshotter.close()
print(sorted(outcomes))
"""


@pytest.mark.parametrize(("what", "trials"), [("pages", 16), ("files", 6)])
def test_every_place_at_which_the_disk_is_full(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None], what: str, trials: int
) -> None:
    kernel.need_user_namespaces()
    done = zygote.run(tmp_path, FULL, what, trials)
    assert (done.status, done.out) == (0, "['durable', 'refused']\n"), done.err
    count(trials)


# What is done to the repository while a snapshot of it is in flight, and undone afterwards.
LOST = """
import os, shutil, subprocess, sys, threading, torch, pysnap
import kernel
from pysnap import capture
kernel.private_mounts()
os.makedirs("disk")
kernel.mount_tmpfs("disk", "size=8m")
how, stage = sys.argv[1:]
values = {"x": torch.zeros(1000), "y": torch.zeros(1)}
snapshotter = pysnap.Snapshotter("disk/run", values=values)
root = os.path.abspath("disk/run")

def lose():
    if how == "removed":
        shutil.rmtree("disk/run")
    elif how == "moved":
        os.rename("disk/run", "disk/away")
    elif how == "replaced":
        os.rename("disk/run", "disk/away")
        pysnap.Snapshotter("disk/run", values={"other": 1}).close()
    elif how == "unmounted":
        kernel.unmount("disk")
    else:
        kernel.mount_tmpfs("disk", "size=1m")

def put_back():
    if how == "replaced":
        shutil.rmtree("disk/run")
    if how in ("moved", "replaced"):
        os.rename("disk/away", "disk/run")
    elif how == "covered":
        kernel.unmount("disk")
    return how not in ("removed", "unmounted")

def step():
    with snapshotter.step():
        values["y"] += 1
    handle = snapshotter.save()
    snapshotter._committer.wait_idle()
    return handle.error

assert step() is None
staged, go = threading.Event(), threading.Event()
call = {"begin": "begin", "commit": "commit"}[stage]
original = getattr(snapshotter._repository, call)
def held(*arguments):
    staged.set()
    go.wait()
    return original(*arguments)
setattr(snapshotter._repository, call, held)
with snapshotter.step():
    values["y"] += 1
snapshotter.save()
staged.wait()
lose()
go.set()
snapshotter._committer.wait_idle()
setattr(snapshotter._repository, call, original)
for error in (snapshotter._committer.newest.error, step()):
    assert isinstance(error, pysnap.StorageError), repr(error)
    assert root in str(error), error
found = sorted(name for name in os.listdir("disk/run") if name != "latest") \\
    if os.path.isdir("disk/run") else []
others = [".pysnap", ".writer", "events.jsonl"]
assert found == (others if how == "replaced" else []), found
if put_back():
    assert step() is None
    assert pysnap.load("disk/run")["values"]["y"].item() == 4
    snapshotter.close()
else:
    try:
        snapshotter.close()
    except pysnap.StorageError:
        pass
print("kept")
"""
WAYS = ["removed", "moved", "replaced", "unmounted", "covered"]


@pytest.mark.parametrize("stage", ["begin", "commit"])
@pytest.mark.parametrize("how", WAYS)
def test_a_repository_that_is_lost_under_a_snapshot(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None], how: str, stage: str
) -> None:
    kernel.need_user_namespaces()
    done = zygote.run(tmp_path, LOST, how, stage)
    assert (done.status, done.out) == (0, "kept\n"), done.out + done.err
    count()


REFUSED = """
import os, torch, pysnap
snapshotter = pysnap.Snapshotter("disk/run", values={"x": torch.zeros(1000)})
def step():
    with snapshotter.step():
        pass
    # Not by a cadence, which waits after a failure.
    handle = snapshotter.save()
    snapshotter._committer.wait_idle()
    error = handle.error
    if error is None:
        print("durable")
    else:
        print(error.errno, os.path.abspath("disk/run") in str(error))
while True:
    step()
    if input() == "end":
        break
try:
    snapshotter.close()
except pysnap.StorageError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("how", ["immutable", "read-only"])
def test_a_disk_that_takes_no_more_files(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None], how: str
) -> None:
    number = errno.EPERM if how == "immutable" else errno.EROFS
    with (
        kernel.ext4(tmp_path) as disk,
        contextlib.closing(zygote.start(tmp_path, REFUSED)) as program,
    ):
        assert program.hear() == "durable"
        if how == "immutable":
            kernel.make_immutable(disk / "run", True)
        else:
            kernel.make_read_only(disk)
        program.tell()
        assert program.hear() == f"{number} True"
        if how == "immutable":
            kernel.make_immutable(disk / "run", False)
            program.tell()
            assert program.hear() == "durable"
        program.tell("end")
        done = program.wait()
        assert done.status == 0, done.err
        if how == "read-only":
            assert done.out.splitlines()[-1] == str(number)
        steps = [snapshot.step for snapshot in list_snapshots(disk / "run").snapshots]
        assert steps == ([3, 1] if how == "immutable" else [1])
        count()
