"""Threads that stay for the next call."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from pysnap import threads
from pysnap.threads import RefusedError, Threads


@pytest.fixture
def pool() -> Iterator[Threads]:
    made = Threads("a-name")
    yield made
    made.join()


def idle(pool: Threads) -> None:
    """Return when none has anything to do."""
    while not all(worker._is_free for worker in pool._workers):
        threading.Event().wait(0.001)


def ran_in(pool: Threads) -> threading.Thread:
    found: list[threading.Thread] = []
    done = threading.Event()

    def call() -> None:
        found.append(threading.current_thread())
        done.set()

    pool.start(call)
    done.wait()
    return found[0]


def test_a_thread_that_has_nothing_to_do_runs_the_next_call(pool: Threads) -> None:
    first = ran_in(pool)
    assert first.name == "a-name"
    assert not first.daemon
    assert pool.has(first)
    idle(pool)
    assert ran_in(pool) is first
    assert not pool.has(threading.current_thread())


def test_a_call_does_not_wait_for_one_that_runs(pool: Threads) -> None:
    release = threading.Event()
    pool.start(release.wait)
    assert ran_in(pool) is not pool._workers[0].thread
    release.set()


def test_join_waits_for_the_calls_and_ends_the_threads(pool: Threads) -> None:
    release, done = threading.Event(), threading.Event()

    def call() -> None:
        release.wait()
        done.set()

    pool.start(call)
    thread = pool._workers[0].thread
    threading.Timer(0, release.set).start()
    pool.join()
    assert done.is_set()
    assert not thread.is_alive()
    pool.join()
    assert ran_in(pool) is not thread


def test_what_a_call_holds_is_let_go(pool: Threads) -> None:
    class Held:
        def __call__(self) -> None: ...

    held = Held()
    gone = weakref.ref(held)
    pool.start(held)
    idle(pool)
    del held
    gc.collect()
    assert gone() is None


def test_those_of_an_owner_that_is_dropped_end() -> None:
    dropped, release = Threads("a-name"), threading.Event()
    dropped.start(release.wait)
    busy = dropped._workers[0].thread
    waiting = ran_in(dropped)
    del dropped
    waiting.join(60)
    release.set()
    busy.join(60)
    assert not waiting.is_alive()
    assert not busy.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_raises_takes_its_thread_with_it(pool: Threads) -> None:
    def call() -> None:
        raise LookupError

    pool.start(call)
    thread = pool._workers[0].thread
    thread.join()
    assert ran_in(pool) is not thread
    assert len(pool._workers) == 1


def test_a_thread_that_is_refused(pool: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RefusedError, match="new thread"):
            pool.start(int)
    assert not pool._workers
    ran_in(pool)


def test_an_exception_of_a_signal_handler_is_no_refusal(
    pool: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise RuntimeError("mine")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(RuntimeError, match="mine") as raised:
            pool.start(int)
    assert not isinstance(raised.value, RefusedError)
    assert pool.has(pool._workers[0].thread)


def test_nothing_is_left_of_a_thread_that_ctrl_c_kept_from_starting(
    pool: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    class Held:
        def __call__(self) -> None: ...

    held = Held()
    gone = weakref.ref(held)
    before = set(threads._workers)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.start(held)
    del held
    gc.collect()
    assert gone() is None
    assert threads._workers == before
    ran_in(pool)


def test_none_stays_where_nobody_would_end_it(
    pool: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_may_stay", lambda: False)
    first = ran_in(pool)
    first.join()
    assert ran_in(pool) is not first


CALLS = """
import sys, threading
from pysnap.threads import Threads
pool = Threads("a-name")
release = threading.Event()
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("pool.start(lambda: print('idle'))", "idle\n"),
        # It goes on when the main thread has come to its end.
        (
            "pool.start(lambda: threading.main_thread().join() or print('late'))\nsys.exit()",
            "late\n",
        ),
        ("pool.start(lambda: print('dropped')); del pool", "dropped\n"),
        (
            "import os\npool.start(int)\n"
            "def leave():\n"
            "    threading.main_thread().join()\n"
            "    try:\n"
            "        pool.start(lambda: print('behind the end'))\n"
            "    except Exception as error:\n"
            "        print(error)\n"
            "threading.Thread(target=leave).start()",
            # From 3.12 on, Python starts no thread behind the end.
            "behind the end\n"
            if sys.version_info < (3, 12)
            else "can't create new thread at interpreter shutdown\n",
        ),
    ],
    ids=["idle", "at work", "dropped", "started at the end"],
)
def test_the_interpreter_ends_when_the_calls_have_returned(code: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALLS + code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == (said, "")


def test_a_forked_child_ends_whoever_held_the_lock() -> None:
    code = CALLS + (
        "import os\n"
        "pool.start(int)\n"
        "held = threading.Event()\n"
        "def hold():\n"
        "    with pool._workers[0]._lock:\n"
        "        held.set(); release.wait()\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "pid = os.fork()\n"
        "if pid == 0: sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "release.set()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "7\n"
