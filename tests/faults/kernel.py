"""File systems and limits of the kernel, for tests and for the programs that they start.

Where this process may not use one, the test is skipped and says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_DETACH = 2


def _call(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def private_mounts() -> None:
    """What this process mounts is seen by it alone, and it may mount, also without being root.
    Only in a process that has no threads yet."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEWUSER | _NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount_tmpfs(path: Path | str, options: str) -> None:
    """A file system in memory; options as `size=1m,nr_inodes=20`."""
    os.makedirs(path, exist_ok=True)
    _call("mount", b"none", os.fsencode(path), b"tmpfs", 0, options.encode())


def unmount(path: Path | str) -> None:
    """It is gone from the path at once, also while files in it are open."""
    _call("umount2", os.fsencode(path), _DETACH)


def need_user_namespaces() -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    try:
        allowed = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine allows no user namespaces, so no file system can be mounted")


def _need_root(*programs: str) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root")
    for program in programs:
        if subprocess.run(["which", program], capture_output=True, check=False).returncode != 0:
            pytest.skip(f"needs {program}")


@contextlib.contextmanager
def ext4(folder: Path) -> Iterator[Path]:
    """A real file system of 64 MiB on a loop device."""
    _need_root("mkfs.ext4", "losetup", "mount", "fsfreeze", "chattr")
    image, place = folder / "image", folder / "disk"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mounted = subprocess.run(
        ["mount", "-o", "loop,errors=remount-ro", str(image), str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs loop devices: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        for undo in (["fsfreeze", "--unfreeze"], ["chattr", "-R", "-i"]):
            subprocess.run([*undo, str(place)], capture_output=True, check=False)
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def freeze(place: Path) -> None:
    """Whatever writes there waits in the kernel."""
    subprocess.run(["fsfreeze", "--freeze", str(place)], check=True)


def thaw(place: Path) -> None:
    subprocess.run(["fsfreeze", "--unfreeze", str(place)], check=True)


def make_read_only(place: Path) -> None:
    """As the kernel does when it has found the file system damaged."""
    device = os.stat(place).st_dev
    name = os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").rpartition("/")[2]
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("1")


def make_immutable(path: Path, immutable: bool) -> None:
    """Nothing may be made or removed in the directory."""
    subprocess.run(["chattr", "+i" if immutable else "-i", str(path)], check=True)


def is_stuck(pid: int) -> bool:
    """Whether a thread of the process waits in the kernel, where no signal reaches it."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return "D" in states


@contextlib.contextmanager
def cgroup(controller: str, **limits: str) -> Iterator[Path]:
    """A group of processes with limits, by the files of the first version of cgroups. Write a
    process id into its `cgroup.procs`."""
    _need_root()
    group = Path("/sys/fs/cgroup") / controller / f"pysnap-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs the cgroup controller {controller}: {error}")
    try:
        for name, value in limits.items():
            (group / name.replace("__", ".")).write_text(value)
        yield group
    finally:
        group.rmdir()
