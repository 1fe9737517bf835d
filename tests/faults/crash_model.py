"""The states that a power cut may leave, made from a log of file operations.

README.md section 3 is the model in words: what is durable, what may be lost, torn or zero.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from shim import Operation

SECTOR = 512

Tree: TypeAlias = "dict[str, bytes | str | None]"
"""Paths below the root: a file's bytes, a symlink's text, or None for a directory."""


@dataclass(eq=False)
class Write:
    """Bytes that were written and not synced."""

    offset: int
    data: bytes


@dataclass(eq=False)
class Resize:
    """A length that was set and not synced."""

    size: int
    grows_only: bool = False


@dataclass(eq=False)
class Change:
    """One change of a directory: names that go, and names that come with what they stand for. A
    rename within a directory is one change, for it is atomic."""

    removed: tuple[str, ...] = ()
    added: tuple[tuple[str, Node], ...] = ()


@dataclass(eq=False)
class File:
    durable: bytes = b""
    pending: list[Write | Resize] = field(default_factory=list)
    lost_cause: set[Write | Resize] = field(default_factory=set)
    """Pending when a sync failed: no later sync makes them durable."""
    size: int = 0

    def sync(self) -> None:
        done = [update for update in self.pending if update not in self.lost_cause]
        self.durable = _content(self.durable, done, {}, seed=0)
        self.pending = [update for update in self.pending if update in self.lost_cause]

    def fail_sync(self) -> None:
        self.lost_cause.update(self.pending)


@dataclass(eq=False)
class Directory:
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    now: dict[str, Node] = field(default_factory=dict)

    def change(self, change: Change) -> None:
        self.pending.append(change)
        _change(self.now, change)

    def sync(self) -> None:
        for change in self.pending:
            _change(self.durable, change)
        self.pending = []


@dataclass(frozen=True, eq=False)
class Link:
    text: str


Node: TypeAlias = "File | Directory | Link"
Item: TypeAlias = "Write | Resize | Change"
Fates: TypeAlias = "dict[Item, str]"
"""Of what was not synced: `lost`, of a Write also `torn` or `zero`; all else is kept."""


def _change(entries: dict[str, Node], change: Change) -> None:
    for name in change.removed:
        entries.pop(name, None)
    entries.update(change.added)


def _content(
    durable: bytes, pending: Sequence[Write | Resize], fates: Fates, *, seed: int
) -> bytes:
    chance = random.Random(seed)
    content = bytearray(durable)
    for update in pending:
        what = fates.get(update)
        if what == "lost":
            continue
        if isinstance(update, Resize):
            if update.size > len(content):
                content.extend(bytes(update.size - len(content)))
            elif not update.grows_only:
                del content[update.size :]
            continue
        end = update.offset + len(update.data)
        if end > len(content):
            content.extend(bytes(end - len(content)))
        if what is None:
            content[update.offset : end] = update.data
        elif what == "zero":
            content[update.offset : end] = bytes(len(update.data))
        else:
            for at in range(0, len(update.data), SECTOR):
                piece = update.data[at : at + SECTOR]
                if chance.random() < 0.5:
                    content[update.offset + at : update.offset + at + len(piece)] = piece
    return bytes(content)


@dataclass(eq=False)
class _Opened:
    node: File | Directory
    position: int


class FileSystem:
    """What is durable and what is pending after each operation of a log."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._top = Directory()
        self._opened: dict[int, _Opened] = {}
        self._contents: dict[tuple[object, ...], bytes] = {}

    def apply(self, operation: Operation) -> bool:
        """Take one operation over; whether it may have changed what a power cut leaves."""
        if operation.result < 0:
            opened = self._opened.get(operation.descriptor)
            if operation.kind in ("fsync", "fdatasync") and opened is not None:
                if isinstance(opened.node, File):
                    opened.node.fail_sync()
                return True
            if operation.kind == "close":
                self._opened.pop(operation.descriptor, None)
            return False
        handler = getattr(self, f"_{operation.kind}", None)
        if handler is None:
            return False
        handler(operation)
        return operation.kind not in ("open", "close") or bool(operation.flags & os.O_CREAT)

    def items(self) -> list[Item]:
        """Everything that is pending and matters to some state, in a fixed order."""
        found: list[Item] = []
        seen: set[int] = set()

        def walk(node: Node) -> None:
            if id(node) in seen or isinstance(node, Link):
                return
            seen.add(id(node))
            found.extend(node.pending)
            if isinstance(node, Directory):
                for child in node.durable.values():
                    walk(child)
                for change in node.pending:
                    for _, child in change.added:
                        walk(child)

        walk(self._top)
        return found

    def tree(self, fates: Fates, seed: int) -> Tree:
        """What is on the disk when what is pending has these fates."""
        result: Tree = {}

        def walk(node: Node, path: str) -> None:
            if isinstance(node, Link):
                result[path] = node.text
            elif isinstance(node, File):
                result[path] = self._content(node, fates, seed)
            else:
                if path:
                    result[path] = None
                entries = dict(node.durable)
                for change in node.pending:
                    if change not in fates:
                        _change(entries, change)
                for name, child in entries.items():
                    walk(child, f"{path}/{name}" if path else name)

        walk(self._top, "")
        return result

    def _content(self, file: File, fates: Fates, seed: int) -> bytes:
        if not file.pending:
            return file.durable
        own = tuple(fates.get(update) for update in file.pending)
        key = (file, file.durable, own, seed if "torn" in own else 0)
        if key not in self._contents:
            self._contents[key] = _content(file.durable, file.pending, fates, seed=seed)
        return self._contents[key]

    def _place(self, path: str) -> tuple[Directory, str]:
        directory = self._top
        *parents, name = path[len(self._root) :].strip("/").split("/")
        for parent in parents:
            child = directory.now[parent]
            assert isinstance(child, Directory), path
            directory = child
        return directory, name

    def _find(self, path: str) -> Node:
        directory, name = self._place(path)
        return directory.now[name] if name else directory

    def _open(self, operation: Operation) -> None:
        directory, name = self._place(operation.path)
        if name and name not in directory.now:
            assert operation.flags & os.O_CREAT, operation.path
            directory.change(Change(added=((name, File()),)))
        node = self._find(operation.path)
        assert not isinstance(node, Link)
        if operation.flags & os.O_TRUNC and isinstance(node, File):
            self._resize(node, 0)
        at_end = bool(operation.flags & os.O_APPEND) and isinstance(node, File)
        self._opened[operation.result] = _Opened(node, node.size if at_end else 0)

    def _close(self, operation: Operation) -> None:
        self._opened.pop(operation.descriptor, None)

    def _file(self, operation: Operation) -> File:
        node = self._opened[operation.descriptor].node
        assert isinstance(node, File), operation.path
        return node

    def _write(self, operation: Operation) -> None:
        opened = self._opened[operation.descriptor]
        self._put(self._file(operation), opened.position, operation.data)
        opened.position += len(operation.data)

    def _pwrite(self, operation: Operation) -> None:
        self._put(self._file(operation), operation.offset, operation.data)

    def _put(self, file: File, offset: int, data: bytes) -> None:
        file.pending.append(Write(offset, data))
        file.size = max(file.size, offset + len(data))

    def _resize(self, file: File, size: int) -> None:
        file.pending.append(Resize(size))
        file.size = size

    def _ftruncate(self, operation: Operation) -> None:
        self._resize(self._file(operation), operation.offset)

    def _fallocate(self, operation: Operation) -> None:
        file = self._file(operation)
        file.pending.append(Resize(operation.offset, grows_only=True))
        file.size = max(file.size, operation.offset)

    def _fsync(self, operation: Operation) -> None:
        self._opened[operation.descriptor].node.sync()

    _fdatasync = _fsync

    def _mkdir(self, operation: Operation) -> None:
        directory, name = self._place(operation.path)
        directory.change(Change(added=((name, Directory()),)))

    def _rename(self, operation: Operation) -> None:
        source, old = self._place(operation.path)
        target, new = self._place(operation.target)
        node = source.now[old]
        if source is target:
            source.change(Change(removed=(old,), added=((new, node),)))
        else:
            target.change(Change(added=((new, node),)))
            source.change(Change(removed=(old,)))

    def _unlink(self, operation: Operation) -> None:
        directory, name = self._place(operation.path)
        directory.change(Change(removed=(name,)))

    _rmdir = _unlink

    def _symlink(self, operation: Operation) -> None:
        directory, name = self._place(operation.path)
        directory.change(Change(added=((name, Link(operation.target)),)))

    def _link(self, operation: Operation) -> None:
        directory, name = self._place(operation.target)
        directory.change(Change(added=((name, self._find(operation.path)),)))


@dataclass(frozen=True)
class CrashState:
    """What one power cut leaves."""

    tree: Tree
    marks: tuple[str, ...]
    """The harness's notes before it."""
    why: str
    rank: int

    def lay_out(self, folder: Path) -> None:
        """Make it real in a new directory."""
        folder.mkdir()
        for path, content in self.tree.items():
            place = folder / path
            if content is None:
                place.mkdir()
            elif isinstance(content, str):
                place.symlink_to(content)
            else:
                place.write_bytes(content)


def crash_states(
    name: str, root: str, log: Sequence[Operation], *, seed: int, mixes: int
) -> list[CrashState]:
    """Every state that a power cut after some operation of the workload may leave, each once: see
    `_fates`."""
    file_system = FileSystem(root)
    marks: list[str] = []
    seen: set[int] = set()
    states: list[CrashState] = []
    for position, operation in enumerate(log):
        if operation.kind == "mark":
            marks.append(operation.path)
        elif not file_system.apply(operation):
            continue
        mixtures = _fates(file_system.items(), seed + position, mixes)
        for number, (rank, fates) in enumerate(mixtures):
            tree = file_system.tree(fates, seed + number)
            key = hash((frozenset(tree.items()), len(marks)))
            if key not in seen:
                seen.add(key)
                why = f"{name}, after operation {position} ({operation}), mixture {number}"
                states.append(CrashState(tree, tuple(marks), why, rank))
    return states


def _fates(items: list[Item], seed: int, mixes: int) -> Iterator[tuple[int, Fates]]:
    """What may become of what is pending, with a rank, the plainest first: all kept, all lost; one
    alone lost or kept; all before one kept; one write torn or zero; random mixtures."""
    yield 0, {}
    yield 0, dict.fromkeys(items, "lost")
    for index, item in enumerate(items):
        yield 1, {item: "lost"}
        yield 1, {other: "lost" for other in items if other is not item}
        yield 2, dict.fromkeys(items[index:], "lost")
        if isinstance(item, Write):
            yield 3, {item: "torn"}
            yield 3, {item: "zero"}
    chance = random.Random(seed)
    for _ in range(mixes if len(items) > 1 else 0):
        yield (
            4,
            {
                item: chance.choice(("lost", "torn", "zero")) if isinstance(item, Write) else "lost"
                for item in items
                if chance.random() < 0.5
            },
        )


def choose(states: Sequence[CrashState], limit: int) -> list[CrashState]:
    """That many of them: the plainest, and an even choice of the first that are too many."""
    chosen: list[CrashState] = []
    for rank in sorted({state.rank for state in states}):
        equal = [state for state in states if state.rank == rank]
        room = min(limit - len(chosen), len(equal))
        chosen += [equal[index * len(equal) // room] for index in range(room)]
    return chosen
