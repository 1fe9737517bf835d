"""What stays of a state from snapshot to snapshot, so that only what changed is encoded again.

A training run has the same containers at every snapshot, with the same keys, and tensors where
tensors were; a few numbers and random states change. To see that, a state is taken apart level by
level, all containers of one depth at once: so the work is done by a few calls for all entries of a
level, and not by some instructions of the interpreter for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from pysnap import _engine, tree
from pysnap.layout import Leaf

_MAPPINGS = (dict, OrderedDict)
_SEQUENCES = (list, tuple)
_LEAVES = (torch.Tensor, torch.nn.Parameter, np.ndarray)
# Of these, two that are equal are encoded as the same; of a float, not even that can be said.
_SIMPLE = (type(None), bool, int, str, bytes)
# Equal keys of these types are encoded as the same.
_KEYS = frozenset({str, int})

_Path = tuple[Any, ...]
# Of some values, which: all, none, or one by one.
_Mask = bool | list[bool]


@dataclass
class Content:
    """What a skeleton finds in a state: tensors and arrays, and the plain values that may differ
    from those of the state before."""

    leaves: list[Leaf]
    simple: list[Any]
    others: list[Any]


@dataclass
class _Level:
    """The containers of one depth, in order, and what is in them, one after the other."""

    containers: _engine.Level
    is_leaf: _Mask
    is_simple: _Mask
    is_other: _Mask
    is_container: _Mask


def _mask(flags: list[bool]) -> _Mask:
    if not any(flags):
        return False
    return True if all(flags) else flags


def _select(values: list[Any], mask: _Mask) -> Iterable[Any]:
    if isinstance(mask, bool):
        return values if mask else ()
    return compress(values, mask)


def _views(containers: list[Any], is_mapping: list[bool]) -> Iterable[Iterable[Any]]:
    # One view at a time: a list of thousands is slow to make, and is looked through for garbage.
    return (
        container.values() if mapping else container
        for container, mapping in zip(containers, is_mapping, strict=True)
    )


class Skeleton:
    """The containers of one state, and its encoded form."""

    def __init__(self, value: object, node: tree.Json) -> None:
        """The skeleton of `value`, which `tree.encode` turned into `node`. Raises ValueError for
        states that have none: keys other than str and int, tensors in a Counter."""
        self._kind = type(value)
        self._node = node
        self.indices: list[int] = []
        """The index, in the tree, of each leaf that `match` finds."""
        self._simple: list[Any] = []
        self._paths_of_simple: list[_Path] = []
        self._paths_of_others: list[_Path] = []
        self._levels: list[_Level] = []
        if self._kind not in (*_MAPPINGS, *_SEQUENCES):
            raise ValueError("it is no container")
        level: list[tuple[Any, tree.Json, _Path]] = [(value, node, ())]
        while level:
            level = self._add(level)

    def _add(self, level: list[tuple[Any, tree.Json, _Path]]) -> list[tuple[Any, tree.Json, _Path]]:
        """Take in the containers of one depth, each with its encoded form and where that is; those
        of the next depth."""
        containers = [container for container, _, _ in level]
        is_mapping = [isinstance(container, _MAPPINGS) for container in containers]
        keys = list(chain.from_iterable(compress(containers, is_mapping)))
        if not _KEYS.issuperset(map(type, keys)):
            raise ValueError("it has keys that are no text and no integers")
        children = list(chain.from_iterable(_views(containers, is_mapping)))
        places = [place for _, node, path in level for place in _places(node, path)]
        kinds = list(map(type, children))
        is_leaf = [kind in _LEAVES for kind in kinds]
        is_simple = [kind in _SIMPLE for kind in kinds]
        is_container = [kind in _MAPPINGS or kind in _SEQUENCES for kind in kinds]
        is_other = [
            not (leaf or simple or container)
            for leaf, simple, container in zip(is_leaf, is_simple, is_container, strict=True)
        ]
        self._levels.append(
            _Level(
                _engine.Level(
                    lengths=list(map(len, containers)),
                    is_mapping=is_mapping,
                    keys=keys,
                    kinds=kinds,
                ),
                _mask(is_leaf),
                _mask(is_simple),
                _mask(is_other),
                _mask(is_container),
            )
        )
        self.indices += [_index(node) for node, _ in compress(places, is_leaf)]
        self._simple += compress(children, is_simple)
        self._paths_of_simple += [path for _, path in compress(places, is_simple)]
        for node, path in compress(places, is_other):
            if any(tree.leaves(node)):
                raise ValueError("it has tensors in what is not looked into")
            self._paths_of_others.append(path)
        return [
            (child, node, path)
            for child, (node, path) in compress(zip(children, places, strict=True), is_container)
        ]

    def match(self, value: object) -> Content | None:
        """What is in `value`, if it has the same containers with the same keys, and in them the
        same kinds of values; else None."""
        if type(value) is not self._kind:
            return None
        content = Content([], [], [])
        containers: list[Any] = [value]
        for level in self._levels:
            children = level.containers.open(containers)
            if children is None:
                return None
            content.leaves += _select(children, level.is_leaf)
            content.simple += _select(children, level.is_simple)
            content.others += _select(children, level.is_other)
            containers = list(_select(children, level.is_container))
        return content

    def encode(self, content: Content) -> Any:
        """The encoded form of the state in which `match` found `content`. Raises StateError for
        what cannot be stored."""
        changes: list[tuple[_Path, object]] = []
        if content.simple != self._simple:
            pairs = zip(self._paths_of_simple, self._simple, content.simple, strict=True)
            changes += [(path, now) for path, before, now in pairs if before != now]
        changes += zip(self._paths_of_others, content.others, strict=True)
        encoded = [(path, tree.encode(value, _refuse)) for path, value in changes]
        self._node = _replaced(self._node, encoded)
        self._simple = content.simple
        return self._node


def _places(node: Any, path: _Path) -> Iterable[tuple[tree.Json, _Path]]:
    """The encoded form of what is in an encoded container, and where that is."""
    if type(node) is list:
        return [(child, (*path, at)) for at, child in enumerate(node)]
    if type(node) is dict and len(node) == 1:
        ((tag, items),) = node.items()
        if tag == "$tuple":
            return [(child, (*path, tag, at)) for at, child in enumerate(items)]
        if tag in ("$dict", "$ordered"):
            return [(child, (*path, tag, at, 1)) for at, (_, child) in enumerate(items)]
    return [(child, (*path, key)) for key, child in node.items()]


def _index(node: Any) -> int:
    (index,) = node.values()
    assert type(index) is int
    return index


def _replaced(root: Any, changes: list[tuple[_Path, tree.Json]]) -> Any:
    """`root` with other nodes at some places; the old one stays what it was, and shares with the
    new one what is the same in both."""
    fresh: set[int] = set()

    def own(node: Any) -> Any:
        if id(node) in fresh:
            return node
        copy = node.copy()
        fresh.add(id(copy))
        return copy

    for path, new in changes:
        root = node = own(root)
        for key in path[:-1]:
            node[key] = own(node[key])
            node = node[key]
        node[path[-1]] = new
    return root


def _refuse(path: str, leaf: Leaf) -> int:
    raise AssertionError(f"a {type(leaf).__name__} at {path!r} is no plain value")
