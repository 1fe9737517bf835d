"""A program ends in every way at every stage of a snapshot: what is durable stays so, nothing
hangs, and the repository is whole (P1, P2, P7)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import Zygote
from support import assert_same

import pysnap
from pysnap.repository import list_snapshots

HARNESS = "endings"

# In the order in which a snapshot passes them. The first two are the training thread's.
STAGES = ["state_dict", "copy", "write", "manifest", "rename", "published", "on_durable"]
GRACEFUL = {
    "end": 0,
    "sys.exit": 3,
    "exception": 1,
    "ctrl-c": -signal.SIGINT,
}
ABRUPT = {
    "os._exit": 5,
    "terminate": -signal.SIGTERM,
    "abort": -signal.SIGABRT,
    "segfault": -signal.SIGSEGV,
    "kill": -signal.SIGKILL,
}

# The first snapshot is durable; the second one meets the ending at its stage. Of the endings that
# let the interpreter end, the committing thread goes on when the main thread has ended.
PROGRAM = """
import faulthandler, os, signal, sys, threading
import torch, pysnap
from pysnap import capture, repository, storage

root, stage, ending, graceful = sys.argv[1:]
main = threading.main_thread()
reached, held = threading.Event(), threading.Event()

def end():
    if ending == "sys.exit":
        sys.exit(3)
    if ending == "exception":
        raise RuntimeError("mine")
    if ending == "os._exit":
        os._exit(5)
    faulthandler.disable()
    signals = {"ctrl-c": signal.SIGINT, "terminate": signal.SIGTERM, "abort": signal.SIGABRT,
               "segfault": signal.SIGSEGV, "kill": signal.SIGKILL}
    if ending in signals:
        os.kill(os.getpid(), signals[ending])

def arrive(at):
    if at == stage and armed:
        reached.set()
        main.join() if graceful == "True" else threading.Event().wait()

def before(module, name, at, when=lambda *_: True):
    call = getattr(module, name)
    def hooked(*arguments, **options):
        if when(*arguments):
            arrive(at)
        return call(*arguments, **options)
    setattr(module, name, hooked)

def after(module, name, at):
    call = getattr(module, name)
    def hooked(*arguments, **options):
        result = call(*arguments, **options)
        arrive(at)
        return result
    setattr(module, name, hooked)

after(capture._Guard, "settle", "write")
before(storage, "write_file", "manifest", lambda path, _: path.name == "manifest.json")
before(storage, "rename", "rename")
after(storage, "rename", "published")

class Part:
    def state_dict(self):
        if armed and stage == "state_dict":
            end()
        return {"a": 1}
    def load_state_dict(self, state): ...

armed = False
model = torch.nn.Linear(64, 64)
values = {"x": torch.arange(50_000)}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
snapshotter = pysnap.Snapshotter(
    root, part=Part(), model=model, values=values, optimizer=optimizer, every=1,
    on_durable=lambda _: arrive("on_durable"))
with snapshotter.step():
    pass
snapshotter._committer.wait_idle()

armed = True
values["x"] += 1
if stage == "copy":
    # Nothing is written, so that the capture waits for a slot when the signal comes.
    begin, copy = snapshotter._repository.begin, capture.Capture.copy
    copying = threading.Event()
    def copied(self):
        copying.set()
        copy(self)
    capture.Capture.copy = copied
    def stuck():
        copying.wait()
        signal.pthread_kill(main.ident, signal.SIGUSR1)
        held.wait()
        return begin()
    snapshotter._repository.begin = stuck
    def handler(*_):
        held.set()
        end()
    signal.signal(signal.SIGUSR1, handler)
with snapshotter.step():
    pass
# Not blocked for long: the committing thread waits for a look of this one.
while not reached.wait(0.001):
    pass
end()
"""


def cases() -> list[tuple[str, str]]:
    every = [(stage, ending) for stage in STAGES for ending in (*GRACEFUL, *ABRUPT)]
    # Inside a call of pysnap a program cannot come to its end.
    return [case for case in every if case[1] != "end" or case[0] not in STAGES[:2]]


@pytest.mark.parametrize(("stage", "ending"), cases())
def test_a_program_ends(
    tmp_path: Path, zygote: Zygote, count: Callable[..., None], stage: str, ending: str
) -> None:
    graceful = ending in GRACEFUL
    done = zygote.run(
        tmp_path,
        PROGRAM,
        tmp_path / "run",
        stage,
        ending,
        graceful,
        PYSNAP_CHUNK_SIZE="4KiB",
        PYSNAP_HOST_MEMORY="16KiB",
        # Without it, SIGTERM is no abrupt end (tests/test_preemption.py).
        PYSNAP_PREEMPTION="off",
    )
    assert done.status == (GRACEFUL | ABRUPT)[ending], done.err
    published = STAGES.index(stage) >= STAGES.index("write" if graceful else "published")
    newest = 2 if published else 1

    # The lock is free, and the next writer goes on.
    values = {"x": torch.zeros(50_000, dtype=torch.int64)}
    with pysnap.Snapshotter(tmp_path / "run", values=values, every=1) as snapshotter:
        snapshotter.resume(only=["values", "progress"])
        assert snapshotter.progress.step == newest
        assert_same(values["x"], torch.arange(50_000) + newest - 1)
        with snapshotter.step():
            pass
    steps = [snapshot.step for snapshot in list_snapshots(tmp_path / "run").snapshots]
    assert steps == list(range(newest + 1, 0, -1))
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith((".p-", ".t"))]
    count()
