"""Real file systems on loop devices that lose power: what is not durable is gone, and the journal
is replayed (README.md section 6). Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20


@dataclass(frozen=True)
class FileSystem:
    """A kind of file system and how it is mounted."""

    make: tuple[str, ...]
    size: int
    options: str = ""


FILE_SYSTEMS = {
    "ext4": FileSystem(("mkfs.ext4", "-q", "-F"), 64 * _MIB),
    "ext4 data=writeback": FileSystem(("mkfs.ext4", "-q", "-F"), 64 * _MIB, "data=writeback"),
    "xfs": FileSystem(("mkfs.xfs", "-q", "-f"), 300 * _MIB),
}


def why_not(name: str, folder: Path) -> str | None:
    """Why this machine cannot do it, or None."""
    if os.geteuid() != 0:
        return "needs root"
    program = FILE_SYSTEMS[name].make[0]
    if shutil.which(program, path=os.defpath + ":/usr/sbin:/sbin") is None:
        return f"needs {program}"
    try:
        with Disk(name, folder).mounted():
            return None
    except subprocess.CalledProcessError as error:
        return f"needs loop mounts: {error.stderr.decode(errors='replace').strip()}"


class Ground:
    """Where trials are made: a directory, which keeps everything."""

    def __init__(self, folder: Path) -> None:
        self.place = folder

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Where it is."""
        yield self.place

    def sync(self) -> None:
        """Everything in it is durable."""


class Disk(Ground):
    """An image file with a file system, in `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        self._kind = FILE_SYSTEMS[name]
        super().__init__(folder / "disk")
        self._image = folder / "image"
        self.place.mkdir(exist_ok=True)
        with open(self._image, "wb") as file:
            file.truncate(self._kind.size)
        _run(*self._kind.make, str(self._image))

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mounted: what the journal holds has been replayed."""
        options = ",".join(filter(None, ("loop", self._kind.options)))
        _run("mount", "-o", options, str(self._image), str(self.place))
        try:
            yield self.place
        finally:
            _run("umount", str(self.place))

    def sync(self) -> None:
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
                raise OSError(ctypes.get_errno(), "syncfs failed")
        finally:
            os.close(descriptor)


def _run(*command: str) -> None:
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    # Not under the shim, which these programs need not have.
    environment.pop("LD_PRELOAD", None)
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment)
