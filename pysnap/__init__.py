"""pysnap: background snapshots of PyTorch training that resume bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pysnap._version import __version__ as __version__

if TYPE_CHECKING:
    from pysnap.auditing import Audit as Audit
    from pysnap.auditing import Difference as Difference
    from pysnap.auditing import audit as audit
    from pysnap.commit import Handle as Handle
    from pysnap.commit import Stats as Stats
    from pysnap.errors import BusyError as BusyError
    from pysnap.errors import ClosedError as ClosedError
    from pysnap.errors import ConfigError as ConfigError
    from pysnap.errors import CorruptError as CorruptError
    from pysnap.errors import Error as Error
    from pysnap.errors import FormatError as FormatError
    from pysnap.errors import MismatchError as MismatchError
    from pysnap.errors import NotFoundError as NotFoundError
    from pysnap.errors import StateError as StateError
    from pysnap.errors import StorageError as StorageError
    from pysnap.errors import TornError as TornError
    from pysnap.estimating import DeviceNeed as DeviceNeed
    from pysnap.estimating import Estimate as Estimate
    from pysnap.estimating import estimate as estimate
    from pysnap.files import load as load
    from pysnap.files import open_view
    from pysnap.files import save as save
    from pysnap.loader import resumable as resumable
    from pysnap.observers import Failure as Failure
    from pysnap.observers import SnapshotInfo as SnapshotInfo
    from pysnap.preemption import Preempted as Preempted
    from pysnap.progress import Progress as Progress
    from pysnap.retention import Keep as Keep
    from pysnap.snapshotter import Snapshotter as Snapshotter
    from pysnap.view import Entry as Entry
    from pysnap.view import View as View

    open = open_view

# Imported on first use, so that the engine, the reader and the command line load without torch.
# "module:name" where the name at home differs: no module of pysnap hides the builtin `open`.
_HOME = {
    "Audit": "auditing",
    "Difference": "auditing",
    "audit": "auditing",
    "BusyError": "errors",
    "ClosedError": "errors",
    "ConfigError": "errors",
    "CorruptError": "errors",
    "Error": "errors",
    "FormatError": "errors",
    "MismatchError": "errors",
    "NotFoundError": "errors",
    "StateError": "errors",
    "StorageError": "errors",
    "TornError": "errors",
    "DeviceNeed": "estimating",
    "Estimate": "estimating",
    "estimate": "estimating",
    "load": "files",
    "open": "files:open_view",
    "save": "files",
    "resumable": "loader",
    "Keep": "retention",
    "Handle": "commit",
    "Progress": "progress",
    "Failure": "observers",
    "SnapshotInfo": "observers",
    "Preempted": "preemption",
    "Snapshotter": "snapshotter",
    "Stats": "commit",
    "Entry": "view",
    "View": "view",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pysnap' has no attribute {name!r}")
    from importlib import import_module

    module, _, other_name = _HOME[name].partition(":")
    value = getattr(import_module(f"pysnap.{module}"), other_name or name)
    globals()[name] = value
    return value
