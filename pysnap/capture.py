"""Taking a snapshot's bytes: state -> tree and plan -> a job of the engine -> packs and a
manifest."""

from __future__ import annotations

import datetime
import logging
import threading
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pysnap import _engine, tree
from pysnap.config import Config
from pysnap.errors import TornError
from pysnap.layout import HOST, Leaf, Plan, Planner, current_streams
from pysnap.manifest import Manifest
from pysnap.memory import available_memory
from pysnap.zstd import zstd_libraries

_log = logging.getLogger("pysnap")

_POLL_SECONDS = 0.02
_NAMES_SHOWN = 3


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
        self._told: str | None = None  # why copies from devices are slow

    def prepare(self, state: object, *, lazy: Collection[int], growth: int) -> None:
        """Plan the capture of `state`, and have staging memory for it and `growth` more bytes made
        ready in the background, as far as the bound allows. Raises StateError for what cannot be
        stored."""
        _, plan, _ = self._plan(state, lazy)
        self._engine.reserve(plan.stream + growth, devices=sorted(plan.devices - {HOST}))

    def wait_reserved(self) -> None:
        """Block until that memory is ready."""
        self._engine.wait_reserved()

    def begin(
        self, state: object, *, lazy: Collection[int] = frozenset(), overlap: bool = False
    ) -> Capture:
        """Plan the capture of `state`. Nothing is copied yet. With `overlap`, the tensors at the
        addresses `lazy` may be copied after `Capture.copy` returns, until `Capture.gate`. Raises
        StateError for what cannot be stored."""
        encoded, plan, leaves = self._plan(state, lazy)
        if plan.devices - {HOST}:
            self._tell_pageable()
        eager = plan.eager if overlap else len(plan.spans)
        job = self._engine.begin(plan.extents, plan.spans, eager)
        guarded = [
            (path, leaf)
            for path, leaf in (leaves if eager < len(plan.spans) else ())
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() in lazy
        ]
        return Capture(encoded, plan, job, self._chunk_size, _Guard(guarded))

    def _tell_pageable(self) -> None:
        why = self._engine.why_pageable()
        if why is not None and why != self._told:
            self._told = why
            _log.warning("copies from CUDA devices are slow, and the step waits for them: %s", why)

    def close(self) -> None:
        """Abort what is in flight and join the threads; safe to repeat."""
        self._engine.close()

    def _plan(
        self, state: object, lazy: Collection[int]
    ) -> tuple[tree.Json, Plan, list[tuple[str, Leaf]]]:
        leaves: list[tuple[str, Leaf]] = []

        def put(path: str, leaf: Leaf) -> int:
            leaves.append((path, leaf))
            return len(leaves) - 1

        encoded = tree.encode(state, put)
        return encoded, self._planner.plan(leaves, lazy), leaves


class Capture:
    """One snapshot on its way. `copy` and `gate` are for the training thread, `write` for the
    committing one; they run side by side."""

    def __init__(
        self,
        encoded: tree.Json,
        plan: Plan,
        job: _engine.Job,
        chunk_size: int,
        guard: _Guard,
    ) -> None:
        self._tree = encoded
        self._records = plan.records
        self._keep: list[Leaf] = plan.keep
        self._devices = plan.devices
        self._raw = plan.spans["raw"].astype(np.uint64)
        self._job = job
        self._chunk_size = chunk_size
        self._guard = guard
        self._copied = threading.Event()

    def copy(self) -> None:
        """Return when the bytes have been read that may not wait, or the job has failed; `write`
        tells a failure. A device reads them ahead of what is queued on its current stream later."""
        try:
            self._job.capture(current_streams(self._devices))
        finally:
            self._copied.set()

    def gate(self) -> None:
        """Return when every byte has been read, or is read ahead of what is queued on the device's
        current stream later: before it, nothing may change what is copied lazily. Safe to repeat;
        `write` tells a failure."""
        if not self._guard.settled():
            self._job.gate(current_streams(self._devices))
            self._guard.look()

    def wait_staged(self, timeout: float | None) -> bool:
        """Wait until every byte has been read, or the job has failed; False after `timeout` s."""
        staged = self._job.wait_staged(timeout)
        if staged and threading.current_thread() is threading.main_thread():
            self._guard.look()
        return staged

    def write(
        self, directory: Path, *, step: int, sequence: int, metadata: dict[str, Any]
    ) -> Manifest:
        """Write the packs into `directory` and make them durable; the manifest that describes
        them."""
        self._job.open_pack(str(directory / "0.pack"))
        # Changes behind the copy do not matter, so they are looked for at once.
        self._job.wait_staged()
        # What follows holds the GIL, which the training thread needs to return from the capture.
        self._copied.wait()
        self._guard.settle()
        self._keep = []
        try:
            self._job.wait_written()
        except TornError as error:
            raise TornError(_torn(self._names_in(getattr(error, "chunk", 0)))) from None
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

    def _names_in(self, chunk: int) -> str:
        """Some of the tensors that have bytes in a chunk."""
        start = int(self._raw[:chunk].sum())
        end = start + int(self._raw[chunk])
        places = sorted((self._records[index].at, path) for path, index in tree.leaves(self._tree))
        before = [path for at, path in places if at <= start][-1:]
        inside = [path for at, path in places if start < at < end]
        return " or ".join([*before, *inside][:_NAMES_SHOWN])

    def abort(self) -> None:
        """Give up; safe at any time."""
        self._copied.set()
        self._guard.release()
        self._job.abort()
        self._keep = []


class _Guard:
    """Tensors that nothing may change before a capture has read them, told by torch's count of the
    changes of each.

    An operation changes the bytes first and the count afterwards, so the counts say something only
    where no operation is under way: in the training thread, which must be the main thread.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._tensors = [(path, tensor, tensor._version) for path, tensor in tensors]
        self._changed: str | None = None
        self._looked = False
        self._settled = threading.Event()  # set after _changed
        if not self._tensors:
            self._settled.set()

    def settled(self) -> bool:
        """Whether it is known if a tensor changed."""
        return self._settled.is_set()

    def look(self) -> None:
        """Find out whether a tensor changed until now; later changes do not matter. For the main
        thread."""
        # The main thread may be in here when it is made to look: the event's lock would be its own.
        if not self._looked:
            self._looked = True
            changed = (path for path, tensor, before in self._tensors if tensor._version != before)
            self._changed = next(changed, None)
            self._settled.set()

    def release(self) -> None:
        """Nobody needs to know any more."""
        self._looked = True
        self._settled.set()

    def settle(self) -> None:
        """Wait until it is known whether a tensor changed while it was read; everything has been
        read. Raises TornError if one did. For another thread than the main one."""
        asked = self._settled.is_set()
        while not self._settled.is_set():
            # Between two of its instructions, the main thread has no operation under way.
            asked = asked or _engine.call_in_main_thread(self.look)
            if not threading.main_thread().is_alive():
                # The program has ended: nothing changes tensors any more.
                self.look()
            self._settled.wait(_POLL_SECONDS)
        if self._changed is not None:
            raise TornError(_torn(self._changed))


def _torn(names: str) -> str:
    return (
        f"{names} changed before the optimizer's step, while it was being copied; "
        "use overlap=False, which copies everything before training goes on"
    )
