"""What happened in a repository, a line for each event: `events.jsonl`.

The lines are for people and tools; no snapshot depends on them, and none is made durable. Each is a
JSON object with `time` (Unix seconds) and `event`; docs/guide.md lists the events and what is in
them.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pysnap import storage
from pysnap.errors import StorageError

_log = logging.getLogger("pysnap")

FILE = "events.jsonl"
_LONGEST = 2**20
_CLOSE_SECONDS = 1.0


class EventLog:
    """Appends events. Any thread may add one, none waits for the disk, and no failure is an error:
    what cannot be written is dropped, and told once.

    In a forked child it does nothing.
    """

    def __init__(self, root: Path) -> None:
        """Of the repository at `root`; the file is made by the first event."""
        self._lines = storage.AppendedLines(root / FILE)
        self._owner = os.getpid()
        self._queue: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of _thread
        self._closed = False

    def add(self, event: str, **fields: Any) -> None:
        """Note an event that happens now; `fields` are plain JSON without NaN and infinity."""
        if self._closed or os.getpid() != self._owner:
            return
        record = {"time": time.time(), "event": event, **fields}
        self._queue.put(json.dumps(record, allow_nan=False).encode())
        with self._lock:
            if self._thread is None:
                # A disk that hangs must neither stop the training thread nor keep the process.
                thread = threading.Thread(target=self._write, name="pysnap-events", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return  # no more threads now: the next event tries again
                self._thread = thread

    def flush(self, timeout: float) -> bool:
        """Wait until what was added before is written, or dropped; False after `timeout` s."""
        if self._thread is None or os.getpid() != self._owner:
            return True
        written = threading.Event()
        self._queue.put(written)
        return written.wait(timeout)

    def close(self) -> None:
        """Write what was added, which a disk that hangs delays by a second at most; safe to
        repeat."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_SECONDS)

    def _write(self) -> None:
        told = False
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                self._lines.add(item)
            except StorageError as error:
                if not told:
                    told = True
                    _log.warning("events are lost, snapshots are not: %s", error)
        self._lines.close()


def read_events(root: Path) -> Iterator[dict[str, Any]]:
    """The events of the repository at `root`, oldest first; none where there are none. Lines that
    are torn or no events are left out. Safe beside a writer. Raises StorageError."""
    for line in storage.read_lines(root / FILE, _LONGEST):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(record, dict)
            and isinstance(record.get("event"), str)
            and isinstance(record.get("time"), (int, float))
        ):
            yield record
