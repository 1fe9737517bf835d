"""The only door of the Python half to the file system: each call is one durable step of design
section 6.

Failures are StorageErrors that name the operation and the path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pysnap import _engine, trace
from pysnap.errors import BusyError, StorageError, printable

# Whatever the umask: a state is nobody else's business.
_FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
_LONGEST_PATH = 4096
_POLL_SECONDS = 0.01
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def _told(doing: str, path: Path) -> Iterator[None]:
    try:
        with trace.span(doing, path=path.name):
            yield
    except OSError as error:
        raise _told_of(error, doing, path) from error


def _told_of(error: OSError, doing: str, path: Path) -> StorageError:
    return StorageError.wrap(error, f"{doing} {printable(str(path), _LONGEST_PATH)}", path)


def make_directory(path: Path) -> None:
    """Create a directory (0700) that must not exist."""
    with _told("creating directory", path):
        os.mkdir(path, DIRECTORY_MODE)
        # A umask that takes more away would lock the owner out, too.
        os.chmod(path, DIRECTORY_MODE)


# By the engine, without the GIL from the first to the last of its calls: training that runs Python
# waits for each time that another thread takes it.
def write_file(path: Path, data: bytes) -> None:
    """Create a file that must not exist (0600), whole and durable. A failure is final: the file
    is not tried again."""
    with trace.span("writing", path=path.name):
        _engine.write_file(str(path), data)


def read_file(path: Path, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes. Links, FIFOs and devices are refused."""
    with _told("reading", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(22, "it is not a regular file")
            if status.st_size > limit:
                raise OSError(27, f"it has {status.st_size} bytes, more than {limit}")
            with open(descriptor, "rb", closefd=False) as file:
                # Room for all that is asked for is allocated before anything is read.
                return file.read(status.st_size)
        finally:
            os.close(descriptor)


def file_size(path: Path) -> int:
    """Length of a regular file; links and everything else are refused, as by `read_file`."""
    with _told("opening", path):
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(22, "it is not a regular file")
        return status.st_size


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    with trace.span("syncing directory", path=path.name):
        _engine.sync_directory(str(path))


def rename(source: Path, target: Path) -> None:
    """Rename a file or directory; `target` must not exist (the caller holds the writer lock)."""
    with _told(f"renaming {source.name} to", target):
        if exists(target):
            raise FileExistsError(17, "it exists")
        os.rename(source, target)


def replace_file(path: Path, data: bytes) -> None:
    """Give a file a new content, whole and durable: who reads it sees the old one or the new one.
    The caller has locked its directory, and what a killed caller left is removed."""
    beginning = f".{path.name}-"
    for name in list_directory(path.parent):
        if name.startswith(beginning):
            remove_file(path.parent / name)
    temporary = path.with_name(f"{beginning}{uuid.uuid4().hex}")
    try:
        write_file(temporary, data)
        with _told("replacing", path):
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def locked_directory(path: Path, seconds: float) -> Iterator[None]:
    """`flock` on a directory, against others who use this; none where the file system has no locks
    of directories, as some network file systems. Raises BusyError where somebody holds it
    for longer than `seconds`, and a StorageError of ENOENT where the directory is renamed or
    removed meanwhile."""
    with _told("opening", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                with _told("locking", path):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except StorageError as error:
                if error.errno in _NO_LOCKS:
                    break
                if error.errno != errno.EWOULDBLOCK:
                    raise
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"another process is changing the notes of {path}; try again"
                    ) from None
                time.sleep(_POLL_SECONDS)
        with _told("looking for", path):
            if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                raise FileNotFoundError(errno.ENOENT, "it was replaced")
        yield
    finally:
        os.close(descriptor)


def replace_link(path: Path, target: str) -> None:
    """Point a symbolic link at `target`, replacing the link that is there."""
    with _told("linking", path):
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            os.symlink(target, temporary)
        except FileExistsError:
            os.unlink(temporary)
            os.symlink(target, temporary)
        os.replace(temporary, path)


def exists(path: Path) -> bool:
    """Whether something has this name, be it a link that leads nowhere. What cannot be told is a
    StorageError, not a no."""
    with _told("looking for", path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def is_link(path: Path) -> bool:
    """Whether a symbolic link has this name; False where nothing has."""
    with _told("looking for", path):
        try:
            return stat.S_ISLNK(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def list_directory(path: Path) -> list[str]:
    """Names in a directory, sorted."""
    with _told("listing", path):
        return sorted(os.listdir(path))


def remove_file(path: Path) -> None:
    """Remove a file or a link."""
    with _told("removing", path):
        os.unlink(path)


def remove_directory(path: Path) -> None:
    """Remove a directory of plain files; links are removed, never followed. What holds a
    directory is refused."""
    with _told("removing", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in os.listdir(descriptor):
                os.unlink(name, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        os.rmdir(path)


def read_lines(path: Path, longest: int) -> Iterator[bytes]:
    """The whole lines of a regular file, without their ends; those of more than `longest` bytes
    and a last one without an end are left out. No file has no lines."""
    with _told("reading", path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(22, "it is not a regular file")
            beginning = True
            while piece := file.readline(longest + 1):
                ends = piece.endswith(b"\n")
                if beginning and ends:
                    yield piece[:-1]
                beginning = ends


class AppendedLines:
    """A file to which whole lines are appended (0600), each with one write, none made durable.

    Not thread safe. A line that was cut short, by a full disk or a dead writer, is ended before the
    next one begins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._torn = False

    def add(self, line: bytes) -> None:
        """Append a line, given without its end. The file is created by the first one; after a
        failure the next one tries again."""
        with _told("appending to", self._path):
            if self._descriptor is None:
                self._descriptor = self._open()
            data = (b"\n" if self._torn else b"") + line + b"\n"
            written = os.write(self._descriptor, data)
            self._torn = (self._torn or written > 0) and written < len(data)
            if written < len(data):
                raise OSError(28, "the file takes no more bytes")

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, _FILE_MODE)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(22, "it is not a regular file")
            os.fchmod(descriptor, _FILE_MODE)
            end = os.pread(descriptor, 1, max(0, status.st_size - 1))
            self._torn = end not in (b"", b"\n")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Close the file; safe to repeat."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class WriterLock:
    """`flock` on a file, held until `release()`, the end of the process, or (in a forked child)
    the fork."""

    def __init__(self, path: Path) -> None:
        """Take the lock; BusyError names the process that holds it."""
        self._path = path
        with _told("opening", path):
            self._descriptor: int | None = os.open(
                path,
                os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK,
                _FILE_MODE,
            )
        try:
            self._check_file()
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self.release()
            raise BusyError(
                f"{path.parent} is in use by another writer ({printable(holder) or 'unknown'}); "
                "end it or use another repository"
            ) from None
        except OSError as error:
            self.release()
            raise _told_of(error, "locking", path) from error
        # For people: a full disk is no reason not to resume.
        with contextlib.suppress(OSError):
            os.fchmod(self._descriptor, _FILE_MODE)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(
                self._descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0
            )
        # A forked worker shares the lock and would keep it when this process is killed.
        os.register_at_fork(after_in_child=self.release)

    def _holder(self) -> str:
        assert self._descriptor is not None
        try:
            return os.pread(self._descriptor, 200, 0).decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def _check_file(self) -> None:
        assert self._descriptor is not None
        status = os.fstat(self._descriptor)
        # It is written: a hard link could lead to a file of somebody else's.
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise OSError(22, "it is not a regular file of its own; remove it")

    def check(self) -> None:
        """Raise StorageError where the path does not lead to the locked file any more: its
        directory was removed or moved, or another one is in its place."""
        assert self._descriptor is not None
        try:
            locked = os.fstat(self._descriptor)
            found = os.stat(self._path, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            number, what = error.errno or errno.ENOENT, "is gone, or has lost its writer lock"
        except OSError as error:
            raise StorageError.wrap(error, f"looking for {self._path}", self._path) from error
        else:
            if os.path.samestat(locked, found):
                return
            number, what = errno.ESTALE, "is another directory than the one that was opened"
        root = self._path.parent
        raise StorageError(
            number,
            f"{root} {what}; put it back where it was, or begin again with a new Snapshotter",
            str(root),
        ) from None

    def release(self) -> None:
        """Give the lock back; safe to repeat."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Linux closes it whatever it says, and nothing in the file matters.
            with contextlib.suppress(OSError):
                os.close(descriptor)
