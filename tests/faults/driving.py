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
_LONGEST = 1800


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

    def run(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One process under the shim; its answer."""
        return self._answers(command, [arguments])[0]

    def run_shares(self, command: str, **arguments: Any) -> Result:
        """As many processes as there are cores, each with its share of the trials."""
        shards = len(os.sched_getaffinity(0))
        answers = self._answers(
            command, [{**arguments, "shard": shard, "shards": shards} for shard in range(shards)]
        )
        violations = [text for answer in answers for text in answer["violations"]]
        return Result(sum(answer["trials"] for answer in answers), violations)

    def _answers(self, command: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            processes = []
            for arguments in calls:
                process = stack.enter_context(self._start(command, arguments))
                # One that is still there when another has failed.
                stack.callback(process.kill)
                processes.append(process)
            outputs = [process.communicate(timeout=_LONGEST)[0] for process in processes]
        for process in processes:
            assert process.returncode == 0, f"drive.py {command} ended with {process.returncode}"
        return [json.loads(output) for output in outputs]

    def _start(self, command: str, arguments: dict[str, Any]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, str(PROGRAM), command),
                json.dumps({"folder": str(self.scratch), **arguments}),
            ],
            env=os.environ | _SETTINGS | {"LD_PRELOAD": str(self.library)},
            stdout=subprocess.PIPE,
        )


@dataclass(frozen=True)
class Result:
    """What all shares of a harness found."""

    trials: int
    violations: list[str]

    def check(self) -> int:
        """The number of trials, if every one kept its promise."""
        assert self.trials and not self.violations, (
            f"{len(self.violations)} violations in {self.trials} trials:\n"
            + "\n".join(self.violations[:_SHOWN])
        )
        return self.trials
