"""A signal that asks the run to end: no finished step is lost, whenever it comes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pysnap
from pysnap import preemption
from pysnap.errors import StorageError
from pysnap.events import read_events

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    # A DataLoader with workers leaves a handler of SIGCHLD.
    numbers = signal.valid_signals() - {signal.SIGCHLD}
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    assert {number: signal.getsignal(number) for number in numbers} == before


class Clock:
    """Time that passes when a test says so; sleeping passes it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(preemption, "time", clock)
    return clock


def send(number: signal.Signals = signal.SIGTERM) -> None:
    """The handler has run when it returns."""
    os.kill(os.getpid(), number)


class Part:
    """Counts steps, and calls back where pysnap reads or puts it back."""

    def __init__(self) -> None:
        self.steps = 0
        self.on_read: Callable[[], None] = lambda: None
        self.on_put: Callable[[], None] = lambda: None

    def state_dict(self) -> dict[str, int]:
        call, self.on_read = self.on_read, lambda: None
        call()
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.on_put()
        self.steps = state["steps"]


def steps(snapshotter: pysnap.Snapshotter, part: Part, count: int) -> None:
    for _ in range(count):
        with snapshotter.step():
            part.steps += 1


def stored(path: Path) -> int:
    """The steps that are in the newest snapshot, which agree with its number."""
    state = pysnap.load(path)
    assert state["part"]["steps"] == state["progress"]["step"]
    return int(state["part"]["steps"])


def kinds(path: Path) -> list[str]:
    return [event["event"] for event in read_events(path)]


# Twenty signals


def test_twenty_signals_at_random_moments_lose_no_finished_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "preemption_run.py"), str(tmp_path), "1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    whole, attempts = found["whole"], found["attempts"]
    last = 0
    for attempt in attempts[:-1]:
        assert attempt["start"] == [str(last)]
        last = int(attempt["preempted"][0])
        assert attempt["preempted"][1] == "SIGTERM" and attempt["status"] == 143
    assert attempts[-1]["status"] == 0 and len(attempts) == 21
    # Every step once, with the loss of the run that got no signal, and in the end its state.
    assert [step for attempt in attempts for step in attempt["steps"]] == whole["steps"]
    assert attempts[-1]["end"] == whole["end"]


# Where it comes


def in_a_step(s: pysnap.Snapshotter, part: Part) -> None:
    with s.step():
        send()
        part.steps += 1


def in_the_copy(s: pysnap.Snapshotter, part: Part) -> None:
    part.on_read = send
    steps(s, part, 1)  # the third, at which a snapshot is due


def behind_a_step(s: pysnap.Snapshotter, part: Part) -> None:
    send()  # a batch may have been fetched: the next step is done, too
    steps(s, part, 1)


def in_a_save(s: pysnap.Snapshotter, part: Part) -> None:
    part.on_read = send
    s.save()  # of the second step: there is nothing left to do
    steps(s, part, 1)


def in_a_validation(s: pysnap.Snapshotter, part: Part) -> None:
    for _ in s.epochs(2):
        send()
        s.report(loss=1.0)


def in_a_loop_over_steps(s: pysnap.Snapshotter, part: Part) -> None:
    for _ in s.steps(100):
        send()


def in_a_loop_over_batches(s: pysnap.Snapshotter, part: Part) -> None:
    for _ in s.steps(100, [1, 2, 3]):
        send()


def at_close(s: pysnap.Snapshotter, part: Part) -> None:
    send()
    s.close()


@pytest.mark.parametrize(
    ("happens", "expected"),
    [
        (in_a_step, 3),
        (in_the_copy, 3),
        (behind_a_step, 3),
        (in_a_save, 2),
        (in_a_validation, 2),
        (in_a_loop_over_steps, 2),
        (in_a_loop_over_batches, 2),
        (at_close, 2),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_last_finished_step_is_durable_wherever_it_comes(
    tmp_path: Path, happens: Callable[[pysnap.Snapshotter, Part], None], expected: int
) -> None:
    part = Part()
    with (
        pytest.raises(pysnap.Preempted) as end,
        pysnap.Snapshotter(tmp_path, part=part, every="3 steps") as snapshotter,
    ):
        steps(snapshotter, part, 2)
        happens(snapshotter, part)
        steps(snapshotter, part, 10)
    assert part.steps == expected == end.value.step == stored(tmp_path)
    assert end.value.code == 143 and end.value.signal is signal.SIGTERM
    events = kinds(tmp_path)
    assert events[-1] == "closed" and events.count("preempted") == 1
    told = [event for event in read_events(tmp_path) if event["event"] == "preempted"]
    assert told[0]["signal"] == "SIGTERM" and told[0]["step"] == expected


def test_the_end_of_the_block_is_an_end_too(tmp_path: Path) -> None:
    part = Part()
    with (
        pytest.raises(pysnap.Preempted),
        pysnap.Snapshotter(tmp_path, part=part) as snapshotter,
    ):
        steps(snapshotter, part, 2)
        send()
    assert stored(tmp_path) == 2


def test_the_programs_own_exception_is_the_one_that_is_raised(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="mine"),
        pysnap.Snapshotter(tmp_path, part=Part()),
    ):
        send()
        raise ValueError("mine")


@pytest.mark.parametrize("where", ["before", "in", "behind"])
def test_a_signal_around_resume_ends_before_the_next_step(tmp_path: Path, where: str) -> None:
    part = Part()
    with pysnap.Snapshotter(tmp_path, part=part) as snapshotter:
        steps(snapshotter, part, 5)
        snapshotter.save()
    again = Part()
    with (
        pytest.raises(pysnap.Preempted),
        pysnap.Snapshotter(tmp_path, part=again, every="1 step") as snapshotter,
    ):
        if where == "before":
            send()
        if where == "in":
            again.on_put = send
        snapshotter.resume()
        if where == "behind":
            send()
        steps(snapshotter, again, 1)
    assert again.steps == 5 == stored(tmp_path)
    assert snapshotter.stats().durable == 0


def test_a_signal_before_the_first_step_leaves_nothing_to_save(tmp_path: Path) -> None:
    part = Part()
    with (
        pytest.raises(pysnap.Preempted) as end,
        pysnap.Snapshotter(tmp_path, part=part) as snapshotter,
    ):
        send(signal.SIGUSR1)
        steps(snapshotter, part, 1)
    assert part.steps == 0 and snapshotter.stats().durable == 0 and end.value.code == 138


def test_a_step_that_an_exception_left_half_done_is_not_saved(tmp_path: Path) -> None:
    part = Part()
    with (
        pytest.raises(ValueError, match="mine"),
        pysnap.Snapshotter(tmp_path, part=part) as snapshotter,
        snapshotter.step(),
    ):
        send()
        part.steps = -1
        raise ValueError("mine")
    assert snapshotter.stats().durable == 0


def test_an_epoch_boundary_is_exact(tmp_path: Path) -> None:
    """Behind a validation, its epoch is over: it does not run again."""
    part, validated = Part(), []
    for attempt in range(2):
        with pysnap.Snapshotter(tmp_path, part=part) as snapshotter:
            snapshotter.resume()
            try:
                for epoch in snapshotter.epochs(3):
                    steps(snapshotter, part, 2)
                    if attempt == 0 and epoch == 1:
                        send()
                    validated.append(epoch)
            except pysnap.Preempted:
                pass
    # The signal came before validation: that step 4 was saved is known only behind it.
    assert validated == [0, 1, 2] and part.steps == 6


# In time


def hold(snapshotter: pysnap.Snapshotter) -> threading.Event:
    """Nothing is committed before the event is set."""
    release = threading.Event()
    commit = snapshotter._committer._commit

    def slow(*arguments: Any) -> Any:
        release.wait()
        return commit(*arguments)

    snapshotter._committer._commit = slow  # type: ignore[method-assign]  # a slow disk
    return release


def took(snapshotter: pysnap.Snapshotter, seconds: float) -> None:
    """What the last snapshot took until it was durable."""
    from dataclasses import replace

    stats = snapshotter._committer._stats
    assert stats.last is not None
    stats.last = replace(stats.last, durable_seconds=seconds)


def test_what_is_in_flight_is_finished_and_another_is_taken_if_it_fits(
    tmp_path: Path, clock: Clock
) -> None:
    part = Part()
    snapshotter = pysnap.Snapshotter(tmp_path, part=part, grace=30)
    steps(snapshotter, part, 1)
    snapshotter.save().wait()
    took(snapshotter, 10.0)
    release = hold(snapshotter)
    steps(snapshotter, part, 1)
    snapshotter.save()
    threading.Timer(0.05, release.set).start()
    with pytest.raises(pysnap.Preempted), snapshotter.step():
        part.steps += 1
        send()
        clock.now += 19
    assert stored(tmp_path) == 3
    snapshotter.close()


@pytest.mark.parametrize("grace", [30, "30s", None])
def test_only_what_is_in_flight_is_finished_if_no_more_fits(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, grace: Any
) -> None:
    part = Part()
    snapshotter = pysnap.Snapshotter(tmp_path, part=part, grace=grace)
    release = hold(snapshotter)
    steps(snapshotter, part, 1)
    newest = snapshotter.save()
    describe = snapshotter._committer._describe

    def slow(*arguments: Any) -> Any:
        info = describe(*arguments)
        took(snapshotter, 10.0)
        return info

    snapshotter._committer._describe = slow  # type: ignore[method-assign]  # a slow disk
    threading.Timer(0.05, release.set).start()
    with pytest.raises(pysnap.Preempted), snapshotter.step():
        part.steps += 1
        send()
        clock.now += 21
    assert newest.durable() and stored(tmp_path) == 1
    assert "9.0 s are left of the grace of 30 s, and a snapshot takes 10.0 s" in caplog.text
    assert "are lost" in caplog.text and "PYSNAP_GRACE" in caplog.text
    # The rest of the program is not held up either.
    snapshotter.close()
    assert stored(tmp_path) == 1


def test_with_nothing_in_flight_one_is_begun_however_little_time_is_left(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be lost by it: whole or absent."""
    part = Part()
    snapshotter = pysnap.Snapshotter(tmp_path, part=part, grace=30)
    steps(snapshotter, part, 1)
    snapshotter.save().wait()
    took(snapshotter, 45.0)
    with pytest.raises(pysnap.Preempted), snapshotter.step():
        part.steps += 1
        send()
    assert "30.0 s are left of the grace of 30 s, and a snapshot takes 45.0 s" in caplog.text
    assert "lost" not in caplog.text
    snapshotter.close()
    assert stored(tmp_path) == 2


def test_the_wait_ends_with_the_grace_and_the_snapshot_goes_on(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    part = Part()
    snapshotter = pysnap.Snapshotter(tmp_path, part=part, grace=5)
    release = hold(snapshotter)
    with pytest.raises(pysnap.Preempted), snapshotter.step():
        part.steps += 1
        send()
        clock.now += 5
    assert "not durable at the end of the grace of 5 s" in caplog.text
    release.set()
    snapshotter.close()
    assert stored(tmp_path) == 1


def test_a_snapshot_that_takes_longer_than_the_grace_is_told_once_ahead_of_any_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYSNAP_GRACE", "0.000001s")
    for options in ({}, {"preemption": "off"}):
        caplog.clear()
        with pysnap.Snapshotter(tmp_path, part=Part(), **options) as snapshotter:  # type: ignore[arg-type]
            for _ in range(2):
                snapshotter.save().wait()
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == (0 if options else 1)
    assert "PYSNAP_GRACE" in warnings[0].message if warnings else True


def test_a_transient_failure_at_the_end_is_tried_again(tmp_path: Path, clock: Clock) -> None:
    part = Part()
    snapshotter = pysnap.Snapshotter(tmp_path, part=part)
    commit, failures = snapshotter._committer._commit, [5, 28]

    def failing(*arguments: Any) -> Any:
        if failures:
            arguments[1].abort()
            raise StorageError(failures.pop(0), "writing failed", "0.pack")
        return commit(*arguments)

    snapshotter._committer._commit = failing  # type: ignore[method-assign]  # a disk with moods
    with pytest.raises(pysnap.Preempted), snapshotter.step():
        part.steps += 1
        send()
    assert stored(tmp_path) == 1 and clock.slept == [1.0, 1.0]
    assert snapshotter.stats().failed == 2 and snapshotter.stats().retried == 2
    snapshotter.close()


@pytest.mark.parametrize("number", [5, 30])
def test_a_failure_at_the_end_ends_all_the_same(tmp_path: Path, clock: Clock, number: int) -> None:
    part = Part()
    snapshotter = pysnap.Snapshotter(tmp_path, part=part, grace=4)

    def failing(*arguments: Any) -> Any:
        arguments[1].abort()
        raise StorageError(number, "writing failed", "0.pack")

    snapshotter._committer._commit = failing  # type: ignore[method-assign]  # a broken disk
    with pytest.raises(pysnap.Preempted), snapshotter.step():
        part.steps += 1
        send()
    assert clock.slept == ([1.0, 1.0, 1.0] if number == 5 else [])
    with pytest.raises(StorageError):
        snapshotter.close()


# Handlers


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path: Path, clock: Clock) -> None:
    """As where a scheduler and a launcher both pass it on."""
    part = Part()
    snapshotter = pysnap.Snapshotter(tmp_path, part=part)
    with pytest.raises(pysnap.Preempted), snapshotter.step():
        part.steps += 1
        send()
        clock.now += 0.9
        send(signal.SIGUSR1)
    snapshotter.close()
    assert stored(tmp_path) == 1


SECOND = """
import os, signal, sys, pysnap
from pysnap import preemption
class Clock:
    now = 0.0
    def monotonic(self): return self.now
preemption.time = Clock()
if {handler}:
    signal.signal(signal.SIGTERM, lambda number, frame: print("mine", flush=True))
snapshotter = pysnap.Snapshotter(sys.argv[1], part={{"a": 1}})
with snapshotter.step():
    os.kill(os.getpid(), signal.SIGTERM)
    Clock.now += 1.1
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


@pytest.mark.parametrize("handler", [False, True])
def test_a_second_signal_ends_at_once(tmp_path: Path, handler: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECOND.format(handler=handler), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == ("mine\n" if handler else "")


def test_the_programs_own_handler_is_called_at_the_end_of_the_step(tmp_path: Path) -> None:
    part, calls = Part(), []

    def mine(number: int, frame: object) -> None:
        calls.append((number, stored(tmp_path)))

    before = signal.signal(signal.SIGTERM, mine)
    try:
        snapshotter = pysnap.Snapshotter(tmp_path, part=part)
        with pytest.raises(pysnap.Preempted), snapshotter.step():
            send()
            assert not calls
            part.steps += 1
        assert calls == [(signal.SIGTERM, 1)]
        snapshotter.close()
        assert signal.getsignal(signal.SIGTERM) is mine and len(calls) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_of_the_program_that_exits_does_so_when_the_step_is_durable(
    tmp_path: Path,
) -> None:
    part = Part()

    def mine(number: int, frame: object) -> None:
        sys.exit(7)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with (
            pytest.raises(SystemExit) as end,
            pysnap.Snapshotter(tmp_path, part=part) as snapshotter,
            snapshotter.step(),
        ):
            send()
            part.steps += 1
        assert end.value.code == 7 and stored(tmp_path) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pysnap.Snapshotter(tmp_path, part=Part()) as snapshotter:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            send()
            steps(snapshotter, Part(), 1)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_outside_python_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as faulthandler's, which prints every thread's stack."""
    import faulthandler

    caplog.set_level(logging.INFO, "pysnap")
    with open(tmp_path / "stacks", "w+") as file:
        faulthandler.register(signal.SIGUSR1, file)
        try:
            with pysnap.Snapshotter(tmp_path / "run", part=Part()) as snapshotter:
                send(signal.SIGUSR1)
                steps(snapshotter, Part(), 1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)
        file.seek(0)
        assert "most recent call first" in file.read()
    assert "SIGUSR1 is not watched: it has a handler outside Python" in caplog.text


def test_a_handler_that_was_installed_over_ours_is_left(tmp_path: Path) -> None:
    """It may call ours, which then does what was done before."""
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append("first"))
    try:
        snapshotter = pysnap.Snapshotter(tmp_path, part=Part())
        ours = signal.getsignal(signal.SIGTERM)
        assert callable(ours)

        def over(number: int, frame: Any) -> None:
            calls.append("over")
            ours(number, frame)

        signal.signal(signal.SIGTERM, over)
        snapshotter.close()
        assert signal.getsignal(signal.SIGTERM) is over
        send()
        assert calls == ["over", "first"]
        signal.signal(signal.SIGTERM, ours)
        pysnap.Snapshotter(tmp_path, part=Part()).close()
        send()
        assert calls == ["over", "first", "first"]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("text", "watched"),
    [
        (None, ["SIGTERM", "SIGUSR1"]),
        (True, ["SIGTERM", "SIGUSR1"]),
        (False, []),
        ("off", []),
        ("SIGUSR2", ["SIGUSR2"]),
        ("sigterm, SIGHUP,SIGTERM", ["SIGTERM", "SIGHUP"]),
    ],
)
def test_which_signals_are_watched(tmp_path: Path, text: Any, watched: list[str]) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with pysnap.Snapshotter(tmp_path, part=Part(), preemption=text):
        now = {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert {number.name for number in now if now[number] != before[number]} == set(watched)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arguments",
    [
        {"preemption": "SIGKILL"},
        {"preemption": ""},
        {"preemption": "TERM"},
        {"preemption": 15},
        {"grace": 0},
        {"grace": -1},
        {"grace": "soon"},
        {"grace": True},
        {"grace": float("nan")},
        {"grace": float("inf")},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_the_door(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(pysnap.ConfigError, match=next(iter(arguments))):
        pysnap.Snapshotter(tmp_path, part=Part(), **arguments)


def test_in_another_thread_nothing_is_watched_and_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pysnap")
    before = signal.getsignal(signal.SIGTERM)

    def body() -> None:
        with pysnap.Snapshotter(tmp_path, part=Part()) as snapshotter:
            assert signal.getsignal(signal.SIGTERM) is before
            steps(snapshotter, Part(), 1)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert "SIGTERM is not watched: handlers are the main thread's" in caplog.text


def test_one_that_is_closed_in_another_thread_leaves_no_trace(tmp_path: Path) -> None:
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        snapshotter = pysnap.Snapshotter(tmp_path, part=Part())
        thread = threading.Thread(target=snapshotter.close)
        thread.start()
        thread.join()
        send()
        assert calls == [signal.SIGTERM]
        pysnap.Snapshotter(tmp_path, part=Part()).close()  # in the main thread
    finally:
        signal.signal(signal.SIGTERM, before)


# Several


def test_two_that_take_turns_are_both_saved(tmp_path: Path) -> None:
    one, two = Part(), Part()
    with (
        pytest.raises(pysnap.Preempted),
        pysnap.Snapshotter(tmp_path / "one", part=one) as first,
        pysnap.Snapshotter(tmp_path / "two", part=two) as second,
    ):
        while True:
            steps(first, one, 1)
            if one.steps == 3:
                send()
            steps(second, two, 1)
    assert stored(tmp_path / "one") == 3 and stored(tmp_path / "two") == 3


def test_a_step_within_a_step_ends_with_the_outer_one(tmp_path: Path) -> None:
    one, two = Part(), Part()
    with (
        pytest.raises(pysnap.Preempted),
        pysnap.Snapshotter(tmp_path / "one", part=one) as first,
        pysnap.Snapshotter(tmp_path / "two", part=two) as second,
    ):
        while True:
            with first.step():
                steps(second, two, 1)
                if one.steps == 2:
                    send()
                steps(second, two, 1)
                one.steps += 1
    assert stored(tmp_path / "one") == 3 and stored(tmp_path / "two") == 6


def test_only_the_last_one_puts_the_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    first = pysnap.Snapshotter(tmp_path / "one", part=Part())
    second = pysnap.Snapshotter(tmp_path / "two", part=Part())
    first.close()
    assert signal.getsignal(signal.SIGTERM) != before
    second.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_that_was_preempted_does_not_end_the_next(tmp_path: Path) -> None:
    for expected in (1, 2):
        part = Part()
        with pysnap.Snapshotter(tmp_path, part=part) as snapshotter:
            snapshotter.resume()
            with pytest.raises(pysnap.Preempted), snapshotter.step():
                part.steps += 1
                send()
        assert stored(tmp_path) == expected


# Children


def test_a_forked_child_does_what_it_did_before(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, part=Part()):
        child = os.fork()
        if child == 0:
            if all(signal.getsignal(number) is signal.SIG_DFL for number in WATCHED):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert all(signal.getsignal(number) != signal.SIG_DFL for number in WATCHED)


def test_a_child_that_is_forked_after_the_signal_is_not_asked_to_end(tmp_path: Path) -> None:
    part = Part()
    with (
        pytest.raises(pysnap.Preempted),
        pysnap.Snapshotter(tmp_path, part=part) as snapshotter,
        snapshotter.step(),
    ):
        send()
        child = os.fork()
        if child == 0:
            os._exit(int(preemption._watch.request is not None))
        assert os.waitpid(child, 0)[1] == 0
        part.steps += 1
    assert stored(tmp_path) == 1


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index


def test_workers_of_a_data_loader_end_when_the_loader_says_so(tmp_path: Path) -> None:
    part = Part()
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2)
    with (
        pytest.raises(pysnap.Preempted),
        pysnap.Snapshotter(tmp_path, part=part) as snapshotter,
    ):
        iterator = iter(loader)
        for _ in iterator:
            workers = [worker.pid for worker in iterator._workers]  # type: ignore[attr-defined]
            with snapshotter.step():
                part.steps += 1
                if part.steps == 3:
                    send()
    del iterator
    assert stored(tmp_path) == 3
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
