"""Running drive.py from a test: under the shim, in shares for all cores, and reading its answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "drive.py"

# Small, so that a snapshot has several chunks and a state of the disk is quickly made.
_SETTINGS = {"PYSNAP_CHUNK_SIZE": "16KiB", "PYSNAP_HOST_MEMORY": "1MiB"}
_SHOWN = 10

# System calls that change files or make them durable, as kinds of operations of the shim.
_CHANGING = {
    "write": "write",
    "pwrite64": "pwrite",
    "fsync": "fsync",
    "fdatasync": "fdatasync",
    "ftruncate": "ftruncate",
    "fallocate": "fallocate",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "unlink": "unlink",
    "unlinkat": "unlink",
    "rmdir": "rmdir",
    "symlink": "symlink",
    "symlinkat": "symlink",
    "link": "link",
    "linkat": "link",
    "flock": "flock",
    "chmod": "chmod",
    "fchmod": "chmod",
    "fchmodat": "chmod",
}
# Those that change nothing; opening is logged, with its flags, but for what opendir opens.
_READING = {
    *("open", "openat", "close", "read", "pread64", "lseek", "mmap", "getdents64", "fcntl"),
    *("stat", "lstat", "fstat", "newfstatat", "statx", "fstatfs", "statfs", "readlink", "ioctl"),
    *("access", "mincore"),
}
_LONGEST = 1700


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

    def trace(self) -> tuple[Counter[str], Counter[str]]:
        """What changes files in a run, or makes them durable, by the kind of operation: as strace
        counts it, and as the shim does."""
        trace = self.scratch / "trace"
        answer = self._answers("audit", [{}], under=["strace", "-f", "-y", "-o", str(trace)])[0]
        traced: Counter[str] = Counter()
        for line in trace.read_text(errors="replace").splitlines():
            call = re.match(r"\d+ +(\w+)\(", line)
            if call is None or answer["root"] not in line or call[1] in _READING:
                continue
            # A call that is not known here is not known to the shim.
            kind = _CHANGING.get(call[1], call[1])
            traced["rmdir" if "AT_REMOVEDIR" in line else kind] += 1
        kinds = answer["kinds"]
        return traced, +Counter({kind: kinds.get(kind, 0) for kind in _CHANGING.values()})

    def _answers(
        self, command: str, calls: list[dict[str, Any]], under: list[str] | None = None
    ) -> list[dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            processes = []
            for arguments in calls:
                process = stack.enter_context(self._start(command, arguments, under or []))
                # One that is still there when another has failed.
                stack.callback(process.kill)
                processes.append(process)
            outputs = [process.communicate(timeout=_LONGEST)[0] for process in processes]
        for process in processes:
            assert process.returncode == 0, f"drive.py {command} ended with {process.returncode}"
        return [json.loads(output) for output in outputs]

    def _start(
        self, command: str, arguments: dict[str, Any], under: list[str]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(*under, sys.executable, str(PROGRAM), command),
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
