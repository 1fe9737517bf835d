"""The way back: a snapshot's bytes into live tensors, or into new ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch

from pysnap import _engine, tree
from pysnap.capture import zstd_libraries
from pysnap.errors import CorruptError, MismatchError, NotFoundError
from pysnap.layout import (
    HOST,
    TORCH_ELEMENTS,
    Array,
    Leaf,
    current_streams,
    device_index,
    dtype_name,
    extent_of,
    is_dense,
)
from pysnap.manifest import Record
from pysnap.repository import Snapshot

_MOST_THREADS = 16
_NOTHING = np.empty(0)

_Target: TypeAlias = "tuple[int, int, int, int]"


def load_state(snapshot: Snapshot, names: Collection[str] | None = None) -> object:
    """The state of a snapshot, or what `names` select of it (`tree.prune`), in new tensors on the
    CPU; those that shared memory share it again."""
    node, only = snapshot.manifest.tree, None
    if names is not None:
        try:
            node = tree.prune(node, names)
        except NotFoundError as error:
            raise NotFoundError(f"{snapshot.path}: {error}") from None
        # An index of no record is told by decode().
        only = {index for _, index in tree.leaves(node) if index < len(snapshot.manifest.tensors)}
    restore = Restore(snapshot, only=only)
    state = tree.decode(node, restore.leaves.__getitem__)
    restore.read()
    return state


def read_record(snapshot: Snapshot, record: Record) -> Leaf:
    """One tensor or array in new memory; only the chunks that hold it are read. Raises CorruptError
    as `Restore.read` does."""
    extent = _extent(record, snapshot)
    _check_extents([record], [extent], snapshot)
    leaf = _new(record)
    _read(snapshot, [(record.at, _address(leaf), extent, HOST)])
    return leaf


class Restore:
    """Where each record of a snapshot goes: `leaves[index]` is the live leaf that was given for it,
    of its shape, or a new one. Nothing is written before `read()`."""

    def __init__(
        self,
        snapshot: Snapshot,
        live: Mapping[int, Leaf] = MappingProxyType({}),
        *,
        only: Collection[int] | None = None,
    ) -> None:
        """Allocate the new leaves; where `only` is given, of those records: the others are not
        read, and have an empty array for a leaf. A live tensor of another dtype gets converted
        values.

        Raises CorruptError for a record that cannot be, MismatchError where live tensors share
        memory in another way than the snapshot's."""
        self._snapshot = snapshot
        self._targets: list[_Target] = []
        self._indirect: list[tuple[Leaf, Leaf]] = []
        self._indirect_at: dict[int, int] = {}  # place in the stream of what is at an address
        records = snapshot.manifest.tensors
        dtypes = {record.dtype for record in records}
        itemsizes = {name: dtype_of(name, snapshot).itemsize for name in dtypes}
        extents = [extent_of(record, itemsizes[record.dtype]) for record in records]
        _check_extents(records, extents, snapshot)
        for index, leaf in live.items():
            self._place(leaf, records[index], extents[index])
        _check_overlap(self._targets, snapshot)
        wanted = range(len(records)) if only is None else sorted(only)
        new = [index for index in wanted if index not in live]
        self.leaves: list[Leaf] = [live.get(index, _NOTHING) for index in range(len(records))]
        for index in new:
            if not _is_torch(records[index]) or not extents[index]:
                self.leaves[index] = leaf = _new(records[index])
                self._targets.append((records[index].at, _address(leaf), extents[index], HOST))
        for start, end, members in _shared_ranges(new, extents, snapshot):
            storage = torch.empty(end - start, dtype=torch.uint8, device="cpu").untyped_storage()
            self._targets.append((start, storage.data_ptr(), end - start, HOST))
            for index in members:
                offset = records[index].at - start
                self.leaves[index] = _view(storage, offset, records[index], snapshot)

    def read(self) -> None:
        """Read every record into its leaf; only the chunks that hold them are read.

        Every chunk is checked before its bytes reach a leaf; a damaged one raises CorruptError that
        names the file and the tensors, and leaves other chunks' bytes in place.
        """
        _read(self._snapshot, self._targets)
        for leaf, staging in self._indirect:
            if isinstance(leaf, torch.Tensor):
                leaf.detach().copy_(torch.as_tensor(staging))
            else:
                leaf[...] = staging

    def _place(self, leaf: Leaf, record: Record, extent: int) -> None:
        """A live leaf gets its bytes straight where it has them in the order of the stream."""
        if not _same_order(leaf, record):
            first = self._indirect_at.setdefault(_address(leaf), record.at)
            if extent and first != record.at:
                raise _tied_otherwise(self._snapshot)
            staging = _new(record)
            self._indirect.append((leaf, staging))
            leaf = staging
        device = device_index(leaf) if isinstance(leaf, torch.Tensor) else HOST
        assert device is not None
        self._targets.append((record.at, _address(leaf), extent, device))


def _read(snapshot: Snapshot, targets: list[_Target]) -> None:
    # A tensor without elements may stand anywhere, even behind the stream.
    wanted = sorted({target for target in targets if target[2]})
    try:
        _engine.restore(
            packs=snapshot.packs(),
            chunks=snapshot.manifest.chunks,
            targets=np.array(wanted, dtype=_engine.TARGET),
            threads=min(_MOST_THREADS, _engine.available_processors()),
            zstd=zstd_libraries(),
            streams=current_streams(device for _, _, _, device in wanted),
        )
    except CorruptError as error:
        chunk = getattr(error, "chunk", None)
        raise CorruptError(_name_tensors(str(error), chunk, snapshot)) from None


def verify(snapshot: Snapshot) -> list[str]:
    """What is damaged in a snapshot's packs, a sentence each; empty where it is intact."""
    try:
        damages = _engine.verify(
            packs=snapshot.packs(),
            chunks=snapshot.manifest.chunks,
            threads=min(_MOST_THREADS, _engine.available_processors()),
            zstd=zstd_libraries(),
        )
    except CorruptError as error:
        return [str(error)]
    return [_name_tensors(what, chunk, snapshot) for chunk, what in damages]


def _same_order(leaf: Leaf, record: Record) -> bool:
    if isinstance(leaf, np.ndarray):
        in_order = record.strides is None and leaf.flags.c_contiguous
        return in_order and leaf.dtype.str == record.dtype
    if device_index(leaf) is None or dtype_name(leaf.dtype) != record.dtype:
        return False
    if leaf.is_conj() or leaf.is_neg():
        return False
    if record.strides is None:
        return leaf.is_contiguous()
    return is_dense(leaf) and leaf.stride() == record.strides


def dtype_of(name: str, snapshot: Snapshot) -> torch.dtype | np.dtype[Any]:
    """The dtype that a record names. Raises MismatchError where this torch has none of that name,
    CorruptError where it is none."""
    if name in TORCH_ELEMENTS:
        known: torch.dtype | None = getattr(torch, name, None)
        if known is None:
            raise MismatchError(
                f"{snapshot.path} holds a tensor of dtype {name}, which this version of "
                "torch does not have; use a newer torch"
            )
        return known
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise CorruptError(f"{snapshot.path} holds a tensor of unknown dtype {name!r}") from None
    if dtype.hasobject or dtype.str != name:
        raise CorruptError(f"{snapshot.path} holds a tensor of unknown dtype {name!r}")
    return dtype


def _extent(record: Record, snapshot: Snapshot) -> int:
    return extent_of(record, dtype_of(record.dtype, snapshot).itemsize)


def _check_extents(records: list[Record], extents: list[int], snapshot: Snapshot) -> None:
    stream = snapshot.manifest.stream
    for record, extent in zip(records, extents, strict=True):
        if extent and record.at + extent > stream:
            raise CorruptError(
                f"{snapshot.path} holds a tensor that reaches past the end of the stream"
            )


def _shared_ranges(
    indices: list[int], extents: list[int], snapshot: Snapshot
) -> list[tuple[int, int, list[int]]]:
    """Ranges of the stream, and the tensors in each, which share memory."""
    records = snapshot.manifest.tensors
    ranges: list[tuple[int, int, list[int]]] = []
    for index in sorted(indices, key=lambda index: records[index].at):
        start, end = records[index].at, records[index].at + extents[index]
        if not extents[index] or not _is_torch(records[index]):
            continue
        if ranges and start < ranges[-1][1]:
            first, last, members = ranges[-1]
            ranges[-1] = (first, max(end, last), [*members, index])
        else:
            ranges.append((start, end, [index]))
    return ranges


def _view(
    storage: torch.UntypedStorage, offset: int, record: Record, snapshot: Snapshot
) -> torch.Tensor:
    empty = torch.empty(0, dtype=getattr(torch, record.dtype), device="cpu")
    if offset % empty.element_size():
        raise CorruptError(f"{snapshot.path} holds tensors that overlap by parts of an element")
    strides = record.strides or _row_major(record.shape)
    return empty.set_(storage, offset // empty.element_size(), record.shape, strides)


def _is_torch(record: Record) -> bool:
    return record.dtype in TORCH_ELEMENTS


def _address(leaf: Leaf) -> int:
    if isinstance(leaf, np.ndarray):
        return int(leaf.__array_interface__["data"][0])
    return leaf.data_ptr()


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _new(record: Record) -> Leaf:
    if not _is_torch(record):
        return _new_array(record)
    return torch.empty_strided(
        record.shape,
        record.strides or _row_major(record.shape),
        dtype=getattr(torch, record.dtype),
        device="cpu",
    )


def _new_array(record: Record) -> Array:
    dtype = np.dtype(record.dtype)
    if record.strides is None:
        return np.empty(record.shape, dtype)
    memory = np.empty(extent_of(record, dtype.itemsize), np.uint8)
    strides = tuple(stride * dtype.itemsize for stride in record.strides)
    array: Array = np.ndarray(record.shape, dtype, memory, strides=strides)
    return array


def _tied_otherwise(snapshot: Snapshot) -> MismatchError:
    return MismatchError(
        "tensors that share memory (are tied) in the live state do not in "
        f"{snapshot.path}; tie them in the same way"
    )


def _check_overlap(targets: list[_Target], snapshot: Snapshot) -> None:
    """Live tensors that share memory must share bytes of the stream in the same way, else one
    would overwrite the other."""
    end, shift = 0, 0
    for at, address, length, _ in sorted(targets, key=lambda target: (target[1], -target[2])):
        if length and address < end and address - at != shift:
            raise _tied_otherwise(snapshot)
        if address + length > end:
            end, shift = address + length, address - at


def _name_tensors(message: str, chunk: int | None, snapshot: Snapshot) -> str:
    if chunk is None:
        return message
    manifest = snapshot.manifest
    raw = manifest.chunks["raw"].astype(np.uint64)
    start = int(raw[:chunk].sum())
    end = start + int(raw[chunk])
    names = [
        path
        for path, index in tree.leaves(manifest.tree)
        if manifest.tensors[index].at < end
        and manifest.tensors[index].at + _extent(manifest.tensors[index], snapshot) > start
    ]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{message}; it holds {shown}"


def describe(leaf: Leaf | Record | None) -> str:
    """Dtype and shape for messages, such as `float32[3, 4]`."""
    if leaf is None:
        return "-"
    dtype: Any = leaf.dtype
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else getattr(dtype, "str", dtype)
    return f"{name}{list(leaf.shape)}"
