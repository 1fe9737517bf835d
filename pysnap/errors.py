"""The errors that pysnap raises, and how they show what was read; each derives from `Error`."""

from __future__ import annotations

import errno
import os

_MOST_SHOWN = 200
# What the process or the machine lacked when it was to look at a file, and what to do about it.
_LACKS = {
    errno.EMFILE: "close files that this process holds open, or raise its limit (`ulimit -n`)",
    errno.ENFILE: "end programs that hold many files open, or raise the system's limit",
    errno.ENOMEM: "free memory, and try again",
    errno.ENOBUFS: "free memory, and try again",
    errno.EAGAIN: "try again",
    errno.EINTR: "try again",
}


def printable(text: str, most: int = _MOST_SHOWN) -> str:
    """`text`, which somebody else wrote, for a message: without characters that could upset a
    terminal or a log, and cut to `most` characters."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]
    )
    return shown if len(text) <= most else shown + "..."


class Error(Exception):
    """Base class of all errors of pysnap."""

    @property
    def says_nothing(self) -> bool:
        """Whether the process or the machine lacked what looking takes, such as a descriptor: what
        is stored may be whole all the same."""
        return False

    def behind(self, beginning: str) -> Error:
        """The same error, of which the sentence begins with `beginning`; this one is its cause."""
        error = type(self)(f"{beginning}{self}")
        error.__cause__ = self
        return error


class ConfigError(Error, ValueError):
    """A setting is unknown or malformed; the message names the argument or the environment
    variable."""


class StateError(Error, TypeError):
    """The state holds something that cannot be stored; the message names its path in the state."""


class StorageError(Error, OSError):
    """The file system refused an operation; `errno` and `filename` say what and where."""

    def __str__(self) -> str:
        # The sentence names the path already, which OSError would repeat.
        advice = f"; {_LACKS[self.errno]}" if self.errno in _LACKS else ""
        return f"{self.strerror} (errno {self.errno}){advice}"

    @property
    def says_nothing(self) -> bool:
        """See Error."""
        return self.errno in _LACKS

    def behind(self, beginning: str) -> StorageError:
        """See Error."""
        error = type(self)(self.errno, f"{beginning}{self.strerror}", self.filename)
        error.__cause__ = self
        return error

    @classmethod
    def wrap(cls, error: OSError, doing: str, path: str | os.PathLike[str]) -> StorageError:
        """The same failure as a `StorageError`: `doing` names the operation, `path` where it was
        tried."""
        reason = error.strerror or str(error)
        return cls(error.errno, f"{doing} failed: {reason}", os.fspath(path))


class BusyError(Error):
    """Another process writes to this repository."""


class NotFoundError(Error):
    """There is no such repository or snapshot."""


class FormatError(Error):
    """The repository or snapshot has a format that this version of pysnap does not read."""


class CorruptError(Error):
    """Stored bytes are damaged; the message names the file and, where known, the tensor."""


class TornError(Error):
    """A tensor changed while it was being captured; the message names it."""


class MismatchError(Error):
    """The snapshot does not fit the live objects; the message lists every difference."""


class ClosedError(Error):
    """The object is closed, or belongs to another process (a forked child)."""
