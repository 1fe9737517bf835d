"""Which live leaf belongs to which record: a snapshot is compared with the registered parts, and
put back into them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pysnap import tree
from pysnap.errors import CorruptError, MismatchError
from pysnap.layout import Leaf, dtype_name
from pysnap.manifest import Record
from pysnap.parts import RESERVED, Stateful
from pysnap.repository import Snapshot
from pysnap.restore import Restore, describe

_MOST_DIFFERENCES = 20


def load_parts(snapshot: Snapshot, parts: dict[str, Stateful]) -> dict[str, Any]:
    """Put every part back; returns the rest of the state (`progress`, `rng`).

    Everything is compared before anything is touched: a difference raises MismatchError. Bytes
    go straight into the live tensors where shape and type agree, and into new tensors otherwise
    (the state of a fresh optimizer).
    """
    saved_tree = snapshot.manifest.tree
    if not isinstance(saved_tree, dict):
        raise MismatchError(f"{snapshot.path} holds no registered parts; read it with pysnap.load")
    absent = [name for name in RESERVED if name not in saved_tree]
    if absent:
        raise MismatchError(
            f"{snapshot.path} was not taken by a Snapshotter (it lacks {absent[0]}); "
            "read it with pysnap.load"
        )
    live = {name: _leaves_of(part.state_dict()) for name, part in parts.items()}
    saved = {name: dict(tree.leaves(node)) for name, node in saved_tree.items()}
    _compare(snapshot, parts, live, saved)

    restore = Restore(snapshot, _places(snapshot, live, saved))
    state = tree.decode(saved_tree, restore.leaves.__getitem__)
    if not isinstance(state, dict):
        raise CorruptError(f"{snapshot.path} holds no registered parts")
    for name, part in parts.items():
        check = getattr(part, "check_state_dict", None)
        if check is not None:
            check(state[name])
    restore.read()
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))
    return state


def _leaves_of(state: object) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}

    def put(path: str, leaf: Leaf) -> int:
        found[path] = leaf
        return len(found) - 1

    tree.encode(state, put)
    return found


def _fits(leaf: Leaf, record: Record) -> bool:
    name = leaf.dtype.str if isinstance(leaf, np.ndarray) else dtype_name(leaf.dtype)
    return name == record.dtype and leaf.shape == record.shape


def _is_writable(leaf: Leaf) -> bool:
    """Whether each element has a place of its own that may be written; `load_state_dict` is given a
    new leaf otherwise."""
    if isinstance(leaf, np.ndarray):
        return bool(leaf.flags.c_contiguous and leaf.flags.writeable)
    return leaf.is_contiguous() or all(
        stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if size > 1
    )


def _places(
    snapshot: Snapshot, live: dict[str, dict[str, Leaf]], saved: dict[str, dict[str, int]]
) -> dict[int, Leaf]:
    """The live leaf of each record that has one of its shape and type at its path."""
    return {
        index: live[name][path]
        for name, paths in saved.items()
        for path, index in paths.items()
        if name in live
        and path in live[name]
        and _fits(live[name][path], snapshot.manifest.tensors[index])
        and _is_writable(live[name][path])
    }


def _compare(
    snapshot: Snapshot,
    parts: dict[str, Stateful],
    live: dict[str, dict[str, Leaf]],
    saved: dict[str, dict[str, int]],
) -> None:
    differences = [
        (name, "not registered", "present")
        for name in saved
        if name not in parts and name not in RESERVED
    ]
    for name, part in parts.items():
        if name not in saved:
            differences.append((name, "registered", "missing"))
        elif isinstance(part, torch.nn.Module):
            differences += _compare_tensors(name, live[name], saved[name], snapshot)
        elif isinstance(part, torch.optim.Optimizer):
            differences += _compare_groups(name, part, snapshot.manifest.tree[name])
    if differences:
        rows = [("what", "live", "snapshot"), *differences[:_MOST_DIFFERENCES]]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = "\n".join(
            f"  {what:<{widths[0]}}  {here:<{widths[1]}}  {there}" for what, here, there in rows
        )
        more = len(differences) - _MOST_DIFFERENCES
        raise MismatchError(
            f"{snapshot.path} does not fit the live objects; nothing was changed:\n{table}"
            + (f"\n  and {more} more" if more > 0 else "")
        )


def _compare_tensors(
    name: str, live: dict[str, Leaf], saved: dict[str, int], snapshot: Snapshot
) -> list[tuple[str, str, str]]:
    differences = []
    for path in [*live, *(path for path in saved if path not in live)]:
        leaf = live.get(path)
        record = snapshot.manifest.tensors[saved[path]] if path in saved else None
        if leaf is None or record is None or not _fits(leaf, record):
            differences.append((tree.join(name, path), describe(leaf), describe(record)))
    return differences


def _compare_groups(
    name: str, optimizer: torch.optim.Optimizer, node: Any
) -> list[tuple[str, str, str]]:
    here = [len(group["params"]) for group in optimizer.param_groups]
    try:
        there = [len(group["params"]) for group in node["param_groups"]]
    except (KeyError, TypeError):
        # An optimizer with a state_dict of its own form checks it itself.
        return []
    if here == there:
        return []
    return [(f"{name}: parameters in each group", str(here), str(there))]
