"""What the optimizer alone changes is copied while training goes on, and a snapshot is still the
state of one moment."""

from __future__ import annotations

import contextlib
import errno
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same
from torch import nn

import pysnap
from pysnap import _engine
from pysnap.capture import Capture, _Guard

WIDTH = 64  # a weight of 16 KiB, four chunks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots: most of the state can be copied only when chunks have been written."""
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "4KiB")
    monkeypatch.setenv("PYSNAP_HOST_MEMORY", "8KiB")


class Disk:
    """Writes nothing before `release`."""

    def __init__(self) -> None:
        self._released = threading.Event()
        self.release = self._released.set
        self.hold = self._released.clear
        self.release()

    def wait(self) -> None:
        assert self._released.wait(60)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    write = Capture.write

    def late(self: Capture, *args: Any, **options: Any) -> Any:
        disk.wait()
        return write(self, *args, **options)

    monkeypatch.setattr(Capture, "write", late)
    yield disk
    disk.release()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.linear(x)))
        return out


class Program:
    def __init__(self, path: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1)
        self.extra: dict[str, Any] = {}
        # Has its state before the first snapshot.
        self.train()
        self.snapshotter = pysnap.Snapshotter(
            path, model=self.net, optimizer=self.optimizer, **options
        )

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.net(torch.randn(8, WIDTH)).square().mean()
        return loss

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": {name: t.clone() for name, t in self.net.state_dict().items()},
            "optimizer": {
                f"{index}/{name}": value.clone()
                for index, values in self.optimizer.state_dict()["state"].items()
                for name, value in values.items()
            },
        }


def stored(path: Path) -> dict[str, Any]:
    state = pysnap.load(path)
    return {
        "model": dict(state["model"]),
        "optimizer": {
            f"{index}/{name}": value
            for index, values in state["optimizer"]["state"].items()
            for name, value in values.items()
        },
    }


def train_beside(program: Program, disk: Disk) -> dict[str, Any]:
    """A step at the end of which a snapshot is due, while the disk takes nothing; the state at its
    moment."""
    disk.hold()
    with program.snapshotter.step():
        program.train()
    return program.state()


def take(program: Program, disk: Disk) -> dict[str, Any]:
    """A snapshot that is due at the end of a step, and cannot be copied but for two chunks; the
    state at its moment."""
    state = train_beside(program, disk)
    newest = program.snapshotter._committer.newest
    assert newest is not None and not newest.wait_staged(0)
    return state


def releases_at_the_gate(program: Program, disk: Disk) -> list[str]:
    """Lets the disk write as soon as the training thread waits at the gate; what has happened."""
    events: list[str] = []
    gate = program.snapshotter._wait_at_gate

    def watched() -> None:
        events.append("gate")
        disk.release()
        gate()

    program.snapshotter._wait_at_gate = watched  # type: ignore[method-assign]  # watched there
    return events


# Exactness


def accumulated(program: Program) -> None:
    program.optimizer.zero_grad()
    for _ in range(3):
        program.loss().backward()
    program.optimizer.step()


def scaled(program: Program) -> None:
    """The scaler skips the first step after the snapshot, for its gradients are infinite."""
    for scale in (float("inf"), 2.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        program.optimizer.zero_grad(set_to_none=True)
        scaler.scale(program.loss()).backward()
        scaler.step(program.optimizer)


def with_closure(program: Program) -> None:
    def closure() -> torch.Tensor:
        program.optimizer.zero_grad()
        loss = program.loss()
        loss.backward()
        return loss

    program.optimizer.step(closure)  # type: ignore[arg-type]  # the stub says float


def in_backward(program: Program) -> None:
    """The optimizer steps as soon as the last gradient is there, inside backward()."""
    program.optimizer.zero_grad()
    first = program.net.linear.bias
    hook = first.register_post_accumulate_grad_hook(lambda _: program.optimizer.step())
    program.loss().backward()
    hook.remove()


def compiled(program: Program) -> None:
    """The forward and backward pass; the optimizer's step is torch's own."""
    program.optimizer.zero_grad(set_to_none=True)
    loss = torch.compile(program.loss, backend="eager")
    loss().backward()
    program.optimizer.step()


STEPS: dict[str, Callable[[Program], None]] = {
    "plain": Program.train,
    "accumulated gradients": accumulated,
    "gradient scaler": scaled,
    "closure": with_closure,
    "optimizer in backward": in_backward,
    "compiled": compiled,
}


@pytest.mark.parametrize("name", STEPS)
def test_the_optimizer_waits_until_everything_is_copied(
    tmp_path: Path, disk: Disk, name: str
) -> None:
    program = Program(tmp_path, every=1)
    expected = take(program, disk)
    events = releases_at_the_gate(program, disk)
    STEPS[name](program)
    assert events
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)
    assert program.snapshotter.stats().failed == 0


def test_what_forward_changes_is_copied_at_once(tmp_path: Path, disk: Disk) -> None:
    program = Program(tmp_path, every=1)
    expected = take(program, disk)
    program.loss()
    assert not torch.equal(program.net.norm.running_mean, expected["model"]["norm.running_mean"])
    disk.release()
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def test_the_state_that_an_optimizer_had_before_it_loaded_another_is_in_the_snapshot(
    tmp_path: Path, disk: Disk
) -> None:
    """It loads into new tensors, and the snapshot keeps the old ones until they are copied."""
    program = Program(tmp_path, every=1)
    other = Program(tmp_path / "other")
    other.train()
    expected = take(program, disk)
    program.optimizer.load_state_dict(other.optimizer.state_dict())
    disk.release()
    program.snapshotter.close()
    other.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def test_two_optimizers_that_step_at_different_times(tmp_path: Path, disk: Disk) -> None:
    program = Program(tmp_path / "unused")
    program.snapshotter.close()
    second = torch.optim.SGD(program.net.head.parameters(), lr=0.1)
    program.optimizer = torch.optim.AdamW(program.net.linear.parameters(), lr=0.1)
    program.train()
    program.snapshotter = pysnap.Snapshotter(
        tmp_path / "run", model=program.net, optimizer=program.optimizer, second=second, every=1
    )
    expected = take(program, disk)
    events = releases_at_the_gate(program, disk)
    second.step()
    assert events == ["gate"]
    program.train()
    program.snapshotter.close()
    assert_same(stored(tmp_path / "run"), expected)


def test_a_run_resumed_from_overlapped_snapshots_is_the_same(tmp_path: Path) -> None:
    whole = Program(tmp_path / "whole")
    for _ in range(6):
        with whole.snapshotter.step():
            whole.train()
    whole.snapshotter.close()

    first = Program(tmp_path / "cut", every=1)
    for _ in range(3):
        with first.snapshotter.step():
            first.train()
    first.snapshotter.close()
    second = Program(tmp_path / "cut")
    second.snapshotter.resume()
    for _ in range(3):
        with second.snapshotter.step():
            second.train()
    second.snapshotter.close()
    assert_same(second.state(), whole.state())


# A tensor that changes too early


def clamp(program: Program) -> None:
    with torch.no_grad():
        program.net.linear.weight.clamp_(-0.01, 0.01)


def load(program: Program) -> None:
    program.net.load_state_dict(Net().state_dict())


def element(program: Program) -> None:
    """Not one of the bytes that the engine notes: only the count of changes tells."""
    with torch.no_grad():
        program.net.linear.weight[5, 7] += 1


def unhooked(program: Program) -> None:
    torch.optim.SGD(program.net.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [clamp, element, load, unhooked])
def test_a_tensor_that_changes_too_early_fails_the_snapshot(
    tmp_path: Path,
    disk: Disk,
    change: Callable[[Program], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = Program(tmp_path, every=1, keep=pysnap.Keep(last=None))
    program.snapshotter.save().wait()
    take(program, disk)
    change(program)
    disk.release()
    program.snapshotter._committer.wait_idle()
    error = program.snapshotter._committer.newest.error  # type: ignore[union-attr]  # taken above
    assert isinstance(error, pysnap.TornError)
    assert "model/linear" in str(error) and "overlap=False" in str(error)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000"]

    # From now on everything is copied at once.
    disk.release()
    with program.snapshotter.step():
        program.train()
    expected = program.state()
    change(program)
    program.snapshotter.close()
    assert "overlap is off" in caplog.text
    assert_same(stored(tmp_path), expected)


def test_without_overlap_the_step_waits_for_the_copy(tmp_path: Path, disk: Disk) -> None:
    program = Program(tmp_path, every=1, overlap=False)
    with program.snapshotter.step():
        program.train()
    expected = program.state()
    clamp(program)
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def test_save_copies_at_once(tmp_path: Path) -> None:
    program = Program(tmp_path)
    expected = program.state()
    program.snapshotter.save()
    clamp(program)
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def test_the_end_of_an_epoch_is_copied_at_once(tmp_path: Path) -> None:
    """What follows it may be anything, such as averages of weights that are put in place."""
    program = Program(tmp_path, every="1 epoch")
    for _ in program.snapshotter.epochs(1):
        with program.snapshotter.step():
            program.train()
        expected = program.state()
    clamp(program)
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def data(program: Program) -> None:
    """As averages of weights are put in place for a validation; torch does not count it."""
    for parameter in program.net.parameters():
        parameter.data.zero_()


def test_weights_that_are_replaced_by_data_fail_the_snapshot(tmp_path: Path, disk: Disk) -> None:
    program = Program(tmp_path, every=1)
    take(program, disk)
    data(program)
    disk.release()
    newest = program.snapshotter._committer.newest
    assert newest is not None
    with pytest.raises(pysnap.TornError, match=r"(model|optimizer)/"):
        newest.wait(60)
    with contextlib.suppress(pysnap.TornError):
        program.snapshotter.close()
    assert not list(tmp_path.glob("step-*"))


def test_changes_are_looked_for_as_soon_as_everything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only when it is written: what changes meanwhile is behind the copy."""
    disk = threading.Event()

    class Slow:
        """A job whose writing waits for the disk."""

        def __init__(self, job: Any) -> None:
            self._job = job

        def __getattr__(self, name: str) -> Any:
            return getattr(self._job, name)

        def wait_written(self, timeout: float | None = None) -> bool:
            if timeout is None:
                assert disk.wait(60)
            return bool(self._job.wait_written(timeout))

    monkeypatch.setenv("PYSNAP_HOST_MEMORY", "8MiB")
    program = Program(tmp_path, every=1)
    begin = program.snapshotter._stager.begin

    def slow(*args: Any, **options: Any) -> Capture:
        capture = begin(*args, **options)
        capture._job = Slow(capture._job)  # type: ignore[assignment]  # the same job
        return capture

    program.snapshotter._stager.begin = slow  # type: ignore[method-assign]  # a slow disk
    with program.snapshotter.step():
        program.train()
    newest = program.snapshotter._committer.newest
    assert newest is not None and newest._capture is not None
    expected = program.state()
    deadline = time.monotonic() + 60
    # Not blocked: the look is taken between two instructions of this thread.
    while not newest._capture._guard.settled() and time.monotonic() < deadline:
        pass
    clamp(program)
    disk.set()
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def test_changes_are_looked_for_only_when_everything_is_copied(tmp_path: Path, disk: Disk) -> None:
    """A look that comes sooner would miss what changes between it and the copy."""
    program = Program(tmp_path, every=1)
    take(program, disk)
    newest = program.snapshotter._committer.newest
    assert newest is not None and newest._capture is not None
    guard, job, copied = newest._capture._guard, newest._capture._job, threading.Event()

    class Late:
        """A job that says later that everything is copied."""

        def __getattr__(self, name: str) -> Any:
            return getattr(job, name)

        def wait_staged(self, timeout: float | None = None) -> bool:
            assert copied.wait(60)
            return job.wait_staged(timeout)

    newest._capture._job = Late()  # type: ignore[assignment]  # the same job
    disk.release()
    deadline = time.monotonic() + 0.3
    while not guard.settled() and time.monotonic() < deadline:
        time.sleep(0.01)
    element(program)
    copied.set()
    with pytest.raises(pysnap.TornError):
        newest.wait(60)
    with contextlib.suppress(pysnap.TornError):
        program.snapshotter.close()


def test_what_changes_behind_the_copy_does_not_matter(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_HOST_MEMORY", "8MiB")
    program = Program(tmp_path, every=1)
    expected = train_beside(program, disk)
    newest = program.snapshotter._committer.newest
    assert newest is not None and newest.wait_staged(60)
    clamp(program)
    disk.release()
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def test_what_the_optimizer_changes_behind_the_gate_does_not_matter(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked by then whether a tensor changed."""
    monkeypatch.setenv("PYSNAP_HOST_MEMORY", "8MiB")
    program = Program(tmp_path, every=1)
    expected = train_beside(program, disk)
    program.train()
    disk.release()
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)
    assert program.snapshotter.stats().failed == 0


# Memory that goes away, optimizers of other kinds


def test_tensors_that_are_given_other_memory_are_read_where_they_were(
    tmp_path: Path, disk: Disk
) -> None:
    """The memory was given back while it was read: a crash."""
    program = Program(tmp_path, every=1)
    expected = take(program, disk)
    for state in program.optimizer.state.values():
        for value in state.values():
            value.data = torch.empty(0)
    disk.release()
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


def test_tensors_are_let_go_when_an_aborted_copy_has_ended(tmp_path: Path, disk: Disk) -> None:
    program = Program(tmp_path, every=1)
    take(program, disk)
    newest = program.snapshotter._committer.newest
    assert newest is not None and newest._capture is not None
    capture, job = newest._capture, newest._capture._job
    kept: list[bool] = []

    class Watched:
        """A job that notes whether tensors are kept until it has ended."""

        def __getattr__(self, name: str) -> Any:
            return getattr(job, name)

        def abort(self) -> None:
            job.abort()
            kept.append(bool(capture._keep))

    capture._job = Watched()  # type: ignore[assignment]  # the same job
    capture.abort()
    assert kept == [True] and not capture._keep
    disk.release()
    with pytest.raises(pysnap.Error, match="aborted"):
        program.snapshotter.close()


class Wrapper(torch.optim.Optimizer):
    """Around another optimizer, as libraries have them: no hooks of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def state(self) -> Any:
        return self.inner.state

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


def test_an_optimizer_without_hooks_is_copied_at_once(tmp_path: Path) -> None:
    program = Program(tmp_path / "unused")
    program.snapshotter.close()
    wrapper = Wrapper(torch.optim.AdamW(program.net.parameters(), lr=0.1, fused=True))
    program.optimizer = wrapper  # type: ignore[assignment]  # it is an Optimizer
    program.train()
    program.snapshotter = pysnap.Snapshotter(
        tmp_path / "run", model=program.net, optimizer=wrapper, every=1
    )
    with program.snapshotter.step():
        program.train()
    expected = program.state()
    program.train()
    program.snapshotter.close()
    assert_same(stored(tmp_path / "run"), expected)


def test_a_step_that_is_captured_in_a_graph_is_waited_for_and_copied_at_once_from_then_on(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What tells here that a graph is captured is ours: the machine may have no GPU. Replays call no
    # hooks and count no changes, as the changes through `data` here.
    program = Program(tmp_path, every=1, keep=pysnap.Keep(last=None))
    expected = [take(program, disk)]
    newest = program.snapshotter._committer.newest
    assert newest is not None and newest._capture is not None
    releases_at_the_gate(program, disk)
    job = newest._capture._job
    waits: list[threading.Thread] = []

    class Watched:
        """A job that notes who waits until it is staged: on a device the gate alone does not."""

        def __getattr__(self, name: str) -> Any:
            return getattr(job, name)

        def wait_staged(self, timeout: float | None = None) -> bool:
            if timeout is None:
                waits.append(threading.current_thread())
            return job.wait_staged(timeout)

    newest._capture._job = Watched()  # type: ignore[assignment]  # the same job
    monkeypatch.setattr("pysnap.gate.is_capturing", lambda: True)
    monkeypatch.setattr("pysnap.capture.is_capturing", lambda: True)
    program.train()
    assert threading.main_thread() in waits and newest.wait_staged(0)
    assert not program.snapshotter._gate.addresses()
    monkeypatch.undo()
    newest.wait()
    with program.snapshotter.step():
        program.train()
    expected.append(program.state())
    for parameter in program.net.parameters():
        parameter.data.fill_(7)
    program.snapshotter.close()
    for path, state in zip(sorted(tmp_path.glob("step-*")), expected, strict=True):
        assert_same(stored(path), state)


def test_an_optimizer_that_is_made_for_graphs_is_copied_at_once(tmp_path: Path) -> None:
    program = Program(tmp_path, every=1)
    program.optimizer.param_groups[0]["foreach"] = False
    assert program.snapshotter._gate.addresses()
    program.optimizer.param_groups[0]["capturable"] = True
    assert not program.snapshotter._gate.addresses()
    program.snapshotter.close()


def test_any_state_of_an_optimizer_is_looked_through(tmp_path: Path) -> None:
    program = Program(tmp_path, every=1)
    program.optimizer.state["own"] = 1
    with program.snapshotter.step():
        program.train()
    program.snapshotter.close()
    assert pysnap.load(tmp_path)["optimizer"]["state"]["own"] == 1


def test_an_array_that_shares_memory_with_a_weight_is_copied_at_once(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_HOST_MEMORY", "8MiB")
    disk.hold()
    net = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.ones_(net.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    parts = {"net": net, "weights": {"w": net.weight.detach().numpy()}, "optimizer": optimizer}
    with pysnap.Snapshotter(tmp_path, every=1, **parts) as snapshotter:
        with snapshotter.step():
            pass
        newest = snapshotter._committer.newest
        assert newest is not None and newest._capture is not None
        # Nothing is copied later, whose changes would have to be looked for.
        assert newest._capture._guard.settled() and newest.wait_staged(0)
        disk.release()
    assert (pysnap.load(tmp_path)["weights"]["w"] == 1).all()


def test_tensors_without_elements_are_nobodys(tmp_path: Path, disk: Disk) -> None:
    """All of them have the address 0."""
    program = Program(tmp_path / "unused")
    program.snapshotter.close()
    empty = nn.Parameter(torch.empty(0))
    program.optimizer.add_param_group({"params": [empty]})
    buffer = torch.empty(0)
    program.snapshotter = pysnap.Snapshotter(
        tmp_path / "run",
        model=program.net,
        optimizer=program.optimizer,
        values={"buffer": buffer},
        every=1,
    )
    take(program, disk)
    buffer.zero_()
    disk.release()
    program.snapshotter.close()
    assert program.snapshotter.stats().durable == 1


# Threads


@pytest.mark.parametrize("made_in", ["the main thread", "the other"])
def test_outside_the_main_thread_everything_is_copied_at_once(tmp_path: Path, made_in: str) -> None:
    """The committing thread waited for the main thread, which waited for the other one."""
    early = Program(tmp_path, every=1) if made_in == "the main thread" else None
    states: list[Any] = []

    def body() -> None:
        program = early or Program(tmp_path, every=1)
        with program.snapshotter.step():
            program.train()
        states.append(program.state())
        clamp(program)
        program.snapshotter.close()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert_same(stored(tmp_path), states[0])


def test_a_wait_ends_at_its_deadline(tmp_path: Path, disk: Disk) -> None:
    program = Program(tmp_path, every=1)
    take(program, disk)
    newest = program.snapshotter._committer.newest
    assert newest is not None
    with pytest.raises(TimeoutError):
        newest.wait(0.01)
    disk.release()
    program.snapshotter.close()


def test_a_snapshotter_that_its_own_commit_collects_still_commits(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Capture.write

    def collecting(self: Capture, *args: Any, **options: Any) -> Any:
        disk.wait()
        gc.collect()
        return write(self, *args, **options)

    monkeypatch.setattr(Capture, "write", collecting)
    program = Program(tmp_path, every=1)
    cycle: list[Any] = [program.snapshotter]
    cycle.append(cycle)
    gc.disable()
    try:
        disk.hold()
        with program.snapshotter.step():
            program.train()
        (worker,) = program.snapshotter._committer._threads._workers
        del cycle, program.snapshotter
        disk.release()
        # Not blocked for long: the committing thread waits for a look of this one.
        while any(thread.name.startswith("pysnap-") for thread in threading.enumerate()):
            worker.thread.join(0.01)
    finally:
        gc.enable()
    assert pysnap.load(tmp_path)["progress"]["step"] == 1


@pytest.mark.parametrize("overlap", [True, False])
def test_a_disk_that_takes_nothing_does_not_stop_training_for_ever(
    tmp_path: Path,
    disk: Disk,
    overlap: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A state larger than the staging memory waited for a frozen disk until it was thawed."""
    monkeypatch.setattr("pysnap.capture.DISK_SECONDS", 1.0)
    program = Program(tmp_path, every=1, overlap=overlap)
    disk.hold()
    for _ in range(3):
        with program.snapshotter.step():
            program.train()
    assert "given up" in caplog.text and program.snapshotter.stats().late == 1
    newest = program.snapshotter._committer.newest
    disk.release()
    assert newest is not None
    with pytest.raises(pysnap.StorageError, match="disk") as told:
        newest.wait(60)
    assert told.value.errno == errno.ETIMEDOUT

    expected = program.state()
    program.snapshotter.close()
    assert_same(stored(tmp_path), expected)


# Durable without another step


def test_it_becomes_durable_although_no_step_follows(tmp_path: Path) -> None:
    """As in a long validation: the training thread never comes to the gate."""
    program = Program(tmp_path, every=1)
    with program.snapshotter.step():
        program.train()
    expected = program.state()
    newest = program.snapshotter._committer.newest
    assert newest is not None
    deadline = time.monotonic() + 60
    while not newest.done() and time.monotonic() < deadline:
        pass
    assert_same(stored(tmp_path), expected)
    program.snapshotter.close()


def test_the_training_thread_may_wait_for_it(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked while it waits, it would not answer: there it runs no instruction.
    monkeypatch.setattr(_engine, "call_in_main_thread", lambda look: True)
    program = Program(tmp_path, every=1)
    take(program, disk)
    newest = program.snapshotter._committer.newest
    assert newest is not None
    disk.release()
    assert newest.wait(60).step == 1
    program.snapshotter.close()


END = """
import sys, threading
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_overlap import Program

program = Program(Path(sys.argv[1]), every=1)
with program.snapshotter.step():
    program.train()
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "1 / 0", "del program"])
def test_it_becomes_durable_however_the_program_ends(tmp_path: Path, end: str) -> None:
    code = END.format(tests=str(Path(__file__).parent), end=end)
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=tmp_path,
        check=False,
        timeout=120,
        stderr=subprocess.DEVNULL,
    )
    assert pysnap.load(tmp_path / "run")["progress"]["step"] == 1


def test_the_hooks_go_when_it_closes(tmp_path: Path) -> None:
    program = Program(tmp_path)
    assert program.optimizer._optimizer_step_pre_hooks
    program.snapshotter.close()
    assert not program.optimizer._optimizer_step_pre_hooks


def test_a_look_inside_a_look_does_not_wait_for_itself() -> None:
    """The main thread was made to look while it told the result of another look: a deadlock."""
    weight = torch.zeros(2)
    guard = _Guard([weight], lambda _: "w")
    tell = guard._settled.set

    def interrupted() -> None:
        with guard._settled._cond:  # type: ignore[attr-defined]  # where Event.set is interrupted
            guard.look()
        tell()

    guard._settled.set = interrupted  # type: ignore[method-assign]  # watched there
    guard.look()
    assert guard.settled()


def test_what_is_copied_at_once_may_be_larger_than_staging_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That copy waits for the disk: nothing that writes may wait for it."""
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "4KiB")
    net = torch.nn.Linear(100, 100)
    parts = {
        "net": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "values": {"x": torch.arange(100_000)},
    }
    with pysnap.Snapshotter(tmp_path, host_memory="8KiB", **parts) as snapshotter:
        snapshotter.save(overlap=True).wait()
    assert torch.equal(pysnap.load(tmp_path)["values"]["x"], torch.arange(100_000))


def test_where_little_is_copied_at_once_nothing_runs_beside_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = torch.nn.Linear(100, 100)
    parts = {"net": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}
    with pysnap.Snapshotter(tmp_path, **parts) as snapshotter:
        begun = threading.Event()
        begin = snapshotter._repository.begin
        waiting: list[bool] = []

        def noted() -> Path:
            begun.set()
            return begin()

        def copy(capture: Capture) -> None:
            # A thread that does not wait sets it at once; nothing depends on how long one that does
            # is watched.
            waiting.append(not begun.wait(0.1 if capture._is_short else 60))
            copies(capture)

        copies = Capture.copy
        monkeypatch.setattr(snapshotter._repository, "begin", noted)
        monkeypatch.setattr(Capture, "copy", copy)
        snapshotter.save(overlap=True).wait()
        begun.clear()
        snapshotter.save().wait()
    assert waiting == [True, False]
