"""Taking a snapshot's bytes: state -> tree and plan -> a job of the engine -> packs and a
manifest."""

from __future__ import annotations

import datetime
import glob
import importlib.util
import logging
import os
import threading
import uuid
from pathlib import Path
from typing import Any

from pysnap import _engine, tree
from pysnap.config import Config
from pysnap.layout import Leaf, Plan, Planner
from pysnap.manifest import Manifest
from pysnap.memory import available_memory

_log = logging.getLogger("pysnap")


def zstd_libraries() -> list[str]:
    """Where libzstd may be: the system's, else the copy inside the zstandard package."""
    names = ["libzstd.so.1"]
    package = importlib.util.find_spec("zstandard")
    if package is not None and package.origin is not None:
        names += glob.glob(os.path.join(os.path.dirname(package.origin), "_cffi*.so"))
    return names


class Stager:
    """Owns an engine. One snapshot at a time; the methods may be called by one thread at a time."""

    def __init__(self, config: Config) -> None:
        """Start the engine's threads. Raises StorageError where the system refuses threads."""
        self._chunk_size = config.chunk_size
        cores = _engine.available_processors()
        bound = config.host_memory or max(available_memory() // 4, 2 * config.chunk_size)
        zstd = [] if config.codec == "none" else zstd_libraries()
        if zstd and not _engine.has_zstd(zstd):
            _log.warning(
                "no libzstd is found: chunks are stored as they are; install the zstandard package"
            )
            zstd = []
        self._engine = _engine.Engine(
            chunk_size=config.chunk_size,
            slots=max(2, bound // config.chunk_size),
            workers=config.workers or min(8, max(2, cores // 2)),
            copy_threads=config.copy_threads or min(8, cores),
            nice=config.nice,
            direct_io=config.direct_io,
            zstd=zstd,
            adaptive=config.codec == "auto",
        )
        self._planner = Planner(config.chunk_size)

    def prepare(self, state: object, *, growth: int) -> None:
        """Plan the capture of `state`, and have staging memory for it and `growth` more bytes made
        ready in the background, as far as the bound allows. Raises StateError for what cannot be
        stored."""
        _, plan = self._plan(state)
        self._engine.reserve(plan.stream + growth)

    def wait_reserved(self) -> None:
        """Block until that memory is ready."""
        self._engine.wait_reserved()

    def begin(self, state: object) -> Capture:
        """Plan the capture of `state`. Nothing is copied yet. Raises StateError for what cannot
        be stored."""
        encoded, plan = self._plan(state)
        job = self._engine.begin(plan.extents, plan.spans, plan.eager)
        return Capture(encoded, plan, job, self._chunk_size)

    def close(self) -> None:
        """Abort what is in flight and join the threads; safe to repeat."""
        self._engine.close()

    def _plan(self, state: object) -> tuple[tree.Json, Plan]:
        leaves: list[tuple[str, Leaf]] = []

        def put(path: str, leaf: Leaf) -> int:
            leaves.append((path, leaf))
            return len(leaves) - 1

        encoded = tree.encode(state, put)
        return encoded, self._planner.plan(leaves)


class Capture:
    """One snapshot on its way. `copy` is for the training thread, `write` for the committing
    one; they run side by side."""

    def __init__(self, encoded: tree.Json, plan: Plan, job: _engine.Job, chunk_size: int) -> None:
        self._tree = encoded
        self._records = plan.records
        self._keep: list[Leaf] = plan.keep
        self._job = job
        self._chunk_size = chunk_size
        self._copied = threading.Event()

    def copy(self) -> None:
        """Return when the bytes have been read, or the job has failed; `write` tells a failure."""
        try:
            self._job.capture()
        finally:
            self._copied.set()
            self._keep = []

    def write(
        self, directory: Path, *, step: int, sequence: int, metadata: dict[str, Any]
    ) -> Manifest:
        """Write the packs into `directory` and make them durable; the manifest that describes
        them."""
        self._job.open_pack(str(directory / "0.pack"))
        self._job.wait_written()
        # What follows holds the GIL, which the training thread needs to return from the capture.
        self._copied.wait()
        chunks, size = self._job.finish()
        return Manifest(
            id=uuid.uuid4().hex,
            step=step,
            sequence=sequence,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            tree=self._tree,
            tensors=self._records,
            chunk_size=self._chunk_size,
            packs=[("0.pack", size)],
            chunks=chunks,
            metadata=metadata,
        )

    def abort(self) -> None:
        """Give up; safe at any time."""
        self._copied.set()
        self._job.abort()
