"""A timeline of what every thread of pysnap does, for https://ui.perfetto.dev or chrome://tracing.

    with trace.span("plan"):
        ...

Off, as it is unless `PYSNAP_TRACE` names a file, a span costs one call. The file is in Chrome's
trace event format, complete after each snapshot. A process that is killed in the middle of a write
leaves whole lines and at most a last one that is cut; the format asks for no end of the list.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pysnap import _engine
from pysnap.errors import ConfigError

_log = logging.getLogger("pysnap")

_MOST_SPANS = 100_000
_OFF = contextlib.nullcontext()


class _Trace:
    """The timeline of this process; `span` and `write` may be called by any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _List(path)
        self._spans: deque[tuple[int, str, int, int, dict[str, Any]]] = deque(maxlen=_MOST_SPANS)
        self._named: dict[int, str] = {}
        self._lock = threading.Lock()  # of writing

    @contextlib.contextmanager
    def span(self, name: str, arguments: dict[str, Any]) -> Iterator[None]:
        start = time.monotonic_ns()
        try:
            yield
        finally:
            thread = threading.get_native_id()
            self._spans.append((thread, name, start, time.monotonic_ns(), arguments))

    def write(self) -> None:
        with self._lock:
            events = [*self._of_python(), *self._of_engine()]
            # Behind the spans: threads are named once they have one.
            self._file.extend([*self._names(), *(json.dumps(event) for event in events)])

    def close(self) -> None:
        self._file.close()

    def _of_python(self) -> Iterator[dict[str, Any]]:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        while self._spans:
            thread, name, start, end, arguments = self._spans.popleft()
            self._named.setdefault(thread, names.get(thread, "pysnap"))
            yield _complete(name, thread, start, end, arguments)

    def _of_engine(self) -> Iterator[dict[str, Any]]:
        spans, threads, dropped = _engine.take_spans()
        for thread, name in threads:
            self._named.setdefault(thread, name)
        for start, end, amount, thread, phase in spans.tolist():
            arguments = {"bytes": amount} if amount else {}
            yield _complete(_engine.PHASES[phase], thread, start, end, arguments)
        if dropped:
            _log.warning("%s lacks %d spans, for which there was no room", self.path, dropped)

    def _names(self) -> Iterator[str]:
        for thread, name in self._named.items():
            if name:
                yield json.dumps(
                    {
                        "name": "thread_name",
                        "ph": "M",
                        "pid": os.getpid(),
                        "tid": thread,
                        "args": {"name": name},
                    }
                )
        self._named = dict.fromkeys(self._named, "")


class _List:
    """A JSON file of one list that grows, an item a line, and is whole after every call. Wherever a
    call is cut short, whole lines are left and at most one that is not. Nothing is made durable."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, 0)
        self._end = 0  # where the next item begins
        self._put(b"[\n]\n")
        self._first = self._end = 2

    def extend(self, items: Iterable[str]) -> None:
        """Append items, each given as JSON."""
        # A comma begins a line: behind what was whole it would make it another list.
        data = "".join(f",{item}\n" for item in items).encode()
        if data:
            data = data[1:] if self._end == self._first else data
            self._put(data + b"]\n")
            self._end += len(data)

    def _put(self, data: bytes) -> None:
        left, at = memoryview(data), self._end
        while left:
            written = os.pwrite(self._descriptor, left, at)
            left, at = left[written:], at + written

    def close(self) -> None:
        os.close(self._descriptor)


def _complete(
    name: str, thread: int, start: int, end: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": "pysnap",
        "ph": "X",
        "ts": start / 1000,
        "dur": (end - start) / 1000,
        "pid": os.getpid(),
        "tid": thread,
        "args": arguments,
    }


_active: _Trace | None = None


def begin(path: str) -> None:
    """Trace this process from now on into the file at `path`, which is made anew. One that traces
    already goes on, into the file with which it began. Raises ConfigError where it cannot be
    made."""
    global _active
    if _active is None:
        try:
            _active = _Trace(Path(path).absolute())
        except OSError as error:
            raise ConfigError(f"PYSNAP_TRACE is {path!r}: {error.strerror}") from None
        _engine.trace(True)


def span(name: str, **arguments: Any) -> contextlib.AbstractContextManager[None]:
    """The block is one span of the calling thread; `arguments` are plain JSON."""
    trace = _active
    return _OFF if trace is None else trace.span(name, arguments)


def write() -> None:
    """Write what was traced so far; a failure is told, and ends the tracing."""
    trace = _active
    if trace is None:
        return
    try:
        trace.write()
    except OSError as error:
        _log.warning("tracing ends: writing %s failed: %s", trace.path, error.strerror)
        end()


def end() -> None:
    """Trace no more; what was not written is dropped."""
    global _active
    _engine.trace(False)
    trace, _active = _active, None
    if trace is not None:
        trace.close()


# A forked child has the lock of a thread that it has not, and the same file.
os.register_at_fork(after_in_child=end)
