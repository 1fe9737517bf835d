"""Threads that stay for the next call. To start one makes the caller wait until the system has run
it, which takes milliseconds where the cores are busy; one that waits is woken at once."""

from __future__ import annotations

import functools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable


class RefusedError(RuntimeError):
    """The system starts no thread."""


class Threads:
    """Runs calls beside the caller, each in a thread that has nothing else to do. They are no
    daemons: at exit, the interpreter waits for the calls, and ends the threads that wait for one.

    `start` and `join` may be called by one thread at a time.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._workers: list[_Worker] = []
        # One that is dropped leaves no thread behind. Those at exit are ended sooner than this.
        weakref.finalize(self, _end, self._workers).atexit = False

    def start(self, call: Callable[[], object]) -> None:
        """Have `call` run. Raises RefusedError where that takes a new thread and there is none."""
        workers = self._workers
        workers[:] = [worker for worker in workers if not worker.is_over()]
        if not any(worker.take(call) for worker in workers):
            worker = _Worker(self._name, call)
            # Before it starts: Ctrl-C may come in there.
            workers.append(worker)
            if not _may_stay():
                worker.end()
            try:
                worker.start()
            except BaseException:
                # Unless it has begun all the same.
                if worker.thread.ident is None:
                    workers.remove(worker)
                    worker.end()
                raise

    def join(self) -> None:
        """Wait until every call has returned and the threads have ended; safe to repeat."""
        _end(self._workers)
        for worker in self._workers:
            worker.join()

    def has(self, thread: threading.Thread) -> bool:
        """Whether it is one of these threads."""
        return any(worker.thread is thread for worker in self._workers)


class _Worker:
    """One thread, and what it is to call."""

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._calls.put(call)
        # For the main thread may be in here when it is made to end the threads.
        self._lock = threading.RLock()
        self._is_free = False
        self._is_ending = False
        self._owner = os.getpid()
        self.thread = threading.Thread(target=self._work, name=name, daemon=False)

    def start(self) -> None:
        _workers.add(self)
        try:
            self.thread.start()
        except BaseException as error:
            # With one, it came from a signal handler.
            if self.thread.ident is not None:
                raise
            _workers.discard(self)
            if isinstance(error, RuntimeError):
                raise RefusedError(str(error)) from None
            raise

    def take(self, call: Callable[[], object]) -> bool:
        """Call this next, if there is nothing else to do."""
        with self._lock:
            if self._is_ending or not self._is_free:
                return False
            self._is_free = False
            self._calls.put(call)
            return True

    def end(self) -> None:
        """End behind the call that runs."""
        # In a forked child there is no such thread, and nobody gives the lock back.
        if os.getpid() == self._owner:
            with self._lock:
                self._is_ending = True
                self._calls.put(None)

    def join(self) -> None:
        # Where Ctrl-C came while it was started, it may not have begun; it ends all the same.
        if self.thread.ident is not None:
            self.thread.join()

    def is_over(self) -> bool:
        return self.thread.ident is not None and not self.thread.is_alive()

    def _work(self) -> None:
        try:
            # In a child that a call forks, nobody has anything more for this thread.
            while os.getpid() == self._owner and (call := self._calls.get()) is not None:
                call()
                # What it holds must not live until the next one.
                del call
                self._is_free = True
        finally:
            _workers.discard(self)


_workers: set[_Worker] = set()
"""Those that run."""
_is_exiting = threading.Event()


def _may_stay() -> bool:
    """Whether a worker that is there by now is ended at exit."""
    return _are_ended_at_exit() and not _is_exiting.is_set()


def _end(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        worker.end()


def _end_all() -> None:
    # First: whoever sees it unset has a worker that is found here.
    _is_exiting.set()
    _end(list(_workers))


@functools.cache
def _are_ended_at_exit() -> bool:
    """Have the threads ended when the main thread has come to its end: the interpreter waits for
    them before it calls what `atexit` has. False where Python has nothing for that."""
    try:
        # Private, but nothing public runs before the interpreter waits for its threads;
        # concurrent.futures ends its own by it, in every version since 3.9.
        threading._register_atexit(_end_all)  # type: ignore[attr-defined]  # not in typeshed
    except (AttributeError, RuntimeError):
        return False
    return True
