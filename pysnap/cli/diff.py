"""`pysnap diff`: what changed between two snapshots. Tensors are read in pieces of bounded size."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pysnap import paths
from pysnap.cli import choose, exits
from pysnap.cli.output import Output, number
from pysnap.errors import ConfigError
from pysnap.provenance import differences
from pysnap.repository import Snapshot
from pysnap.view import Entry, View

_PIECE = 64 * 2**20


@dataclass(frozen=True)
class Change:
    """How the values of one tensor changed; NaN where both have NaN is no change."""

    name: str
    norm: float
    """Euclidean norm of the difference."""
    relative: float
    """That over the norm of the old values."""
    largest: float
    """Largest absolute difference of one element."""
    elements: int
    """How many elements differ."""
    of: int
    """How many there are."""


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("before", metavar="A", help="a SNAPSHOT")
    parser.add_argument("after", metavar="B", help="a SNAPSHOT")
    parser.add_argument("part", metavar="PART", nargs="?", help="only this part, such as `model`")
    parser.add_argument("--most", type=int, default=30, help="tensors that are shown (30; 0: all)")


def run(arguments: Namespace, output: Output) -> int:
    if arguments.most < 0:
        raise ConfigError(f"--most is {arguments.most}; it must be at least 0")
    before, after = choose.snapshot(arguments.before), choose.snapshot(arguments.after)
    old, new = _entries(before, arguments.part), _entries(after, arguments.part)
    both = [name for name in old if name in new]
    other = [name for name in both if _kind(old[name]) != _kind(new[name])]
    same = [name for name in both if name not in set(other)]
    total = sum(old[name].nbytes for name in same)
    changes = []
    with output.progress(total, "comparing") as advance:
        for name in same:
            change = compare(name, old[name], new[name])
            if change is not None:
                changes.append(change)
            advance(old[name].nbytes)
    changes.sort(key=lambda change: (-_order(change.norm), change.name))
    found = {
        "before": str(before.path),
        "after": str(after.path),
        "tensors": [asdict(change) for change in changes],
        "equal": len(same) - len(changes),
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "other_kind": [
            {"name": name, "before": _kind(old[name]), "after": _kind(new[name])} for name in other
        ],
        "values": differences(
            dict(_values(before.manifest.tree, arguments.part)),
            dict(_values(after.manifest.tree, arguments.part)),
        ),
        "metadata": differences(before.manifest.metadata, after.manifest.metadata),
    }
    if output.json:
        output.data(found)
    else:
        _tell(found, changes, arguments.most or len(changes), output)
    # Where a snapshot comes from is told, but the state decides.
    names = ("tensors", "added", "removed", "other_kind", "values")
    return exits.NO if any(found[name] for name in names) else exits.FINE


def compare(name: str, old: Entry, new: Entry) -> Change | None:
    """How a tensor of one shape and type changed; None where it did not."""
    squares = base = 0.0
    largest, elements, count = 0.0, 0, 0
    differ = False
    for before, after in zip(_pieces(old), _pieces(new), strict=True):
        count += before.numel()
        if torch.equal(_bytes(before), _bytes(after)):
            base += float(_numbers(before).square().sum())
            continue
        differ = True
        left, right = _numbers(before), _numbers(after)
        equal = (left == right) | (left.isnan() & right.isnan())
        difference = torch.where(equal, 0.0, right - left).abs()
        squares += float(difference.square().sum())
        base += float(left.square().sum())
        piece = float(difference.max())
        largest = piece if math.isnan(piece) else max(largest, piece)
        elements += int((~equal).sum())
    if not differ:
        return None
    norm, scale = math.sqrt(squares), math.sqrt(base)
    relative = norm / scale if scale else math.inf if norm else 0.0
    return Change(name, norm, relative, largest, elements, count)


def _entries(snapshot: Snapshot, part: str | None) -> dict[str, Entry]:
    return {
        name: entry
        for name, entry in View(snapshot).items()
        if part is None or paths.covers(part, name)
    }


def _kind(entry: Entry) -> str:
    return f"{entry.dtype} {list(entry.shape)}".removeprefix("torch.")


def _pieces(entry: Entry) -> Iterator[torch.Tensor]:
    """The tensor, some rows at a time. One row may be larger than the bound."""
    if not entry.shape or entry.nbytes <= _PIECE:
        yield _tensor(entry[...])
        return
    rows = max(1, _PIECE * entry.shape[0] // entry.nbytes)
    for start in range(0, entry.shape[0], rows):
        yield _tensor(entry[start : start + rows])


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.reshape(-1)
    array = np.ascontiguousarray(value).reshape(-1)
    if array.dtype.kind in "biufc" and array.dtype.isnative and array.dtype.itemsize <= 16:
        try:
            return torch.from_numpy(array.copy())
        except TypeError:
            pass
    # What torch has no numbers for is compared as bytes.
    return torch.from_numpy(array.view(np.uint8).copy())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor).reshape(-1).double()
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        return _bytes(tensor).double()
    return tensor.double()


def _values(tree: Any, part: str | None) -> Iterator[tuple[str, object]]:
    """Every value of an encoded tree that is no tensor, by its path."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, object]]:
        if isinstance(node, dict) and len(node) == 1:
            ((tag, content),) = node.items()
            if tag in ("$tensor", "$array"):
                return
            if tag in paths.PAIRS:
                for key, item in content:
                    yield from walk(item, paths.join(path, key if type(key) is str else str(key)))
                return
            if tag == "$tuple":
                node = content
            elif tag.startswith("$"):
                yield path, content
                return
        if isinstance(node, dict) and node:
            for key, item in node.items():
                yield from walk(item, paths.join(path, key))
        elif isinstance(node, list) and node:
            for index, item in enumerate(node):
                yield from walk(item, paths.join(path, str(index)))
        else:
            yield path, node

    for path, value in walk(tree, ""):
        if part is None or paths.covers(part, path):
            yield path, value


def _order(norm: float) -> float:
    """NaN stands first: it is what one looks for."""
    return math.inf if math.isnan(norm) else norm


def _tell(found: dict[str, Any], changes: list[Change], most: int, output: Output) -> None:
    output.line(f"{found['before']} -> {found['after']}")
    if changes:
        output.table(
            ["tensor", ">norm of difference", ">relative", ">largest", ">elements"],
            [
                [
                    change.name,
                    number(change.norm),
                    number(change.relative),
                    number(change.largest),
                    f"{change.elements} of {change.of}",
                ]
                for change in changes[:most]
            ],
        )
    if len(changes) > most:
        output.line(f"and {len(changes) - most} more; --most 0 shows all")
    output.line(f"{len(changes)} tensors changed, {found['equal']} are equal")
    for word in ("added", "removed"):
        for name in found[word]:
            output.line(f"{word}: {name}")
    for entry in found["other_kind"]:
        output.line(f"{entry['name']} was {entry['before']}, is {entry['after']}")
    for sentence in (*found["values"], *(f"metadata: {text}" for text in found["metadata"])):
        output.line(sentence)
