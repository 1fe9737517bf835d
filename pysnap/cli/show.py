"""`pysnap show`: the state in a snapshot as a tree, with shapes, sizes and how it is encoded."""

from __future__ import annotations

import bisect
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pysnap import paths
from pysnap.cli import choose, exits
from pysnap.cli.ls import describe
from pysnap.cli.output import Output, size
from pysnap.dtypes import itemsize
from pysnap.errors import ConfigError, NotFoundError
from pysnap.manifest import Manifest, Record


@dataclass
class Branch:
    """Everything whose path begins alike."""

    raw: int = 0
    stored: float = 0.0
    tensors: int = 0
    record: Record | None = None
    below: dict[str, Branch] = field(default_factory=dict)

    def put(self, parts: list[str], record: Record, raw: int, stored: float) -> None:
        """Add a tensor at the path `parts`."""
        branch = self
        for part in parts:
            branch._count(raw, stored)
            branch = branch.below.setdefault(part, Branch())
        branch._count(raw, stored)
        branch.record = record

    def _count(self, raw: int, stored: float) -> None:
        self.raw += raw
        self.stored += stored
        self.tensors += 1


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("snapshot", metavar="SNAPSHOT")
    parser.add_argument("part", metavar="PART", nargs="?", help="only this part, such as `model`")
    parser.add_argument(
        "--depth", type=int, default=3, help="levels of the tree that are shown (3; 0: all)"
    )


def run(arguments: Namespace, output: Output) -> int:
    if arguments.depth < 0:
        raise ConfigError(f"--depth is {arguments.depth}; it must be at least 0")
    snapshot = choose.snapshot(arguments.snapshot)
    entries = list(_entries(snapshot.manifest, str(snapshot.path), arguments.part))
    if arguments.part is not None and not entries:
        raise NotFoundError(f'{snapshot.path} holds no tensor under "{arguments.part}"')
    if output.json:
        tensors = [
            {
                "name": name,
                "dtype": record.dtype,
                "shape": list(record.shape),
                "raw_bytes": raw,
                "stored_bytes": round(stored),
            }
            for name, record, raw, stored in entries
        ]
        output.data(
            describe(snapshot) | {"metadata": snapshot.manifest.metadata, "tensors": tensors}
        )
        return exits.FINE
    root = Branch()
    for name, record, raw, stored in entries:
        root.put(name.split("/"), record, raw, stored)
    output.line(f"{snapshot.path}, step {snapshot.step}, {snapshot.manifest.created}")
    depth = arguments.depth or paths.MAX_DEPTH
    rows = [_row("everything", root, 0), *_rows(root, 1, depth)]
    output.table(["name", "dtype", "shape", ">size", ">on disk", ">ratio"], rows)
    return exits.FINE


def _entries(
    manifest: Manifest, where: str, part: str | None
) -> Iterator[tuple[str, Record, int, float]]:
    """Name, record, bytes, and its share of the encoded bytes, of every tensor."""
    stored = _StoredBytes(manifest)
    seen: set[tuple[int, int]] = set()
    for name, record in manifest.leaves(where):
        if part is None or paths.covers(part, name):
            place = (record.at, record.extent)
            # Tied weights are stored once, and counted where they stand first.
            share = 0.0 if place in seen else stored.between(record.at, record.at + record.extent)
            seen.add(place)
            yield name, record, math.prod(record.shape) * itemsize(record.dtype), share


class _StoredBytes:
    """Encoded bytes up to any place of the stream, as if a chunk were encoded evenly."""

    def __init__(self, manifest: Manifest) -> None:
        self._raw = [0, *manifest.chunks["raw"].cumsum(dtype="i8").tolist()]
        self._stored = [0, *manifest.chunks["stored"].cumsum(dtype="i8").tolist()]

    def between(self, start: int, end: int) -> float:
        return self._before(end) - self._before(start)

    def _before(self, place: int) -> float:
        index = bisect.bisect_right(self._raw, place) - 1
        if index >= len(self._raw) - 1:
            return float(self._stored[-1])
        raw = self._raw[index + 1] - self._raw[index]
        stored = self._stored[index + 1] - self._stored[index]
        return float(self._stored[index] + stored * (place - self._raw[index]) / raw)


def _rows(branch: Branch, level: int, depth: int) -> Iterator[list[str]]:
    for name, below in branch.below.items():
        yield _row(name, below, level)
        if level < depth:
            yield from _rows(below, level + 1, depth)


def _row(name: str, branch: Branch, level: int) -> list[str]:
    record: Any = branch.record
    return [
        "  " * level + name,
        record.dtype if record else "",
        " x ".join(map(str, record.shape)) if record else f"{branch.tensors} tensors",
        size(branch.raw),
        size(branch.stored),
        f"{branch.raw / branch.stored:.2f}" if branch.stored else "",
    ]
