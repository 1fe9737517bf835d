"""Exit statuses; they are promises."""

from __future__ import annotations

from pysnap.errors import (
    BusyError,
    ConfigError,
    CorruptError,
    Error,
    FormatError,
    NotFoundError,
)

FINE = 0
NO = 1
USAGE = 2
NOTHING = 3
BUSY = 4
REFUSED = 5

HELP = """exit status
  0  fine
  1  no: something is damaged, of a newer format, differs, or does not work
  2  the command line or a setting is wrong
  3  there is no such repository, snapshot, tag or tensor
  4  another process writes to the repository
  5  the system refused: no permission, no space, no memory, no such library"""


def of(error: Error) -> int:
    """The exit status of a command that ends with this error."""
    for kind, status in (
        (ConfigError, USAGE),
        (NotFoundError, NOTHING),
        (BusyError, BUSY),
        (CorruptError, NO),
        (FormatError, NO),
    ):
        if isinstance(error, kind):
            return status
    return REFUSED
