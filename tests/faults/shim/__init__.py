"""The shim (shim.cpp) from Python: building it, starting programs under it, and, in such a program,
its controls and its log."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "shim.cpp"

# As in shim.cpp.
KINDS = (
    *("open", "close", "read", "pread", "write", "pwrite", "fsync", "fdatasync", "ftruncate"),
    *("fallocate", "mkdir", "rename", "unlink", "rmdir", "symlink", "link", "flock", "mmap"),
    *("stat", "statvfs", "chmod", "opendir", "readdir", "mark"),
)
ACTIONS = (
    *("fail", "short", "zero", "delay", "kill before", "kill after", "lie", "lie short", "retry"),
    *("power cut before", "power cut after"),
)
FOREVER = -1

_RECORD = struct.Struct("=iiqiiqqiiq")


def build(folder: Path) -> Path:
    """Compile the shim into `folder`, with the compiler that $CXX names, else c++."""
    library = folder / "libshim.so"
    subprocess.run(
        [
            *os.environ.get("CXX", "c++").split(),
            *("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
            *(str(SOURCE), "-o", str(library), "-ldl"),
        ],
        check=True,
        timeout=120,
    )
    return library


@dataclass(frozen=True)
class Operation:
    """One line of the log. `target` is the new name of a rename or link, or a symlink's text."""

    kind: str
    path: str
    target: str
    descriptor: int
    result: int
    error: int
    flags: int
    offset: int
    length: int
    data: bytes

    def __str__(self) -> str:
        where = f"{self.path} -> {self.target}" if self.target else self.path
        return f"{self.kind} {where}" + (f" failed ({os.strerror(self.error)})" * bool(self.error))


class Shim:
    """The controls, in a program that runs under the shim."""

    def __init__(self) -> None:
        self._library = library = ctypes.CDLL(None)
        for name in ("shim_operations", "shim_fired", "shim_log"):
            getattr(library, name).restype = ctypes.c_int64
        library.shim_fault.argtypes = [
            *(ctypes.c_int32, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_int32, ctypes.c_int64),
        ]
        library.shim_log.argtypes = [ctypes.c_char_p, ctypes.c_int64]

    def start(self, root: Path) -> None:
        """Watch everything below `root`: operation number 1, no faults, an empty log."""
        self._library.shim_start(os.fsencode(root))

    def stop(self) -> None:
        self._library.shim_stop()

    def fault(
        self,
        action: str,
        argument: int = 0,
        *,
        kind: str | None = None,
        pattern: str = "*",
        first: int = 1,
        count: int = 1,
    ) -> None:
        """Of the operations of `kind` (None: any) on paths that match `pattern` (`*` stands for
        slashes, too), those from number `first`, `count` of them, get `action`; `argument` is an
        errno or a number of microseconds.
        """
        self._library.shim_fault(
            -1 if kind is None else KINDS.index(kind),
            os.fsencode(pattern),
            first,
            count,
            ACTIONS.index(action),
            argument,
        )

    def clear_faults(self) -> None:
        self._library.shim_clear_faults()

    def operations(self) -> int:
        """How many operations were seen since `start`."""
        return int(self._library.shim_operations())

    def fired(self) -> int:
        """How many of them got a fault."""
        return int(self._library.shim_fired())

    def mark(self, text: str) -> None:
        """Put a note of the harness between the operations."""
        self._library.shim_mark(text.encode())

    def log(self) -> list[Operation]:
        """What was done since `start`, in the order in which it was done."""
        size = self._library.shim_log(None, 0)
        buffer = ctypes.create_string_buffer(size)
        self._library.shim_log(buffer, size)
        return _parse(buffer.raw)


def _parse(data: bytes) -> list[Operation]:
    operations = []
    at = 0
    while at < len(data):
        kind, descriptor, result, error, flags, offset, length, *sizes = _RECORD.unpack_from(
            data, at
        )
        at += _RECORD.size
        parts = []
        for size in sizes:
            parts.append(data[at : at + size])
            at += size
        path, target, written = parts
        operations.append(
            Operation(
                *(KINDS[kind], os.fsdecode(path), os.fsdecode(target), descriptor, result, error),
                *(flags, offset, length, written),
            )
        )
    return operations
