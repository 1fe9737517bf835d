"""The shim sees what pysnap does: a file operation that it does not see could not be failed, and
its effects would be missing in the states of a power cut (README.md section 2)."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Count
from driving import Driver

from pysnap import _engine

HARNESS = "what the shim sees"
_ROOT = Path(__file__).parent.parent.parent

# Symbols of the C library that take a path or a descriptor.
_FILE_CALLS = """
    access acct chdir chmod chown chroot close close_range closedir copy_file_range creat creat64
    dup dup2 dup3 euidaccess eaccess execve faccessat fallocate fallocate64 fchdir fchmod fchmodat
    fchown fchownat fclose fcntl fcntl64 fdatasync fdopen fdopendir fflush fgetxattr flock fopen
    fopen64 fputc fputs fread freopen fremovexattr fsetxattr fstat fstat64 fstatat fstatat64 fstatfs
    fstatvfs fstatvfs64 fsync ftruncate ftruncate64 ftw futimens futimes fwrite getdents64 getxattr
    ioctl lchown link linkat lockf lockf64 lseek lseek64 lsetxattr lstat lstat64 madvise mincore
    mkdir mkdirat mkdtemp mknod mknodat mkostemp mkstemp mmap mmap64 mount mremap msync munmap nftw
    open open64 openat openat64 opendir posix_fadvise posix_fallocate posix_fallocate64 pread
    pread64 preadv preadv2 pwrite pwrite64 pwritev pwritev2 read readahead readdir readdir64
    readlink readlinkat readv realpath remove removexattr rename renameat renameat2 rmdir scandir
    sendfile sendfile64 setxattr splice stat stat64 statfs statvfs statvfs64 statx symlink
    symlinkat sync
    sync_file_range syncfs syscall tee tmpfile truncate truncate64 umount2 unlink unlinkat utime
    utimensat utimes vmsplice write writev
"""
# Not interposed, and why nothing is missed.
_UNSEEN = {
    "fcntl": "flags of a descriptor",
    "madvise": "memory",
    "mincore": "memory",
    "munmap": "memory",
    "syscall": "threads and memory, see test_the_engine_makes_no_system_calls_on_files",
}
# What pysnap calls of os and fcntl on paths and descriptors, and the kind of operation it becomes.
_PYTHON_CALLS = {
    "os.chmod": "chmod",
    "os.close": "close",
    "os.fchmod": "chmod",
    "os.fstat": "stat",
    "os.fsync": "fsync",
    "os.ftruncate": "ftruncate",
    "os.listdir": "opendir",
    "os.lstat": "stat",
    "os.mkdir": "mkdir",
    "os.open": "open",
    "os.pread": "pread",
    "os.pwrite": "pwrite",
    "os.rename": "rename",
    "os.replace": "rename",
    "os.rmdir": "rmdir",
    "os.stat": "stat",
    "os.symlink": "symlink",
    "os.unlink": "unlink",
    "os.write": "write",
    "fcntl.flock": "flock",
}
# Functions of os and fcntl that are about no file.
_NO_FILES = {
    "os.fsdecode",
    "os.fsencode",
    "os.fspath",
    "os.getpid",
    "os.register_at_fork",
    "os.strerror",
    "os.uname",
}
# Modules that make the repository's files; others read other places, such as /proc.
_WRITERS = ("storage", "repository", "files", "commit", "notes", "verify", "events")


def symbols(library: Path, *, defined: bool) -> set[str]:
    """Names that a library defines, or wants from others."""
    output = subprocess.run(
        ["nm", "-D", "--defined-only" if defined else "--undefined-only", str(library)],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout
    return {line.split()[-1].split("@")[0] for line in output.splitlines()}


def test_the_shim_sees_every_file_call_of_the_engine(library: Path, count: Count) -> None:
    wanted = symbols(Path(_engine.__file__), defined=False) & set(_FILE_CALLS.split())
    unseen = wanted - symbols(library, defined=True) - set(_UNSEEN)
    assert {"open", "pwrite", "fdatasync", "fsync"} <= wanted
    assert not unseen, f"interpose {sorted(unseen)} in shim.cpp"
    count(len(wanted))


def test_the_engine_makes_no_system_calls_on_files(count: Count) -> None:
    for source in (_ROOT / "csrc").glob("*.cpp"):
        made = re.findall(r"\bsyscall\((\w+)", source.read_text())
        assert set(made) <= {"SYS_gettid", "SYS_mbind"}, source
        count()


def test_the_shim_sees_every_file_call_of_the_python_half(count: Count) -> None:
    made = set()
    for name in _WRITERS:
        source = _ROOT / "pysnap" / f"{name}.py"
        for node in ast.walk(ast.parse(source.read_text()) if source.exists() else ast.Module()):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id in ("os", "fcntl", "shutil", "mmap"):
                    made.add(f"{owner.id}.{node.func.attr}")
    unknown = made - set(_PYTHON_CALLS) - _NO_FILES
    assert {"os.open", "os.rename"} <= made
    assert not unknown, f"see that shim.cpp interposes what {sorted(unknown)} call"
    count(len(made))


def test_what_python_tells_of_itself_is_in_the_log(driver: Driver, count: Count) -> None:
    """Python's audit events name the operations of a run a second time."""
    answer = driver.run("audit")
    assert answer["events"] >= 30
    assert not answer["missing"], answer["missing"]
    count(answer["events"])


def test_strace_sees_no_other_calls(driver: Driver, full: bool, count: Count) -> None:
    """The kernel's own list of what a run does to files."""
    if not full:
        pytest.skip("only with --full")
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    traced, logged = driver.trace()
    assert traced == logged
    count(sum(traced.values()))
