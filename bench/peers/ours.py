"""pysnap, behind the interface of the others."""

from __future__ import annotations

from pathlib import Path

import pysnap

from .saver import Parts, Pending


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
        self.overlaps = overlap
        self._snapshotter = pysnap.Snapshotter(
            directory / "repository",
            keep=pysnap.Keep(last=None),
            codec=codec,
            host_memory=host_memory,
            **parts,
        )

    def save(self) -> Pending:
        self._snapshotter.progress.step += 1
        return _PysnapPending(self._snapshotter.save(overlap=self.overlaps))

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
