"""Running drive.py from a test: under the shim, in shares for all cores, and reading its answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "drive.py"

# Small, so that a snapshot has several chunks and a state of the disk is quickly made.
_SETTINGS = {"PYSNAP_CHUNK_SIZE": "16KiB", "PYSNAP_HOST_MEMORY": "1MiB"}
_SHOWN = 10


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """In memory where that is possible: trials write much and need no disk."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    folder = tempfile.mkdtemp(prefix="pysnap-faults-", dir=memory if usable else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Driver:
    """Starts drive.py. Directories of trials are made below `scratch`."""

    library: Path
    scratch: Path

    def run(self, command: str, *, timeout: float = 1800, **arguments: Any) -> dict[str, Any]:
        """One process under the shim; its answer."""
        return self._answer(self._start(command, arguments), timeout)

    def run_shares(self, command: str, *, timeout: float = 1800, **arguments: Any) -> Result:
        """As many processes as there are cores, each with its share of the trials."""
        shards = len(os.sched_getaffinity(0))
        processes = [
            self._start(command, {**arguments, "shard": shard, "shards": shards})
            for shard in range(shards)
        ]
        answers = [self._answer(process, timeout) for process in processes]
        violations = [text for answer in answers for text in answer["violations"]]
        return Result(sum(answer["trials"] for answer in answers), violations, answers)

    def _start(self, command: str, arguments: dict[str, Any]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, str(PROGRAM), command),
                json.dumps({"folder": str(self.scratch), **arguments}),
            ],
            env=os.environ | _SETTINGS | {"LD_PRELOAD": str(self.library)},
            stdout=subprocess.PIPE,
        )

    def _answer(self, process: subprocess.Popen[bytes], timeout: float) -> dict[str, Any]:
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == 0, f"drive.py ended with {process.returncode}"
        answer: dict[str, Any] = json.loads(output)
        return answer


@dataclass(frozen=True)
class Result:
    """What all shares of a harness found."""

    trials: int
    violations: list[str]
    answers: list[dict[str, Any]]

    def check(self) -> int:
        """The number of trials, if every one kept its promise."""
        assert self.trials and not self.violations, (
            f"{len(self.violations)} violations in {self.trials} trials:\n"
            + "\n".join(self.violations[:_SHOWN])
        )
        return self.trials
