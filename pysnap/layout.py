"""Where each tensor's bytes lie in the stream, and how the stream is cut into chunks.

Bytes that may be copied lazily stand behind all others. The bytes of one element type stand
together, so that a chunk holds one; within a type, tensors keep the order of the tree. Tensors that
share memory (tied weights, views) share bytes of the stream and are read once.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import compress, groupby
from typing import Any, TypeAlias

import numpy as np
import torch

from pysnap import _engine
from pysnap.dtypes import ELEMENT_WIDTH, TORCH_ELEMENTS
from pysnap.errors import ConfigError, StateError
from pysnap.manifest import ELEMENTS, Record

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Leaf: TypeAlias = "torch.Tensor | Array"

_log = logging.getLogger("pysnap")

HOST = -1
"""The engine's number of host memory; CUDA devices have theirs from 0."""


def _find_exchange() -> object:
    """The table by which torch tells other libraries of its tensors; None where it has none that
    the engine knows."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    try:
        _engine.TensorPlaces(exchange, [])
    except (TypeError, ConfigError):
        return None
    return exchange


_EXCHANGE = _find_exchange()

_NUMPY_ELEMENTS = {"f2": "f16", "f4": "f32", "f8": "f64", "c8": "f32", "c16": "f64"}
_NUMPY_INTEGERS = {2: "i16", 4: "i32", 8: "i64"}


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `"float32"`."""
    return str(dtype).removeprefix("torch.")


def array_element(dtype: np.dtype[Any]) -> str:
    """Element type of a NumPy array's bytes."""
    name = dtype.str[1:]
    if dtype.isnative and name in _NUMPY_ELEMENTS:
        return _NUMPY_ELEMENTS[name]
    return _NUMPY_INTEGERS.get(dtype.itemsize, "u8") if dtype.kind in "iufmMc" else "u8"


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one run of memory without gap or overlap, in whatever order
    (transposed, channels last)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@functools.cache
def _has_cuda() -> bool:
    """Whether the engine copies from and to CUDA devices; asked when the first tensor is on one."""
    reason = _engine.cuda_unavailable()
    if reason is not None:
        _log.warning("CUDA tensors are copied through pageable memory: %s", reason)
    return reason is None


def device_index(tensor: torch.Tensor) -> int | None:
    """The engine's number of the place of a tensor: HOST, or that of a CUDA device; None for a
    place that it does not know."""
    if tensor.is_cpu:
        return HOST
    return tensor.get_device() if tensor.is_cuda and _has_cuda() else None


def current_streams(devices: Iterable[int]) -> list[tuple[int, int]]:
    """The stream on which the caller queues work, of each CUDA device, as the engine takes it."""
    return [
        (index, torch.cuda.current_stream(index).cuda_stream)
        for index in sorted(set(devices))
        if index != HOST
    ]


@dataclass(frozen=True)
class _Source:
    """Bytes of one leaf in memory."""

    address: int
    length: int
    device: int
    element: str
    record: Record  # `at` is not settled yet


@dataclass(frozen=True)
class Plan:
    """Everything that a capture needs, and what the manifest says of it.

    `extents` and `spans` are tables for the engine, which reads from `devices`; the first `eager`
    chunks are to be copied at once; `records[i]` describes leaf i, and `waits[i]` says whether its
    bytes are among those that may be copied later. `keep` holds the leaves, or copies of those that
    have gaps; without such copies the bytes are read `in_place`.
    """

    records: list[Record]
    extents: np.ndarray[Any, np.dtype[np.void]]
    spans: np.ndarray[Any, np.dtype[np.void]]
    eager: int
    stream: int
    devices: frozenset[int]
    waits: list[bool]
    in_place: bool
    keep: list[Leaf]


def make_plan(
    leaves: list[tuple[str, Leaf]], *, chunk_size: int, lazy: Collection[int] = frozenset()
) -> Plan:
    """The plan for these (path, leaf) pairs; those at the addresses `lazy` may be copied later
    than the others. Raises StateError for a type that cannot be stored."""
    contiguous = [(path, _contiguous(leaf)) for path, leaf in leaves]
    sources = [_source(path, leaf) for path, leaf in contiguous]
    waits = [
        isinstance(leaf, torch.Tensor) and source.address in lazy
        for (_, leaf), source in zip(contiguous, sources, strict=True)
    ]
    in_place = all(
        _address(leaf) == source.address for (_, leaf), source in zip(leaves, sources, strict=True)
    )
    plan = _lay_out(sources, chunk_size, waits)
    return replace(plan, in_place=in_place, keep=[leaf for _, leaf in contiguous])


class Places:
    """Where the bytes of some leaves are, and what they mean."""

    def __init__(self, leaves: list[Leaf]) -> None:
        """Raises TypeError or RuntimeError for a tensor that has no bytes of its own."""
        self._is_array = [isinstance(leaf, np.ndarray) for leaf in leaves]
        self._is_tensor = [not is_array for is_array in self._is_array]
        self._has_arrays = any(self._is_array)
        self._tensors = tensor_places(self._tensors_of(leaves))
        self._arrays = self._places_of_arrays(leaves)

    def are_of(self, leaves: list[Leaf]) -> bool:
        """Whether these leaves, too, have their bytes there, and the bytes mean the same. Tensors
        and arrays stand where they stood at first."""
        try:
            return (
                self._tensors.are_of(self._tensors_of(leaves))
                and self._places_of_arrays(leaves) == self._arrays
            )
        except (TypeError, RuntimeError):
            # Now a tensor has no bytes of its own.
            return False

    def _places_of_arrays(self, leaves: list[Leaf]) -> list[tuple[Any, ...]]:
        arrays = compress(leaves, self._is_array) if self._has_arrays else ()
        return [
            (_address(array), array.shape, array.dtype.str, array.strides)  # type: ignore[union-attr]  # arrays alone
            for array in arrays
        ]

    def _tensors_of(self, leaves: list[Leaf]) -> list[torch.Tensor]:
        tensors = compress(leaves, self._is_tensor) if self._has_arrays else leaves
        return list(tensors)  # type: ignore[arg-type]  # the arrays are left out


def tensor_places(
    tensors: list[torch.Tensor], exchange: object = _EXCHANGE
) -> _ReadPlaces | _AskedPlaces:
    """`Places` of tensors; by DLPack's `exchange`, where torch has it."""
    return _AskedPlaces(tensors) if exchange is None else _ReadPlaces(tensors, exchange)


class _ReadPlaces:
    """Read from the tensors by the engine, in one pass. A negated view that is none of an imaginary
    part, which only private functions of torch make, is taken for what its bytes are."""

    def __init__(self, tensors: list[torch.Tensor], exchange: object) -> None:
        self._places = _engine.TensorPlaces(exchange, tensors)
        self._odd = [at for at, tensor in enumerate(tensors) if _may_be_negated(tensor)]

    def are_of(self, tensors: list[torch.Tensor]) -> bool:
        return self._places.are_of(tensors) and not any(
            # DLPack does not know these.
            tensors[at].is_neg() or tensors[at].is_conj()
            for at in self._odd
        )


def _may_be_negated(tensor: torch.Tensor) -> bool:
    """Whether a tensor of this type at this address may mean other values than its bytes: one of
    complex numbers, or the imaginary part of one, which stands behind a real part."""
    return tensor.is_complex() or tensor.data_ptr() % (2 * tensor.element_size()) != 0


class _AskedPlaces:
    """Asked of the tensors, one after the other: for a torch without DLPack's exchange (before
    2.10)."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._blocks = [_Block(block) for block in _blocks(tensors)]
        self._count = len(tensors)

    def are_of(self, tensors: list[torch.Tensor]) -> bool:
        return len(tensors) == self._count and all(
            map(_Block.is_of, self._blocks, _blocks(tensors))
        )


def _blocks(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    # Each is looked at several times: that many stay in the processor's cache.
    return [tensors[at : at + 512] for at in range(0, len(tensors), 512)]


class _Block:
    """No list of what is compared is made: it would be garbage of many objects, which has its
    price."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._addresses = list(map(torch.Tensor.data_ptr, tensors))
        self._shapes = list(map(torch.Tensor.size, tensors))
        self._dtypes = list(map(_dtype, tensors))
        self._has_complex = any(dtype.is_complex for dtype in set(self._dtypes))
        self._is_contiguous = list(map(torch.Tensor.is_contiguous, tensors))
        self._has_gaps = [not is_contiguous for is_contiguous in self._is_contiguous]
        self._strides = list(map(torch.Tensor.stride, compress(tensors, self._has_gaps)))

    def is_of(self, tensors: list[torch.Tensor]) -> bool:
        contiguous = map(torch.Tensor.is_contiguous, tensors)
        strides = map(torch.Tensor.stride, compress(tensors, self._has_gaps))
        return (
            all(map(operator.eq, map(torch.Tensor.data_ptr, tensors), self._addresses))
            and all(map(operator.eq, map(torch.Tensor.size, tensors), self._shapes))
            and all(map(operator.is_, map(_dtype, tensors), self._dtypes))
            and all(map(operator.is_, contiguous, self._is_contiguous))
            and all(map(operator.eq, strides, self._strides))
            and not any(map(torch.Tensor.is_neg, tensors))
            and not (self._has_complex and any(map(torch.Tensor.is_conj, tensors)))
        )


_dtype = operator.attrgetter("dtype")


def _address(leaf: Leaf) -> int:
    if isinstance(leaf, np.ndarray):
        address: int = leaf.__array_interface__["data"][0]
        return address
    return leaf.data_ptr()


def _contiguous(leaf: Leaf) -> Leaf:
    """The leaf, or a copy where its elements do not fill one run of the engine's memory."""
    if isinstance(leaf, np.ndarray):
        # Of an array without dimensions, ascontiguousarray makes one that has one.
        array: Array = np.ascontiguousarray(leaf).reshape(leaf.shape)
        return array
    tensor = leaf.detach().resolve_conj().resolve_neg()
    if device_index(tensor) is None:
        tensor = tensor.cpu()
    return tensor if is_dense(tensor) else tensor.contiguous()


def _source(path: str, leaf: Leaf) -> _Source:
    if isinstance(leaf, np.ndarray):
        return _Source(
            _address(leaf),
            leaf.nbytes,
            HOST,
            array_element(leaf.dtype),
            Record(leaf.dtype.str, leaf.shape, 0),
        )
    name = dtype_name(leaf.dtype)
    if name not in TORCH_ELEMENTS:
        raise StateError(
            f'cannot store dtype {name} at "{path}"; convert the tensor to a type with whole bytes'
        )
    strides = None if leaf.is_contiguous() else tuple(leaf.stride())
    record = Record(name, tuple(leaf.shape), 0, strides)
    device = device_index(leaf)
    assert device is not None
    return _Source(
        leaf.data_ptr(),
        leaf.numel() * leaf.element_size(),
        device,
        TORCH_ELEMENTS[name],
        record,
    )


def _lay_out(sources: list[_Source], chunk_size: int, waits: list[bool]) -> Plan:
    runs = _merge(sources)
    for run in runs:
        run.lazy = all(waits[index] for index in run.members)
    # Python's sort is stable: within an element type, the order of the tree.
    runs.sort(key=lambda run: (run.lazy, ELEMENTS.index(run.element), run.first))
    offsets: dict[int, int] = {}
    spans: list[tuple[int, int]] = []
    eager = 0
    at = 0
    for (is_lazy, element), members in groupby(runs, key=lambda run: (run.lazy, run.element)):
        length = 0
        for run in members:
            for index in run.members:
                offsets[index] = at + length + sources[index].address - run.start
            length += run.end - run.start
        at += length
        cut = [chunk_size] * (length // chunk_size) + (
            [length % chunk_size] if length % chunk_size else []
        )
        spans += [(size, ELEMENTS.index(element)) for size in cut]
        eager = eager if is_lazy else len(spans)
    records = [
        Record(
            source.record.dtype, source.record.shape, offsets.get(index, 0), source.record.strides
        )
        for index, source in enumerate(sources)
    ]
    return Plan(
        records=records,
        extents=np.array(
            [(run.start, run.end - run.start, run.device) for run in runs], dtype=_engine.EXTENT
        ),
        spans=np.array(spans, dtype=_engine.SPAN),
        eager=eager,
        stream=at,
        devices=frozenset(run.device for run in runs),
        waits=waits,
        in_place=True,
        keep=[],
    )


@dataclass
class _Run:
    """Bytes of memory that belong to one or more leaves and are read once."""

    start: int
    end: int
    device: int
    element: str
    first: int
    members: list[int]
    lazy: bool = False


def _merge(sources: list[_Source]) -> list[_Run]:
    """Leaves that share memory become one run; all others one each. Leaves without bytes have
    none."""
    runs: list[_Run] = []
    order = sorted(
        (index for index, source in enumerate(sources) if source.length),
        key=lambda index: (sources[index].device, sources[index].address, index),
    )
    for index in order:
        source = sources[index]
        start, end = source.address, source.address + source.length
        if runs and runs[-1].device == source.device and start < runs[-1].end:
            run = runs[-1]
            run.members.append(index)
            run.end = max(run.end, end)
            run.first = min(run.first, index)
            if run.element != source.element:
                run.element = "u8"
        else:
            runs.append(_Run(start, end, source.device, source.element, index, [index]))
    for run in runs:
        if (run.end - run.start) % ELEMENT_WIDTH[run.element]:
            run.element = "u8"
    return runs
