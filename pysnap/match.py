"""Which live leaf belongs to which record: a snapshot is compared with the registered parts, and
put back into them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pysnap import _engine, tree
from pysnap.dtypes import TORCH_ELEMENTS
from pysnap.errors import ConfigError, CorruptError, MismatchError, NotFoundError
from pysnap.layout import Leaf, dtype_name
from pysnap.manifest import Record
from pysnap.overlay import NO_ARRAY, NO_TENSOR, overlay, rename
from pysnap.parts import RESERVED, Container, ModulePart, Stateful
from pysnap.repository import Snapshot
from pysnap.restore import Restore, describe

_log = logging.getLogger("pysnap")

_MOST_DIFFERENCES = 20

_Difference = tuple[str, str, str]  # what, live, in the snapshot


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a snapshot may differ from the live objects, and what of it is wanted."""

    strict: bool = True
    """Refuse a snapshot that differs; else what does not fit stays as it is live."""
    only: tuple[str, ...] | None = None
    """Names of parts or of entries under them, as `tree.covers` takes them; None: everything."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Names in the snapshot and what they are live."""
    convert: bool = False
    """Convert tensors of another dtype."""
    restart: frozenset[str] = frozenset()
    """Parts that stay as they are live."""

    @classmethod
    def check(
        cls,
        *,
        strict: bool,
        only: Iterable[str] | None,
        rename: Mapping[str, str] | None,
        convert: bool,
        restart: Mapping[str, str],
        parts: Iterable[str],
    ) -> Terms:
        """The arguments of `resume`. Raises ConfigError for what cannot be."""
        if isinstance(only, str):
            raise ConfigError(f"only is {only!r}; it must be a list of names, such as [{only!r}]")
        only = None if only is None else tuple(only)
        if only == ():
            raise ConfigError("only is empty: leave resume() out, or name what is wanted")
        for name, word in restart.items():
            if name not in parts:
                raise ConfigError(f"resume({name}=...): no part of that name is registered")
            if word != "restart":
                raise ConfigError(f'resume({name}={word!r}): it must be "restart"')
        return cls(
            strict=strict,
            only=only,
            rename=dict(rename or {}),
            convert=convert,
            restart=frozenset(restart),
        )

    def wants(self, path: str) -> bool:
        """Whether all at `path` is wanted."""
        return self.only is None or any(tree.covers(name, path) for name in self.only)

    def touches(self, part: str) -> bool:
        """Whether anything of a part is wanted."""
        if part in self.restart:
            return False
        return self.wants(part) or any(tree.covers(part, name) for name in self.only or ())

    def fits(self, leaf: Leaf, record: Record) -> bool:
        """Whether a record can be put into a live leaf."""
        if leaf.shape != record.shape:
            return False
        name = leaf.dtype.str if isinstance(leaf, np.ndarray) else dtype_name(leaf.dtype)
        return name == record.dtype or (
            self.convert and isinstance(leaf, torch.Tensor) and record.dtype in TORCH_ELEMENTS
        )


def load_parts(
    snapshot: Snapshot,
    parts: dict[str, Stateful],
    terms: Terms,
    engine: _engine.Engine | None = None,
) -> dict[str, Any]:
    """Put every part back that `terms` asks for; returns the rest of the state (`progress`, `rng`)
    that they ask for.

    Everything is compared before anything is touched: a difference raises MismatchError, or is
    told in a warning where terms are not strict. Bytes go straight into the live tensors where
    shape and type agree, and into new tensors otherwise (the state of a fresh optimizer), through
    the staging memory of `engine` (see `Restore.read`).
    """
    return _Match(snapshot, parts, terms).load(engine)


class _Match:
    """One snapshot beside the live parts."""

    def __init__(self, snapshot: Snapshot, parts: dict[str, Stateful], terms: Terms) -> None:
        self._snapshot = snapshot
        self._terms = terms
        self._nodes = _renamed_nodes(snapshot, terms)
        self._parts = {name: part for name, part in parts.items() if terms.touches(name)}
        self._live = {name: part.state_dict() for name, part in self._parts.items()}
        self._live_leaves = {name: _leaves_of(state) for name, state in self._live.items()}
        self._saved_leaves = {name: dict(tree.leaves(node)) for name, node in self._nodes.items()}
        self._fitting = {name: self._find_fitting(name) for name in self._parts}
        self._registered = parts

    def load(self, engine: _engine.Engine | None) -> dict[str, Any]:
        self._check_names()
        if not self._terms.strict:
            self._leave_out_states_of_misfits()
        differences = self._compare()
        if differences and self._terms.strict:
            raise MismatchError(
                f"{self._snapshot.path} does not fit the live objects; nothing was changed:\n"
                + _table(differences)
            )
        if differences:
            _log.warning(
                "%s does not fit the live objects in all; what differs stays as it is live:\n%s",
                self._snapshot.path,
                _table(differences),
            )
        loaded = [name for name in self._parts if self._loads(name, differences)]
        rest = [name for name in RESERVED if self._terms.wants(name)]

        wanted = self._wanted(loaded, rest)
        restore = Restore(self._snapshot, self._places(loaded, wanted), only=wanted)
        records = self._snapshot.manifest.tensors

        def get(index: int) -> Leaf:
            leaf = restore.leaves[index]
            if index in wanted:
                return leaf
            return NO_TENSOR if records[index].dtype in TORCH_ELEMENTS else NO_ARRAY

        nodes: dict[str, tree.Json] = {name: self._nodes[name] for name in (*loaded, *rest)}
        state = tree.decode(nodes, get)
        if not isinstance(state, dict):
            raise CorruptError(f"{self._snapshot.path} holds no registered parts")
        for name in loaded:
            state[name] = self._merged(name, state[name])
            check = getattr(self._parts[name], "check_state_dict", None)
            if check is not None:
                check(state[name])
        restore.read(engine)
        for name in loaded:
            try:
                self._parts[name].load_state_dict(state.pop(name))
            except MismatchError as error:
                raise MismatchError(
                    f"{error}\nIt was found only when {name} took its state over: "
                    f"{', '.join(loaded)} are overwritten in part"
                ) from error
        return state

    def _loads(self, name: str, differences: list[_Difference]) -> bool:
        """Whether a part is loaded. Of an optimizer that differs nothing is: half of one is
        none."""
        is_optimizer = isinstance(self._parts[name], torch.optim.Optimizer)
        return name in self._nodes and not any(
            what == name or (is_optimizer and tree.covers(name, what)) for what, _, _ in differences
        )

    def _check_names(self) -> None:
        """Names of `only` that are nowhere are a mistake, not a wish for nothing."""
        if self._terms.only is None:
            return
        try:
            tree.prune(dict(self._nodes), self._terms.only)
        except NotFoundError as error:
            raise MismatchError(
                f"{self._snapshot.path}, of which only names a part: {error}"
            ) from None
        taken = [*self._parts, *(name for name in RESERVED if self._terms.wants(name))]
        for only in self._terms.only:
            if not any(tree.covers(only, name) or tree.covers(name, only) for name in taken):
                raise MismatchError(
                    f"only names {only}, but no part of that name is registered "
                    "(progress and rng are taken as a whole)"
                )

    def _is_whole(self, name: str) -> bool:
        """Whether a part takes the saved state as it is."""
        # Of other parts nothing can be known to fit or not.
        partial = isinstance(self._parts[name], (ModulePart, Container, torch.optim.Optimizer))
        return self._terms.wants(name) and (self._terms.strict or not partial)

    def _leave_out_states_of_misfits(self) -> None:
        """What an optimizer knows of a parameter that stays as it is live is of no use."""
        misfits: set[int] = set()
        for name, part in self._parts.items():
            if isinstance(part, ModulePart):
                misfits |= {
                    leaf.data_ptr()
                    for path, leaf in self._live_leaves[name].items()
                    if isinstance(leaf, torch.Tensor) and path not in self._fitting[name]
                }
        for name, part in self._parts.items():
            if not isinstance(part, torch.optim.Optimizer) or name not in self._nodes:
                continue
            parameters = [p for group in part.param_groups for p in group["params"]]
            for index, parameter in enumerate(parameters):
                if parameter.data_ptr() in misfits:
                    self._drop(name, index)

    def _drop(self, optimizer: str, index: int) -> None:
        node: Any = self._nodes[optimizer]
        states = node.get("state") if isinstance(node, dict) else None
        # Of torch.optim, whose keys are the parameters' numbers; others keep what they saved.
        if isinstance(states, dict) and isinstance(states.get("$dict"), list):
            pairs = [pair for pair in states["$dict"] if pair[0] != index]
            self._nodes[optimizer] = {**node, "state": {"$dict": pairs}}
            self._saved_leaves[optimizer] = dict(tree.leaves(self._nodes[optimizer]))

    def _merged(self, name: str, saved: Any) -> Any:
        """The state to load: the saved one, or what is wanted of it over the live one."""
        if self._is_whole(name):
            return saved
        # A module takes no keys that it does not have.
        adds = not isinstance(self._parts[name], ModulePart)
        return overlay(self._live[name], saved, self._terms.wants, adds=adds, path=name)

    def _wanted(self, loaded: list[str], rest: list[str]) -> set[int]:
        """The records to read."""
        found: set[int] = set()
        for name in loaded:
            only_known = isinstance(self._parts[name], ModulePart)
            for path, index in self._saved_leaves[name].items():
                fits = path in self._fitting[name] or _is_extra(path)
                if self._terms.wants(tree.join(name, path)) and (fits or not only_known):
                    found.add(index)
        return found | {index for name in rest for index in self._saved_leaves[name].values()}

    def _places(self, loaded: list[str], wanted: set[int]) -> dict[int, Leaf]:
        """The live leaf of each record that has one of its shape and type at its path."""
        return {
            index: leaf
            for name in loaded
            for path, index in self._saved_leaves[name].items()
            if index in wanted
            and path in self._fitting[name]
            and not _is_extra(path)
            and _is_writable(leaf := self._live_leaves[name][path])
        }

    def _find_fitting(self, name: str) -> set[str]:
        """The paths of a part at which the record can be put into the live leaf."""
        live, records = self._live_leaves[name], self._snapshot.manifest.tensors
        return {
            path
            for path, index in self._saved_leaves.get(name, {}).items()
            if path in live and self._terms.fits(live[path], records[index])
        }

    def _compare(self) -> list[_Difference]:
        differences: list[_Difference] = []
        if self._terms.only is None:
            differences += [
                (name, "not registered", "present")
                for name in self._nodes
                if name not in self._registered and name not in RESERVED
            ]
        for name, part in self._parts.items():
            if name not in self._nodes:
                differences.append((name, "registered", "missing"))
            elif isinstance(part, ModulePart):
                differences += self._compare_leaves(name, all_paths=True)
            elif isinstance(part, torch.optim.Optimizer):
                differences += _compare_groups(name, part, self._nodes[name])
                differences += self._compare_leaves(name, all_paths=False)
            elif isinstance(part, Container):
                differences += self._compare_root(name)
        return differences

    def _compare_leaves(self, name: str, *, all_paths: bool) -> list[_Difference]:
        """Leaves of another shape or type; where `all_paths`, also those on one side alone."""
        live, saved = self._live_leaves[name], self._saved_leaves[name]
        differences = []
        for path in dict.fromkeys([*live, *saved]):
            if path in self._fitting[name]:
                continue
            leaf = live.get(path)
            record = self._snapshot.manifest.tensors[saved[path]] if path in saved else None
            if not self._terms.wants(tree.join(name, path)) or _is_extra(path):
                continue
            # An optimizer casts its state itself, and has none before its first step.
            if not all_paths and (leaf is None or record is None or leaf.shape == record.shape):
                continue
            differences.append((tree.join(name, path), describe(leaf), describe(record)))
        return differences

    def _compare_root(self, name: str) -> list[_Difference]:
        """A tensor or array that is a part by itself is filled in place, so it must fit."""
        live, saved = self._live_leaves[name].get(""), self._saved_leaves[name].get("")
        record = None if saved is None else self._snapshot.manifest.tensors[saved]
        if live is None or (record is not None and self._terms.fits(live, record)):
            return []
        return [(name, describe(live), describe(record))]


def _renamed_nodes(snapshot: Snapshot, terms: Terms) -> dict[str, tree.Json]:
    """The encoded state of each part, under its live name."""
    saved = snapshot.manifest.tree
    if not isinstance(saved, dict):
        raise MismatchError(f"{snapshot.path} holds no registered parts; read it with pysnap.load")
    absent = [name for name in RESERVED if name not in saved]
    if absent:
        raise MismatchError(
            f"{snapshot.path} was not taken by a Snapshotter (it lacks {absent[0]}); "
            "read it with pysnap.load"
        )
    if terms.rename:
        saved = rename(saved, terms.rename, str(snapshot.path))
        assert isinstance(saved, dict)
    return dict(saved)


def _leaves_of(state: object) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}

    def put(path: str, leaf: Leaf) -> int:
        found[path] = leaf
        return len(found) - 1

    tree.encode(state, put)
    return found


def _is_extra(path: str) -> bool:
    """Whether it is in what a module's `get_extra_state` returned: `set_extra_state` takes that,
    whatever it is."""
    # Thousands of paths are asked; the first question is the quick one.
    return "_extra_state" in path and path.split("/")[0].rpartition(".")[2] == "_extra_state"


def _is_writable(leaf: Leaf) -> bool:
    """Whether each element has a place of its own that may be written; `load_state_dict` is given a
    new leaf otherwise."""
    if isinstance(leaf, np.ndarray):
        return bool(leaf.flags.c_contiguous and leaf.flags.writeable)
    return leaf.is_contiguous() or all(
        stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if size > 1
    )


def _compare_groups(name: str, optimizer: torch.optim.Optimizer, node: Any) -> list[_Difference]:
    try:
        groups = node["param_groups"]
        there = [len(group["params"]) for group in groups]
        names_there = [group.get("param_names") for group in groups]
    except (KeyError, TypeError, AttributeError):
        # An optimizer with a state_dict of its own form checks it itself.
        return []
    here = [len(group["params"]) for group in optimizer.param_groups]
    if here != there:
        return [(name, f"groups of {here} parameters", f"{there}")]
    names_here = [group.get("param_names") for group in optimizer.param_groups]
    for index, (mine, other) in enumerate(zip(names_here, names_there, strict=True)):
        if mine is not None and other is not None and mine != other:
            return [(name, f"group {index} has {_short(mine)}", _short(other))]
    return []


def _short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _table(differences: list[_Difference]) -> str:
    rows = [("what", "live", "snapshot"), *differences[:_MOST_DIFFERENCES]]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = "\n".join(
        f"  {what:<{widths[0]}}  {here:<{widths[1]}}  {there}" for what, here, there in rows
    )
    more = len(differences) - _MOST_DIFFERENCES
    return table + (f"\n  and {more} more" if more > 0 else "")
