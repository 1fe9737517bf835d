"""Reads hostile snapshots in a process of its own, which is watched: what it opens, runs and
allocates. `hostile_child.py FOLDER` reads every directory in FOLDER and prints a line of JSON each.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import pysnap
from pysnap import reader
from pysnap.verify import verify_repository, verify_snapshot

MEMORY = 2**30
"""So much address space may come on top of what torch takes."""
SECONDS = 30

_ALWAYS = (
    "exec", "compile", "import", "pickle.", "marshal.", "subprocess.", "os.system", "os.exec",
    "os.posix_spawn", "os.fork", "os.spawn", "os.startfile", "socket.", "ctypes.", "code.",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.chown", "os.truncate", "os.utime", "os.setxattr", "shutil.", "urllib.", "ftplib.",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

watching: Path | None = None
events: list[str] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if watching is None:
        return
    if event == "open":
        path, _, flags = arguments
        inside = isinstance(path, int) or str(path).startswith(str(watching))
        # libzstd is looked for beside the package, memory and processors in the kernel's files.
        if not inside or (isinstance(flags, int) and flags & _WRITING):
            events.append(f"open {path} {flags}")
    elif event.startswith(_ALWAYS):
        events.append(f"{event} {arguments!r:.200}")


def outcome(read: Callable[[], object]) -> tuple[str, str]:
    """How it ends: `ok`, `refused` or the type of an error that is nobody's; and the message."""
    signal.alarm(SECONDS)
    try:
        read()
    except (pysnap.Error, reader.ReaderError) as error:
        return "refused", str(error)
    except BaseException as error:
        return f"{type(error).__name__}", f"{error!r:.300}"
    return "ok", ""


def read_all(path: Path) -> dict[str, tuple[str, str]]:
    results = {
        "load": outcome(lambda: pysnap.load(path)),
        "open": outcome(lambda: [entry[...] for entry in pysnap.open(path).values()]),
    }
    if os.path.lexists(path / "manifest.json"):
        results["verify"] = outcome(lambda: verify_snapshot(path))
        results["reader"] = outcome(lambda: reader.read_snapshot(path).tree())
        results["reader.verify"] = outcome(lambda: reader.verify(path))
    else:
        results["verify"] = outcome(lambda: verify_repository(path))
    return results


def peak() -> int:
    """The largest resident memory since `clear`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def clear() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def main(folder: Path) -> None:
    global watching
    # Whatever is loaded or imported late is there before anything is watched.
    with tempfile.TemporaryDirectory() as scratch:
        path = pysnap.save(Path(scratch) / "s", {"x": torch.zeros(9000), "y": [{1: 2.0}]})
        read_all(path)
        read_all(path.parent)
    sys.addaudithook(watch)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for case in sorted(folder.iterdir()):
        before, start = clear(), time.monotonic()
        events.clear()
        watching = case
        results = read_all(case)
        watching = None
        signal.alarm(0)
        row = {"case": case.name, "results": results, "events": list(events)}
        row |= {"seconds": time.monotonic() - start, "memory": peak() - before}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
