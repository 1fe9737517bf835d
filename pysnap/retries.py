"""When a snapshot is tried again after one failed.

Nothing of a failed snapshot is used again: a failed fsync says nothing of what reached the disk,
and its slots hold other bytes by then. So to try again is to take a new snapshot, of the step at
which training is then.
"""

from __future__ import annotations

import errno
import time

from pysnap.errors import ClosedError, Error, TornError

_FIRST_SECONDS = 1.0
_LONGEST_SECONDS = 60.0

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
# What may be otherwise in a minute, without anybody doing anything about it.
_TRANSIENT = _NO_SPACE | {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


def is_transient(error: BaseException) -> bool:
    """Whether the same may succeed soon."""
    return isinstance(error, Error) and getattr(error, "errno", None) in _TRANSIENT


def lacks_space(error: BaseException) -> bool:
    """Whether the disk, or what this user may use of it, is full."""
    return isinstance(error, Error) and getattr(error, "errno", None) in _NO_SPACE


class Backoff:
    """How long nothing is taken after a failure: 1 s, 2 s, 4 s, at most `longest`. Not thread safe:
    it belongs to whoever takes or commits a snapshot."""

    def __init__(self, longest: float | None = None) -> None:
        """`longest` is a minute at most."""
        self._longest = min(longest or _LONGEST_SECONDS, _LONGEST_SECONDS)
        self._failures = 0
        self._until = 0.0
        self._retries = False

    def failed(self, error: BaseException) -> float | None:
        """Note a failure. The seconds after which a new snapshot is taken because of it; None where
        that must wait until the next is due."""
        self._retries = is_transient(error)
        # A torn snapshot has its cure: the next one is copied at once. Others are the program's.
        if not isinstance(error, Error) or isinstance(error, (TornError, ClosedError)):
            return None
        delay = min(_FIRST_SECONDS * 2.0 ** min(self._failures, 30), self._longest)
        self._failures += 1
        self._until = time.monotonic() + delay
        return delay if self._retries else None

    def succeeded(self) -> None:
        """A snapshot is durable."""
        self._failures = 0
        self._until = 0.0
        self._retries = False

    def holds(self) -> bool:
        """Whether it is too early to take a snapshot that is due."""
        return time.monotonic() < self._until

    def wants_retry(self) -> bool:
        """Whether the last snapshot failed and another is to be taken for it, now or later."""
        return self._retries
