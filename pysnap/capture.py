"""Taking a snapshot's bytes: state -> tree and plan -> a job of the engine -> packs and a
manifest."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import math
import operator
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pysnap import _engine, trace, tree
from pysnap.config import Config
from pysnap.devices import is_capturing
from pysnap.errors import Error, StateError, StorageError, TornError
from pysnap.estimating import Growth
from pysnap.gate import Gate
from pysnap.layout import HOST, Leaf, Places, Plan, current_streams, make_plan
from pysnap.manifest import ELEMENTS, Manifest
from pysnap.memory import advice_to_lock, available_memory
from pysnap.skeleton import Skeleton
from pysnap.zstd import zstd_libraries

_log = logging.getLogger("pysnap")

# How long training waits for a disk that takes nothing, before the snapshot is given up.
DISK_SECONDS = 60.0
_POLL_SECONDS = 0.02
_NAMES_SHOWN = 3
_PAGE = 4096
_INDEX_BYTES = 256
"""Of the manifest, for a tensor or a chunk, at most; names are in the tree."""


@dataclass(frozen=True)
class Size:
    """What a snapshot needs, in bytes: of its tensors; at most of the disk, with its manifest and
    uncompressed; of host memory, for staging, if it comes to that; of its tensors, those that are
    copied before a step ends although others are not."""

    stream: int
    disk: int
    staging: int
    eager: int = 0
    devices: frozenset[int] = frozenset()


class Stager:
    """Owns an engine. One snapshot at a time; the methods may be called by one thread at a time."""

    def __init__(self, config: Config) -> None:
        """Start the engine's threads. Raises StorageError where the system refuses threads."""
        self._chunk_size = config.chunk_size
        self._bound = bound = config.host_memory or max(
            available_memory() // 4, 2 * config.chunk_size
        )
        cores = _engine.available_processors()
        zstd = () if config.codec == "none" else zstd_libraries()
        if zstd and not _engine.has_zstd(zstd):
            _log.warning(
                "no libzstd is found: integers are stored larger; install the zstandard package"
            )
            zstd = ()
        self._engine = _engine.Engine(
            chunk_size=config.chunk_size,
            slots=max(2, bound // config.chunk_size),
            workers=config.workers or min(8, max(3, cores // 2)),
            copy_threads=config.copy_threads or min(8, cores),
            nice=config.nice,
            direct_io=config.direct_io,
            codec=config.codec,
            zstd=zstd,
            disk_seconds=DISK_SECONDS,
        )
        self._steady: _Steady | None = None
        self._told: str | None = None  # why copies from devices are slow

    @property
    def engine(self) -> _engine.Engine:
        """What copies; a restore may use its staging memory between two snapshots."""
        return self._engine

    def measure(self, state: object, *, gate: Gate, growth: Growth) -> Size:
        """Plan the capture of `state`: what a snapshot of it will need when `growth` has come.
        Raises StateError for what cannot be stored."""
        with trace.span("plan"):
            planned = self._plan(state, gate)
        plan = planned.plan
        stream = plan.stream + growth.total
        # Of each element type there is a chunk that is not full.
        chunks = len(plan.spans) + growth.total // self._chunk_size + len(ELEMENTS)
        tensors = len(plan.records) + growth.tensors
        tree_size = len(json.dumps(planned.tree, ensure_ascii=False).encode())
        index = tree_size + _INDEX_BYTES * (chunks + tensors)
        eager = int(plan.spans["raw"][: plan.eager].sum()) if plan.eager < len(plan.spans) else 0
        return Size(
            stream=stream,
            disk=stream + _PAGE * chunks + index,
            staging=min(stream, self._bound),
            eager=eager,
            devices=plan.devices - {HOST},
        )

    def reserve(self, size: Size) -> None:
        """Have staging memory made ready in the background, as far as the bound allows; on devices,
        memory for what cannot wait for the gate where other bytes can."""
        devices = sorted(size.devices)
        self._engine.reserve(size.stream, devices=devices, eager=size.eager)

    def wait_reserved(self) -> None:
        """Block until that memory is ready."""
        self._engine.wait_reserved()

    def begin(self, state: object, *, gate: Gate | None = None, overlap: bool = False) -> Capture:
        """Plan the capture of `state`. Nothing is copied yet. With `overlap`, what waits for `gate`
        may be copied after `Capture.copy` returns, until `Capture.gate`. Raises StateError for what
        cannot be stored."""
        planned = self._plan(state, gate)
        plan = planned.plan
        if plan.devices - {HOST}:
            self._tell_pageable()
        eager = plan.eager if overlap else len(plan.spans)
        job = self._engine.begin(plan.extents, plan.spans, eager)
        waiting = planned.waiting() if eager < len(plan.spans) else []
        is_short = bool(waiting) and eager < 2
        return Capture(planned, waiting, job, self._chunk_size, is_short=is_short)

    def _tell_pageable(self) -> None:
        why = self._engine.why_pageable()
        if why is not None and why != self._told:
            self._told = why
            _log.warning(
                "copies from CUDA devices are slow, and the step waits for them: %s; %s",
                why,
                advice_to_lock(),
            )

    def close(self) -> None:
        """Abort what is in flight and join the threads; safe to repeat."""
        self._engine.close()

    def _plan(self, state: object, gate: Gate | None) -> _Planned:
        token = None if gate is None else gate.token()
        steady, self._steady = self._steady, None
        planned = None if steady is None else steady.again(state, token)
        if planned is not None:
            self._steady = steady
            return planned
        leaves: list[tuple[str, Leaf]] = []

        def put(path: str, leaf: Leaf) -> int:
            leaves.append((path, leaf))
            return len(leaves) - 1

        encoded = tree.encode(state, put)
        lazy = frozenset() if gate is None else gate.addresses()
        plan = make_plan(leaves, chunk_size=self._chunk_size, lazy=lazy)
        found = [leaf for _, leaf in leaves]
        if plan.in_place:
            self._steady = _Steady.of(state, encoded, plan, found, token)
        return _Planned(encoded, plan, found, plan.waits, list(range(len(found))))


@dataclass
class _Planned:
    """A state that is to be captured: its tree, its plan and its leaves, of which `indices` are the
    numbers in the tree; `waits` says which may be copied later."""

    tree: tree.Json
    plan: Plan
    leaves: list[Leaf]
    waits: list[bool]
    indices: list[int]

    def waiting(self) -> list[torch.Tensor]:
        """The tensors that may be copied later."""
        return list(compress(self.leaves, self.waits))  # type: ignore[arg-type]  # no array waits

    def name_of(self, number: int) -> str:
        """The path of one of those that `waiting` returns."""
        index = list(compress(self.indices, self.waits))[number]
        return next(path for path, at in tree.leaves(self.tree) if at == index)


class _Part:
    """One part of a state that was captured."""

    def __init__(self, value: object, node: tree.Json, leaves: list[Leaf]) -> None:
        """`leaves` are those of the whole state. Raises ValueError, TypeError or RuntimeError for
        a part with tensors by which the next one cannot be known."""
        # In a list, for a part may be a tensor or a number itself.
        self._skeleton: Skeleton | None = None
        self.indices: list[int] = []
        try:
            self._skeleton = Skeleton([value], [node])
            self.indices = self._skeleton.indices
        except ValueError:
            if any(tree.leaves(node)):
                raise
        self._places = Places([leaves[index] for index in self.indices])

    def again(self, value: object) -> tuple[tree.Json, list[Leaf]] | None:
        """The encoded form of the part's next value and its leaves, in the order of `indices`; None
        if it has other leaves. Raises StateError for what cannot be stored."""
        content = None if self._skeleton is None else self._skeleton.match([value])
        if self._skeleton is None or content is None:
            return None if self.indices else _without_leaves(value)
        if not self._places.are_of(content.leaves):
            return None
        (node,) = self._skeleton.encode(content)
        return node, content.leaves


def _without_leaves(value: object) -> tuple[tree.Json, list[Leaf]] | None:
    leaves: list[Leaf] = []

    def put(_: str, leaf: Leaf) -> int:
        leaves.append(leaf)
        return 0

    node = tree.encode(value, put)
    return None if leaves else (node, [])


class _Steady:
    """A state that was captured: if the next one has the same tensors at the same places, its plan
    is the same, and of its tree only what changed is made anew."""

    def __init__(self, parts: dict[str, _Part], plan: Plan, token: object) -> None:
        self._parts = parts
        # Not the leaves: they would live until the next snapshot.
        self._plan = replace(plan, keep=[])
        self._token = token
        self._indices = [index for part in parts.values() for index in part.indices]
        self._waits = [plan.waits[index] for index in self._indices]

    @classmethod
    def of(
        cls, state: object, encoded: tree.Json, plan: Plan, leaves: list[Leaf], token: object
    ) -> _Steady | None:
        """What is to be known of a state for the next one; None where it is not in parts."""
        if type(state) is not dict or type(encoded) is not dict or list(state) != list(encoded):
            return None
        try:
            parts = {name: _Part(value, encoded[name], leaves) for name, value in state.items()}
        except (ValueError, TypeError, RuntimeError):
            return None
        return cls(parts, plan, token)

    def again(self, state: object, token: object) -> _Planned | None:
        """The capture of `state`, if it differs in plain values alone."""
        if token != self._token or type(state) is not dict or list(state) != list(self._parts):
            return None
        encoded: dict[str, tree.Json] = {}
        leaves: list[Leaf] = []
        for (name, part), value in zip(self._parts.items(), state.values(), strict=True):
            try:
                found = part.again(value)
            except StateError:
                # Encoding the whole names the path.
                found = None
            if found is None:
                return None
            encoded[name] = found[0]
            leaves += found[1]
        plan = replace(self._plan, keep=leaves)
        return _Planned(encoded, plan, leaves, self._waits, self._indices)


class Capture:
    """One snapshot on its way. `copy` and `gate` are for the training thread, `write` for the
    committing one; they run side by side."""

    def __init__(
        self,
        planned: _Planned,
        waiting: list[torch.Tensor],
        job: _engine.Job,
        chunk_size: int,
        *,
        is_short: bool,
    ) -> None:
        """`waiting` are the tensors that are copied after `copy`, which `is_short` where it copies
        a chunk at most."""
        self._tree = planned.tree
        self._records = planned.plan.records
        # The memory, too: a program gives a tensor another one by `tensor.data = ...`.
        storages = _engine.map_ahead(torch.Tensor.untyped_storage, waiting)
        self._keep = [planned.plan.keep, storages]
        self._devices = planned.plan.devices
        self._spans = planned.plan.spans
        self._job = job
        self._chunk_size = chunk_size
        self._guard = _Guard(waiting, planned.name_of)
        self._is_short = is_short
        self._copied = threading.Event()
        self.staged_at = math.inf
        """When every byte was in staging memory, by the monotonic clock; set by then."""

    def copy(self) -> None:
        """Return when the bytes have been read that may not wait, or the job has failed; `write`
        tells a failure. A device reads them ahead of what is queued on its current stream later.

        Where they do not fit into the staging memory, it waits for the disk; after DISK_SECONDS in
        which the disk takes nothing the job fails."""
        try:
            with trace.span("capture"):
                self._job.capture(current_streams(self._devices))
                self._note_staged(0)
            self._tell_given_up()
        finally:
            self._copied.set()

    def _note_staged(self, timeout: float | None) -> None:
        if self._job.wait_staged(timeout):
            self.staged_at = min(self.staged_at, time.monotonic())

    def gate(self) -> None:
        """Return when every byte has been read, or is read ahead of what is queued on the device's
        current stream later: before it, nothing may change what is copied lazily. Safe to repeat;
        waits, and a failure is told, as by `copy`."""
        if not self._guard.settled():
            self._job.gate(current_streams(self._devices))
            if is_capturing():
                # What is captured runs later, when nobody asks.
                self._job.wait_staged()
            self._guard.look()
            self._tell_given_up()

    def _tell_given_up(self) -> None:
        """`write` tells it only when the disk moves again."""
        try:
            self._job.wait_written(0)
        except Error as error:
            if isinstance(error, StorageError) and error.errno == errno.ETIMEDOUT:
                _log.warning("a snapshot is given up, and training goes on: %s", error)

    def wait_staged(self, timeout: float | None) -> bool:
        """Wait until every byte has been read, or the job has failed; False after `timeout` s."""
        staged = self._job.wait_staged(timeout)
        if staged and threading.current_thread() is threading.main_thread():
            self._guard.look()
        return staged

    def let_pass(self) -> None:
        """Wait until `copy` has returned where that waits for no slot, and so for nothing that is
        written. The training thread needs the GIL to return, for which it waits up to 5 ms when
        another thread runs Python."""
        if self._is_short:
            self._copied.wait()

    def write(
        self, directory: Path, *, step: int, sequence: int, metadata: dict[str, Any]
    ) -> Manifest:
        """Write the packs into `directory` and make them durable; the manifest that describes
        them."""
        with trace.span("open pack"):
            self._job.open_pack(str(directory / "0.pack"))
        # Changes behind the copy do not matter, so they are looked for at once.
        with trace.span("wait until staged"):
            self._note_staged(None)
        # What follows holds the GIL, which the training thread needs to return from the capture.
        self._copied.wait()
        self._guard.settle()
        self._keep = []
        manifest = Manifest(
            id=uuid.uuid4().hex,
            step=step,
            sequence=sequence,
            created="",
            tree=self._tree,
            tensors=self._records,
            chunk_size=self._chunk_size,
            packs=[],
            chunks=np.empty(0, dtype=_engine.CHUNK),
            metadata=metadata,
        )
        with trace.span("describe"):
            manifest.prepare()
        try:
            with trace.span("wait until written"):
                self._job.wait_written()
        except TornError as error:
            raise TornError(_torn(self._names_in(getattr(error, "chunk", 0)))) from None
        with trace.span("make pack durable"):
            chunks, size = self._job.finish()
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return manifest.completed(created, [("0.pack", size)], chunks)

    def _names_in(self, chunk: int) -> str:
        """Some of the tensors that have bytes in a chunk."""
        raw = self._spans["raw"]
        start = int(raw[:chunk].sum(dtype=np.uint64))
        end = start + int(raw[chunk])
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

    def __init__(
        self, tensors: Iterable[torch.Tensor], name_of: Callable[[int], str] = str
    ) -> None:
        self._tensors = list(tensors)
        self._name_of = name_of
        self._before = _engine.map_ahead(_changes, self._tensors)
        self._changed: int | None = None
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
            changes = _engine.map_ahead(_changes, self._tensors)
            same = map(operator.eq, changes, self._before)
            self._changed = next((at for at, is_same in enumerate(same) if not is_same), None)
            self._tensors = []
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
            raise TornError(_torn(self._name_of(self._changed)))


_changes = operator.attrgetter("_version")


def _torn(names: str) -> str:
    return (
        f"{names} changed before the optimizer's step, while it was being copied; "
        "use overlap=False, which copies everything before training goes on"
    )
