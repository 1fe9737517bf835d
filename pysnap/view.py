"""A snapshot as a read-only mapping of names to tensors that are read when they are indexed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pysnap.errors import CorruptError, NotFoundError, StorageError, printable
from pysnap.layout import Leaf
from pysnap.manifest import Record
from pysnap.repository import Snapshot
from pysnap.restore import describe, dtype_of, read_record


class View(Mapping[str, "Entry"]):
    """The tensors and arrays of one snapshot by name: their paths in the state, such as
    "optimizer/state/0/exp_avg".

    Holds the manifest and no open file: once the snapshot is deleted, reading raises NotFoundError.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        manifest = snapshot.manifest
        self.path = snapshot.path
        self.id = manifest.id
        self.step = manifest.step
        self.metadata = manifest.metadata
        self._entries: dict[str, Entry] = {}
        for name, record in manifest.leaves(str(self.path)):
            self._entries[name] = Entry(name, record, snapshot)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<View of {self.path}: {len(self)} tensors>"


class Entry:
    """One tensor or array of a snapshot, on disk.

    Every indexing reads anew, into new memory: a torch.Tensor, or a NumPy array where one was
    stored. `entry[...]` reads the whole. A first index that is an integer or a slice reads only the
    chunks that hold its rows, from the first to the last; whatever else stands in the index is
    applied to what was read, as torch and NumPy do.
    """

    __slots__ = ("_record", "_snapshot", "name")

    def __init__(self, name: str, record: Record, snapshot: Snapshot) -> None:
        self.name = name
        self._record = record
        self._snapshot = snapshot

    @property
    def shape(self) -> tuple[int, ...]:
        return self._record.shape

    @property
    def dtype(self) -> torch.dtype | np.dtype[Any]:
        return dtype_of(self._record.dtype, self._snapshot)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, whatever they take on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Any:
        """Raises CorruptError that names the file and this tensor where a chunk is damaged."""
        indices = index if isinstance(index, tuple) else (index,)
        first = indices[0] if indices and self.shape else None
        if isinstance(first, slice):
            rows = range(self.shape[0])[first]
            inner: int | slice = slice(None, None, rows.step)
        elif isinstance(first, (int, np.integer)) and not isinstance(first, bool):
            row = self._row(int(first))
            rows, inner = range(row, row + 1), 0
        else:
            return self._read(self._record)[index]
        index = (inner, *indices[1:])
        return self._read(self._of_rows(rows))[index]

    def __repr__(self) -> str:
        return f'<Entry "{printable(self.name)}": {describe(self._record)}>'

    def _row(self, index: int) -> int:
        count = self.shape[0]
        if not -count <= index < count:
            raise IndexError(
                f'index {index} is out of range for the {count} rows of "{printable(self.name)}"'
            )
        return index % count

    def _of_rows(self, rows: range) -> Record:
        """The rows from the lowest to the highest, as if they were a tensor of their own."""
        low, high = (min(rows[0], rows[-1]), max(rows[0], rows[-1]) + 1) if rows else (0, 0)
        shape, strides = self._record.shape, self._record.strides
        stride = math.prod(shape[1:]) if strides is None else strides[0]
        at = self._record.at + low * stride * self.dtype.itemsize
        return replace(self._record, shape=(high - low, *shape[1:]), at=at)

    def _read(self, record: Record) -> Leaf:
        try:
            return read_record(self._snapshot, record)
        except (CorruptError, StorageError) as error:
            if not _is_there(self._snapshot):
                raise NotFoundError(
                    f"{self._snapshot.path} was deleted or replaced since it was opened; open the "
                    "newest snapshot"
                ) from None
            if isinstance(error, CorruptError):
                raise CorruptError(f'cannot read "{printable(self.name)}": {error}') from None
            raise


def _is_there(snapshot: Snapshot) -> bool:
    """Whether the path still leads to this snapshot."""
    try:
        return Snapshot.open(snapshot.path).manifest.id == snapshot.manifest.id
    except NotFoundError:
        return False
