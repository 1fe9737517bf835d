"""Measurements, each in a process of its own, seen from the program that asks for them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from floors import STREAMING_STORES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_CHILD = Path(__file__).parent / "child.py"
_LIMIT_SECONDS = 1800.0
_ERROR_LINES = 15


@dataclass(frozen=True)
class Job:
    """One child process: what it measures, of what, and with which arguments."""

    kind: str
    subject: str
    arguments: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.subject}" if self.subject else self.kind


class JobError(Exception):
    """A measurement that ended without a result."""


def run(job: Job, directory: Path, tell: Callable[[str], None]) -> Any:
    """The result of one measurement. Raises JobError with what the child wrote last."""
    # Settings of the caller's pysnap must not change what is measured.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYSNAP_")
    }
    if job.kind == "saves":
        environment |= STREAMING_STORES
    arguments = job.arguments | {"directory": str(directory)}
    text = json.dumps({"measure": job.kind, "arguments": arguments})
    reading, writing = os.pipe()
    with os.fdopen(reading) as report_lines, tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [sys.executable, str(_CHILD), str(writing), text],
            pass_fds=[writing],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        os.close(writing)
        limit = threading.Timer(_LIMIT_SECONDS, child.kill)
        limit.start()
        result = None
        try:
            for line in report_lines:
                message = json.loads(line)
                if "tell" in message:
                    tell(message["tell"])
                else:
                    result = message["result"]
            status = child.wait()
        finally:
            limit.cancel()
            child.kill()
            child.wait()
        if status != 0 or result is None:
            output.seek(0)
            last = "\n".join(output.read().splitlines()[-_ERROR_LINES:])
            raise JobError(f"{job.title} ended with status {status}:\n{last}")
    return result


def run_all(
    jobs: Sequence[Job], directory: Path, console: Console
) -> Iterator[tuple[Job, dict[str, Any] | None]]:
    """Each job and its result, one after the other, with a progress bar; None and a message on the
    console for one that failed."""
    columns = (
        BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:

            def tell(text: str, title: str = job.title) -> None:
                progress.update(task, description=f"{title} ({text})")

            tell("starting")
            result = None
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                try:
                    result = run(job, Path(folder), tell)
                except JobError as error:
                    console.print(str(error), style="red", highlight=False, markup=False)
            yield job, result
            progress.advance(task)


def check_room(directory: Path, *, disk_bytes: int, memory_bytes: int) -> None:
    """Raise SystemExit where space or memory would run out."""
    for what, needed, free in (
        (f"disk space in {directory}", disk_bytes, shutil.disk_usage(directory).free),
        ("memory", memory_bytes, psutil.virtual_memory().available),
    ):
        if free < needed:
            raise SystemExit(
                f"the benchmark needs {needed / 1e9:.1f} GB of {what}, {free / 1e9:.1f} GB are "
                "free: make room, or choose a smaller --size or another --dir"
            )


@contextlib.contextmanager
def working_directory(given: Path | None, out: Path) -> Iterator[Path]:
    """A new folder in `given`, or beside the results, that is removed afterwards."""
    parent = given or out
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=parent) as folder:
        yield Path(folder)
