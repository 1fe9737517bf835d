"""The ways to save a state that are compared, behind one interface: pysnap, torch.save, DCP."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch

import pysnap

# Anything with state_dict(), by name.
Parts = dict[str, Any]


class Pending(Protocol):
    """A save that was asked for."""

    def gate(self) -> None:
        """Return when the next optimizer step may change the state."""

    def done(self) -> bool:
        """Whether its background part has ended."""

    def wait(self) -> Path:
        """Block until it is durable; the file or directory that holds it."""


class Saver(Protocol):
    """A way to save the same objects again and again."""

    def save(self) -> Pending:
        """Return when training may go on."""

    def wait_ready(self) -> None:
        """Block until what is prepared in the background is ready."""

    def close(self) -> None:
        """Release everything."""


class Pysnap:
    """A Snapshotter that keeps every snapshot, so that no deletion falls into a measurement."""

    def __init__(
        self,
        parts: Parts,
        directory: Path,
        *,
        host_memory: int | None,
        codec: str = "auto",
        overlap: bool = False,
    ) -> None:
        self._overlap = overlap
        self._snapshotter = pysnap.Snapshotter(
            directory / "repository",
            keep=pysnap.Keep(last=None),
            codec=codec,
            host_memory=host_memory,
            **parts,
        )

    def save(self) -> Pending:
        self._snapshotter.progress.step += 1
        return _PysnapPending(self._snapshotter.save(overlap=self._overlap))

    def wait_ready(self) -> None:
        self._snapshotter.wait_ready()

    def close(self) -> None:
        self._snapshotter.close()


class _PysnapPending:
    def __init__(self, handle: pysnap.Handle) -> None:
        self._handle = handle

    def gate(self) -> None:
        self._handle.gate()

    def done(self) -> bool:
        return self._handle.done()

    def wait(self) -> Path:
        return self._handle.wait().path


class TorchSave:
    """`torch.save` to a new file."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        self._parts = parts
        self._directory = directory
        self._count = 0

    def save(self) -> Pending:
        self._count += 1
        path = self._directory / f"{self._count}.pt"
        torch.save(_state_dict(self._parts), path)
        return _TorchSavePending(path)

    def wait_ready(self) -> None:
        """Nothing is prepared."""

    def close(self) -> None:
        """Nothing is held."""


class _TorchSavePending:
    def __init__(self, path: Path) -> None:
        self._path = path

    def gate(self) -> None:
        """It is done."""

    def done(self) -> bool:
        return True

    def wait(self) -> Path:
        sync(self._path)
        return self._path


class Dcp:
    """`torch.distributed.checkpoint.async_save` of one process, with its default stager, or with
    the one that stages in pinned memory."""

    def __init__(self, parts: Parts, directory: Path, *, pinned: bool = False) -> None:
        """Raises ImportError where this torch has no such stager."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self._async_save = async_save
        self._writer = FileSystemWriter
        # Versions without it tell by themselves that there is no process group.
        has_no_dist = "no_dist" in inspect.signature(async_save).parameters
        self._options: dict[str, Any] = {"no_dist": True} if has_no_dist else {}
        if pinned:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            # Staged within the call, as pysnap does.
            options = StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=torch.cuda.is_available(),
            )
            self._options["async_stager"] = DefaultStager(options)
        self._parts = parts
        self._directory = directory
        self._count = 0

    def save(self) -> Pending:
        self._count += 1
        path = self._directory / f"dcp-{self._count}"
        answer: Any = self._async_save(
            _state_dict(self._parts), storage_writer=self._writer(path), **self._options
        )
        # A plain future, or one of two in newer versions with some stagers.
        return _DcpPending(getattr(answer, "upload_completion", answer), path)

    def wait_ready(self) -> None:
        """Nothing is prepared."""

    def close(self) -> None:
        """Nothing is held."""


class _DcpPending:
    def __init__(self, future: Future[Any], path: Path) -> None:
        self._future = future
        self._path = path

    def gate(self) -> None:
        """The default stager has copied everything."""

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> Path:
        self._future.result()
        sync(self._path)
        return self._path


class TorchSnapshot:
    """`torchsnapshot.Snapshot.async_take`."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        """Raises ImportError where it is not installed."""
        import torchsnapshot  # type: ignore[import-not-found]  # no dependency of ours

        self._take = torchsnapshot.Snapshot.async_take
        self._parts = parts
        self._directory = directory
        self._count = 0

    def save(self) -> Pending:
        self._count += 1
        path = self._directory / f"torchsnapshot-{self._count}"
        return _TorchSnapshotPending(self._take(str(path), self._parts), path)

    def wait_ready(self) -> None:
        """Nothing is prepared."""

    def close(self) -> None:
        """Nothing is held."""


class _TorchSnapshotPending:
    def __init__(self, pending: Any, path: Path) -> None:
        self._pending = pending
        self._path = path

    def gate(self) -> None:
        """Everything was copied in the call."""

    def done(self) -> bool:
        return bool(self._pending.done())

    def wait(self) -> Path:
        self._pending.wait()
        sync(self._path)
        return self._path


def _state_dict(parts: Parts) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


PYSNAP = "pysnap"
PYSNAP_FAST = "pysnap, codec fast"
PYSNAP_RAW = "pysnap, codec none"
PYSNAP_BOUNDED = "pysnap, bounded"
PYSNAP_OVERLAP = "pysnap, overlap"
TORCH_SAVE = "torch.save"
DCP = "DCP async_save"
DCP_PINNED = "DCP async_save, pinned"
TORCHSNAPSHOT = "torchsnapshot"
PEERS = {"torch.save": TORCH_SAVE, "dcp": DCP}
"""Names on the command line, and in the results."""


def open_saver(subject: str, parts: Parts, directory: Path, host_memory: int | None) -> Saver:
    """The way to save `parts` in `directory` that `subject` names. `host_memory` bounds pysnap's
    staging memory; None leaves it to pysnap."""
    makers: dict[str, Callable[[], Saver]] = {
        PYSNAP: lambda: Pysnap(parts, directory, host_memory=host_memory),
        PYSNAP_OVERLAP: lambda: Pysnap(parts, directory, overlap=True, host_memory=host_memory),
        PYSNAP_FAST: lambda: Pysnap(parts, directory, codec="fast", host_memory=host_memory),
        PYSNAP_RAW: lambda: Pysnap(parts, directory, codec="none", host_memory=host_memory),
        PYSNAP_BOUNDED: lambda: Pysnap(parts, directory, host_memory=host_memory),
        TORCH_SAVE: lambda: TorchSave(parts, directory),
        DCP: lambda: Dcp(parts, directory),
        DCP_PINNED: lambda: Dcp(parts, directory, pinned=True),
        TORCHSNAPSHOT: lambda: TorchSnapshot(parts, directory),
    }
    return makers[subject]()


def sync(path: Path) -> None:
    """Make a file, or a directory with all that is in it, durable, and its name, too."""
    for place in [*(path.rglob("*") if path.is_dir() else ()), path, path.parent]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
