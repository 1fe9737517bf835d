"""The way back: a snapshot's bytes into live tensors, or into new ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from pysnap import _engine, tree
from pysnap.capture import zstd_libraries
from pysnap.errors import CorruptError, MismatchError
from pysnap.layout import TORCH_ELEMENTS, Leaf, dtype_name, extent_of, is_dense
from pysnap.manifest import Manifest, Record
from pysnap.repository import Snapshot

_HOST = -1


def load_state(snapshot: Snapshot) -> object:
    """The whole state of a snapshot, in new tensors on the CPU; those that shared memory share
    it again."""
    leaves = allocate(snapshot)
    state = tree.decode(snapshot.manifest.tree, leaves.__getitem__)
    fill(snapshot, enumerate(leaves))
    return state


def allocate(snapshot: Snapshot) -> list[Leaf]:
    """A new, empty tensor or array for every record. Raises CorruptError for a record that
    cannot be."""
    manifest = snapshot.manifest
    itemsizes = [_itemsize(record, snapshot) for record in manifest.tensors]
    leaves: list[Leaf | None] = [None] * len(manifest.tensors)
    for start, end, members in _shared_ranges(manifest, itemsizes, snapshot):
        storage = torch.empty(end - start, dtype=torch.uint8).untyped_storage()
        for index in members:
            leaves[index] = _view(storage, manifest.tensors[index], itemsizes[index], start)
    return [
        leaf if leaf is not None else _new(manifest.tensors[index])
        for index, leaf in enumerate(leaves)
    ]


def fill(snapshot: Snapshot, places: Iterable[tuple[int, Leaf]]) -> None:
    """Read record `index` into each leaf, which has its shape and dtype, in place; only the chunks
    that hold them are read.

    Every chunk is checked before its bytes reach a leaf; a damaged one raises CorruptError that
    names the file and the tensors, and leaves other chunks' bytes in place.
    """
    manifest = snapshot.manifest
    targets: list[tuple[int, int, int, int]] = []
    indirect: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, leaf in places:
        record = manifest.tensors[index]
        if isinstance(leaf, np.ndarray):
            if not (leaf.flags.c_contiguous and leaf.flags.writeable):
                raise MismatchError(
                    "an array is not contiguous or not writeable; register one that is"
                )
            targets.append((record.at, leaf.__array_interface__["data"][0], leaf.nbytes, _HOST))
            continue
        tensor = leaf.detach()
        if tensor.device.type != "cpu" or not _same_order(tensor, record):
            staging = _new(record)
            assert isinstance(staging, torch.Tensor)
            indirect.append((tensor, staging))
            tensor = staging
        targets.append(
            (record.at, tensor.data_ptr(), tensor.numel() * tensor.element_size(), _HOST)
        )
    _check_overlap(targets, snapshot)
    table = np.array(sorted(set(targets)), dtype=_engine.TARGET)
    try:
        _engine.restore(
            packs=snapshot.packs(),
            chunks=manifest.chunks,
            targets=table,
            threads=min(16, _engine.available_processors()),
            zstd=zstd_libraries(),
        )
    except CorruptError as error:
        raise CorruptError(
            _name_tensors(str(error), getattr(error, "chunk", None), snapshot)
        ) from None
    for tensor, staging in indirect:
        tensor.copy_(staging)


def verify(snapshot: Snapshot) -> list[str]:
    """What is damaged in a snapshot's packs, a sentence each; empty where it is intact."""
    try:
        damages = _engine.verify(
            packs=snapshot.packs(),
            chunks=snapshot.manifest.chunks,
            threads=min(16, _engine.available_processors()),
            zstd=zstd_libraries(),
        )
    except CorruptError as error:
        return [str(error)]
    return [_name_tensors(what, chunk, snapshot) for chunk, what in damages]


def _same_order(tensor: torch.Tensor, record: Record) -> bool:
    if record.strides is None:
        return tensor.is_contiguous()
    return is_dense(tensor) and tensor.stride() == record.strides


def _itemsize(record: Record, snapshot: Snapshot) -> int:
    if record.dtype in TORCH_ELEMENTS:
        dtype = getattr(torch, record.dtype, None)
        if dtype is None:
            raise MismatchError(
                f"{snapshot.path} holds a tensor of dtype {record.dtype}, which this version of "
                "torch does not have; use a newer torch"
            )
        return int(dtype.itemsize)
    try:
        dtype = np.dtype(record.dtype)
    except TypeError:
        raise CorruptError(
            f"{snapshot.path} holds a tensor of unknown dtype {record.dtype!r}"
        ) from None
    if dtype.hasobject or dtype.str != record.dtype:
        raise CorruptError(f"{snapshot.path} holds a tensor of unknown dtype {record.dtype!r}")
    return dtype.itemsize


def _shared_ranges(
    manifest: Manifest, itemsizes: list[int], snapshot: Snapshot
) -> list[tuple[int, int, list[int]]]:
    """Ranges of the stream, and the tensors in each that share memory; arrays and tensors
    without elements are in none."""
    stream = manifest.stream
    ranges: list[tuple[int, int, list[int]]] = []
    for index in sorted(range(len(itemsizes)), key=lambda index: manifest.tensors[index].at):
        record = manifest.tensors[index]
        end = record.at + extent_of(record, itemsizes[index])
        if end > stream:
            raise CorruptError(
                f"{snapshot.path} holds a tensor that reaches past the end of the stream"
            )
        if end == record.at or record.dtype not in TORCH_ELEMENTS:
            continue
        if ranges and record.at < ranges[-1][1]:
            start, last_end, members = ranges[-1]
            ranges[-1] = (start, max(end, last_end), [*members, index])
        else:
            ranges.append((record.at, end, [index]))
    return ranges


def _view(
    storage: torch.UntypedStorage, record: Record, itemsize: int, start: int
) -> torch.Tensor | None:
    offset = record.at - start
    if offset % itemsize:
        return None
    strides = record.strides or _row_major(record.shape)
    return torch.empty(0, dtype=getattr(torch, record.dtype)).set_(
        storage, offset // itemsize, record.shape, strides
    )


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _new(record: Record) -> Leaf:
    if record.dtype not in TORCH_ELEMENTS:
        return np.empty(record.shape, dtype=record.dtype)
    return torch.empty_strided(
        record.shape, record.strides or _row_major(record.shape), dtype=getattr(torch, record.dtype)
    )


def _check_overlap(targets: list[tuple[int, int, int, int]], snapshot: Snapshot) -> None:
    """Live tensors that share memory must share bytes of the stream in the same way, else one
    would overwrite the other."""
    end, shift = 0, 0
    for at, address, length, _ in sorted(targets, key=lambda target: (target[1], -target[2])):
        if length and address < end and address - at != shift:
            raise MismatchError(
                "tensors that share memory (are tied) in the live state do not in "
                f"{snapshot.path}; tie them in the same way"
            )
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
        and manifest.tensors[index].at
        + extent_of(manifest.tensors[index], _itemsize(manifest.tensors[index], snapshot))
        > start
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
