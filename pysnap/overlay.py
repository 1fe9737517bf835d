"""A saved state that does not fit the live one as it is: entries renamed, a part of it laid over
what is live."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pysnap import tree
from pysnap.errors import MismatchError

NO_TENSOR, NO_ARRAY = torch.empty(0, device="cpu"), np.empty(0)
"""Stand in a saved state for what is not wanted of it."""

_MAPPINGS = (dict, OrderedDict)


def rename(node: tree.Json, names: Mapping[str, str], where: str) -> tree.Json:
    """An encoded tree with other keys: each entry whose path a key of `names` covers (see
    `tree.covers`) gets the path that begins with its value.

    An entry stays in its container. Raises MismatchError, which names `where`, for a name that
    covers nothing, for two entries of one name, and for one that would leave its container.
    """
    renamer = _Renamer(names, where)
    renamed = renamer.node(node, "", "")
    unused = [name for name in names if name not in renamer.used]
    if unused:
        raise MismatchError(f"{where} holds no {unused[0]}, which rename names")
    return renamed


class _Renamer:
    def __init__(self, names: Mapping[str, str], where: str) -> None:
        self._names = names
        self._where = where
        self.used: set[str] = set()

    def node(self, node: tree.Json, before: str, after: str) -> tree.Json:
        """`node`, which was at the path `before` and is at `after`."""
        if isinstance(node, list):
            return [
                self.node(child, tree.join(before, index), tree.join(after, index))
                for index, child in enumerate(node)
            ]
        if not isinstance(node, dict):
            return node
        tag = next(iter(node), "")
        if not tag.startswith("$"):
            pairs = self._pairs(list(node.items()), before, after)
            return {str(key): child for key, child in pairs}
        content = node[tag]
        if tag == "$tuple":
            return {tag: self.node(content, before, after)}
        if tag in ("$dict", "$ordered", "$counter") and isinstance(content, list):
            return {tag: [list(pair) for pair in self._pairs(content, before, after)]}
        return node

    def _pairs(self, pairs: list[Any], before: str, after: str) -> list[tuple[Any, tree.Json]]:
        renamed: list[tuple[Any, tree.Json]] = []
        container = f"{after}/" if after else ""
        for key, child in pairs:
            old, here = tree.join(before, key), tree.join(after, key)
            new = self._path(old) if type(key) is str else here
            if new == here:
                renamed.append((key, self.node(child, old, here)))
                continue
            new_key = new.removeprefix(container)
            if not new.startswith(container) or "/" in new_key or new_key[:1] == "$":
                raise MismatchError(
                    f"{old} of {self._where} cannot become {new}: an entry stays in its container"
                )
            renamed.append((new_key, self.node(child, old, new)))
        keys = [key for key, _ in renamed if type(key) is str]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise MismatchError(
                f"two entries of {self._where} would become {tree.join(after, twice)}"
            )
        return renamed

    def _path(self, path: str) -> str:
        for old, new in self._names.items():
            if tree.covers(old, path):
                self.used.add(old)
                return new + path[len(old) :]
        return path


def overlay(live: Any, saved: Any, takes: Callable[[str], bool], *, adds: bool, path: str) -> Any:
    """`live` with what is in `saved` at the paths that `takes` accepts; nothing is changed in
    place. Where `adds`, entries of a mapping that only `saved` has come in, too."""
    if _is_absent(saved):
        return live
    if type(live) in _MAPPINGS and isinstance(saved, Mapping):
        merged = {
            key: overlay(item, saved[key], takes, adds=adds, path=tree.join(path, key))
            if key in saved
            else item
            for key, item in live.items()
        }
        if adds:
            merged |= {
                key: item
                for key, item in saved.items()
                if key not in live and not _lacks(item) and takes(tree.join(path, key))
            }
        return type(live)(merged)
    if type(live) is type(saved) and isinstance(live, (list, tuple)) and len(live) == len(saved):
        return type(live)(
            overlay(old, new, takes, adds=adds, path=tree.join(path, index))
            for index, (old, new) in enumerate(zip(live, saved, strict=True))
        )
    return saved if takes(path) and not _lacks(saved) else live


def _is_absent(saved: object) -> bool:
    return saved is NO_TENSOR or saved is NO_ARRAY


def _lacks(saved: object) -> bool:
    """Whether anything in it was not read."""
    if isinstance(saved, Mapping):
        return any(map(_lacks, saved.values()))
    return any(map(_lacks, saved)) if isinstance(saved, (list, tuple)) else _is_absent(saved)
