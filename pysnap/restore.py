"""The way back: a snapshot's bytes into live tensors, or into new ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch

from pysnap import _engine, storage, tree
from pysnap.dtypes import TORCH_ELEMENTS, itemsize
from pysnap.errors import CorruptError, Error, MismatchError, NotFoundError, printable
from pysnap.layout import (
    HOST,
    Array,
    Leaf,
    current_streams,
    device_index,
    dtype_name,
    is_dense,
)
from pysnap.manifest import Record
from pysnap.repository import Snapshot
from pysnap.zstd import zstd_libraries

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
    try:
        state = tree.decode(node, restore.leaves.__getitem__)
    except (CorruptError, MismatchError) as error:
        raise type(error)(f"{snapshot.path}: {error}") from None
    restore.read()
    return state


def read_record(snapshot: Snapshot, record: Record) -> Leaf:
    """One tensor or array in new memory; only the chunks that hold it are read. Raises CorruptError
    as `Restore.read` does."""
    dtype_of(record.dtype, snapshot)
    _check_packs([(record.at, record.extent)], snapshot)
    leaf = _new(record, snapshot)
    _read(snapshot, [(record.at, _address(leaf), record.extent, HOST)])
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
        for dtype in {record.dtype for record in records}:
            dtype_of(dtype, snapshot)
        wanted = range(len(records)) if only is None else sorted(only)
        # Before memory is allocated for what they do not hold.
        _check_packs([(records[index].at, records[index].extent) for index in wanted], snapshot)
        for index, leaf in live.items():
            self._place(leaf, records[index])
        _check_overlap(self._targets, snapshot)
        self.leaves: list[Leaf] = [live.get(index, _NOTHING) for index in range(len(records))]
        new = [index for index in wanted if index not in live]
        for is_torch in (True, False):
            kind = [index for index in new if _is_torch(records[index]) == is_torch]
            self._allocate(kind)

    def read(self, engine: _engine.Engine | None = None) -> None:
        """Read every record into its leaf; only the chunks that hold them are read. On their way to
        devices they use the staging memory of `engine`, which has no job in flight.

        Every chunk is checked before its bytes reach a leaf; a damaged one raises CorruptError that
        names the file and the tensors, and leaves other chunks' bytes in place.
        """
        _read(self._snapshot, self._targets, engine)
        for leaf, staging in self._indirect:
            if isinstance(leaf, torch.Tensor):
                leaf.detach().copy_(torch.as_tensor(staging))
            else:
                leaf[...] = staging

    def _allocate(self, indices: list[int]) -> None:
        """New leaves for records of one kind; those that share bytes of the stream share memory."""
        records = self._snapshot.manifest.tensors
        for index in indices:
            if not records[index].extent:
                self.leaves[index] = _new(records[index], self._snapshot)
        for start, end, members in _shared_ranges(indices, records):
            if len(members) == 1:
                self.leaves[members[0]] = leaf = _new(records[members[0]], self._snapshot)
                self._targets.append((start, _address(leaf), end - start, HOST))
                continue
            # Where the largest elements lie at multiples of their size, the others do, too.
            size, at = max((itemsize(records[m].dtype), records[m].at) for m in members)
            lead = (start - at) % size
            memory = _memory(lead + end - start, self._snapshot)
            self._targets.append((start, memory.data_ptr() + lead, end - start, HOST))
            for index in members:
                offset = lead + records[index].at - start
                self.leaves[index] = _view(memory, offset, records[index], self._snapshot)

    def _place(self, leaf: Leaf, record: Record) -> None:
        """A live leaf gets its bytes straight where it has them in the order of the stream."""
        if not _same_order(leaf, record):
            first = self._indirect_at.setdefault(_address(leaf), record.at)
            if record.extent and first != record.at:
                raise _tied_otherwise(self._snapshot)
            staging = _new(record, self._snapshot)
            self._indirect.append((leaf, staging))
            leaf = staging
        device = device_index(leaf) if isinstance(leaf, torch.Tensor) else HOST
        assert device is not None
        self._targets.append((record.at, _address(leaf), record.extent, device))


def _read(snapshot: Snapshot, targets: list[_Target], engine: _engine.Engine | None = None) -> None:
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
            engine=engine,
        )
    except CorruptError as error:
        chunk = getattr(error, "chunk", None)
        chunks = [] if chunk is None else [chunk]
        raise CorruptError(_name_tensors(str(error), chunks, snapshot)) from None
    except MemoryError:
        raise Error(f"there is no memory to decode the chunks of {snapshot.path}") from None


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
    """The dtype that a record names. Raises MismatchError where this torch has none of that
    name."""
    if name in TORCH_ELEMENTS:
        known: torch.dtype | None = getattr(torch, name, None)
        if known is None:
            raise MismatchError(
                f"{snapshot.path} holds a tensor of dtype {name}, which this version of "
                "torch does not have; use a newer torch"
            )
        return known
    return np.dtype(name)


def _check_packs(ranges: list[tuple[int, int]], snapshot: Snapshot) -> None:
    """Raise the error of a pack that cannot be read, or has another length, and holds bytes of
    these ranges (start, length) of the stream."""
    manifest = snapshot.manifest
    wanted = np.array([(at, at + length) for at, length in ranges if length], np.int64)
    if not len(wanted):
        return
    ends = np.cumsum(manifest.chunks["raw"], dtype=np.int64)
    edges = np.zeros(len(ends) + 1, np.int64)
    np.add.at(edges, np.searchsorted(ends, wanted[:, 0], "right"), 1)
    np.add.at(edges, np.searchsorted(ends, wanted[:, 1], "left") + 1, -1)
    holding = np.cumsum(edges[:-1]) > 0
    for pack in sorted(set(manifest.chunks["pack"][holding].tolist())):
        name, size = manifest.packs[pack]
        found = storage.file_size(snapshot.path / name)
        if found != size:
            message = f"{snapshot.path / name}: it has {found} bytes instead of {size}"
            chunks = np.flatnonzero(manifest.chunks["pack"] == pack).tolist()
            raise CorruptError(_name_tensors(message, chunks, snapshot))


def _shared_ranges(indices: list[int], records: list[Record]) -> list[tuple[int, int, list[int]]]:
    """Ranges of the stream, and the records in each, which share memory."""
    ranges: list[tuple[int, int, list[int]]] = []
    for index in sorted(indices, key=lambda index: records[index].at):
        start, end = records[index].at, records[index].at + records[index].extent
        if start == end:
            continue
        if ranges and start < ranges[-1][1]:
            first, last, members = ranges[-1]
            ranges[-1] = (first, max(end, last), [*members, index])
        else:
            ranges.append((start, end, [index]))
    return ranges


def _memory(size: int, snapshot: Snapshot) -> torch.UntypedStorage:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
    except RuntimeError:
        raise _too_large(size, snapshot) from None


def _too_large(size: int, snapshot: Snapshot) -> Error:
    return Error(
        f"there is no memory for {size} bytes of {snapshot.path}; load a part of it, or use a "
        "larger machine"
    )


def _view(memory: torch.UntypedStorage, offset: int, record: Record, snapshot: Snapshot) -> Leaf:
    """The leaf of a record whose first byte is at `offset` of `memory`."""
    if not _is_torch(record):
        return _array_view(memory, offset, record)
    empty = torch.empty(0, dtype=getattr(torch, record.dtype), device="cpu")
    if offset % empty.element_size():
        raise CorruptError(f"{snapshot.path} holds tensors that overlap by parts of an element")
    strides = record.strides or _row_major(record.shape)
    return empty.set_(memory, offset // empty.element_size(), record.shape, strides)


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


def _new(record: Record, snapshot: Snapshot) -> Leaf:
    if not _is_torch(record) and record.strides is None:
        try:
            return np.empty(record.shape, np.dtype(record.dtype))
        except MemoryError:
            raise _too_large(record.extent, snapshot) from None
    return _view(_memory(record.extent, snapshot), 0, record, snapshot)


def _array_view(memory: torch.UntypedStorage, offset: int, record: Record) -> Array:
    dtype = np.dtype(record.dtype)
    if not record.extent:
        return np.empty(record.shape, dtype)
    # The stride of an axis of one element moves nothing, and may be too large for NumPy.
    steps = zip(record.shape, record.strides or _row_major(record.shape), strict=True)
    strides = [step * dtype.itemsize if size > 1 else dtype.itemsize for size, step in steps]
    data = torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory).numpy()
    array: Array = np.ndarray(record.shape, dtype, data, offset, strides)
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


def _name_tensors(message: str, chunks: list[int], snapshot: Snapshot) -> str:
    """The message, and what is in these chunks, where any is known."""
    if not chunks:
        return message
    raw = snapshot.manifest.chunks["raw"]
    ends = np.cumsum(raw, dtype=np.int64)
    ranges = [(int(ends[chunk]) - int(raw[chunk]), int(ends[chunk])) for chunk in chunks]
    names = snapshot.manifest.names_in(ranges, str(snapshot.path))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{message}; it holds {', '.join(map(printable, names[:5]))}{more}"


def describe(leaf: Leaf | Record | None) -> str:
    """Dtype and shape for messages, such as `float32[3, 4]`."""
    if leaf is None:
        return "-"
    dtype: Any = leaf.dtype
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else getattr(dtype, "str", dtype)
    return f"{name}{list(leaf.shape)}"
