"""What is where in an encoded tree, without torch: paths of values, names of tensors, and the forms
of the nodes that both need (docs/format.md section 3)."""

from __future__ import annotations

import base64
import difflib
import math
import re
import struct
from collections.abc import Collection, Iterable, Iterator
from enum import Enum
from typing import TypeAlias

from pysnap.errors import CorruptError, NotFoundError, printable

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_DEPTH = 64
"""A value stands inside at most so many containers."""
PAIRS = frozenset({"$dict", "$ordered", "$counter"})
"""Tags of mappings that stand as pairs of key and value."""

_MAX_NAMES_SHOWN = 5


def join(path: str, key: object) -> str:
    """The path of entry `key` of the container at `path`, such as "optimizer/state/0/exp_avg".

    The path of the root is "".
    """
    return f"{path}/{_part(key)}" if path else _part(key)


def covers(name: str, path: str) -> bool:
    """Whether `path` is `name` or lies under it: "model/head" covers "model/head",
    "model/head/0" and "model/head.weight", but not "model/header"."""
    return path == name or path.startswith((f"{name}/", f"{name}."))


def leaves(node: Json) -> Iterator[tuple[str, int]]:
    """Path and index of every tensor and array of an encoded tree, as `encode` put them.

    Paths are unique: where those of several entries read the same, as with the keys 0 and "0", all
    but the first get "#2", "#3" and so on appended. Raises `CorruptError` where it meets something
    that `encode` does not write.
    """
    names = Names()
    for path, index in _walk(node, "", 0):
        yield names.unique(path), index


def prune(node: Json, names: Collection[str]) -> Json:
    """An encoded tree with only what `names` select: the values that one of them `covers`, tensors
    and arrays by their paths in `leaves`.

    Mappings keep the entries that are selected or hold something selected. A list or tuple that
    holds something selected stays whole, for in it places have a meaning. Raises `NotFoundError`
    for names that select nothing, and `CorruptError` as `leaves` does.
    """
    pruner = _Pruner(names)
    pruned, _ = pruner.node(node, "", 0)
    pruner.check_found()
    return pruned


class Names:
    """Makes paths unique."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def unique(self, path: str) -> str:
        if path not in self._taken:
            self._taken.add(path)
            return path
        # Counting goes on where it ended, so that many equal paths do not take quadratic time.
        count = self._counts.get(path, 1) + 1
        while f"{path}#{count}" in self._taken:
            count += 1
        self._counts[path] = count
        self._taken.add(f"{path}#{count}")
        return f"{path}#{count}"


def _part(key: object) -> str:
    if type(key) is str:
        return key
    if isinstance(key, Enum):
        return f"{type(key).__qualname__}.{key.name}"
    if isinstance(key, tuple):
        return f"({', '.join(map(_part, key))})"
    return str(key) if isinstance(key, str) else repr(key)


def _encoded_part(key: Json, depth: int) -> str:
    """`_part` of a key in its encoded form."""
    match key:
        case {"$tuple": list(items)} if depth < MAX_DEPTH:
            return f"({', '.join(_encoded_part(item, depth + 1) for item in items)})"
        case {"$enum": [str(), str(name), str(member)]}:
            return f"{name}.{member}"
        case {"$float": str(digits)}:
            return repr(float_of(digits))
        case {"$bytes": str(text)}:
            return repr(bytes_of(text))
        case list() | dict():
            raise ValueError("a key of a type that cannot be a key, or nested too deep")
    return key if isinstance(key, str) else repr(key)


def _opened(node: Json, path: str, depth: int) -> int | Iterable[tuple[object, Json]]:
    """The index in a reference; keys, as paths show them, and values in another container."""
    entries: Iterable[tuple[object, Json]]
    if type(node) is list:
        entries = enumerate(node)
    elif type(node) is dict:
        try:
            tag = tag_of(node)
            if tag is None:
                entries = node.items()
            elif tag in ("$tensor", "$array"):
                return index_of(node[tag])
            elif tag == "$tuple":
                entries = enumerate(list_of(node[tag]))
            elif tag in PAIRS:
                entries = [
                    (_encoded_part(key, depth + 1), child) for key, child in pairs_of(node[tag])
                ]
            else:
                return ()
        except ValueError as error:
            raise corrupt(path, str(error)) from error
    else:
        return ()
    if depth == MAX_DEPTH:
        raise corrupt(path, f"it is nested deeper than {MAX_DEPTH}")
    return entries


def _walk(node: Json, path: str, depth: int) -> Iterator[tuple[str, int]]:
    opened = _opened(node, path, depth)
    if isinstance(opened, int):
        yield path, opened
        return
    around = [(path, iter(opened))]
    while around:
        path, entries = around[-1]
        for key, child in entries:
            if type(child) is not dict and type(child) is not list:
                continue
            below = join(path, key)
            opened = _opened(child, below, depth + len(around))
            if isinstance(opened, int):
                yield below, opened
            elif opened:
                around.append((below, iter(opened)))
                break
        else:
            around.pop()


class _Pruner:
    """One run of `prune`."""

    def __init__(self, names: Collection[str]) -> None:
        self._wanted = frozenset(names)
        self._selectable: set[str] = set()  # every name that covers a value
        self._names = Names()

    def node(self, node: Json, path: str, depth: int) -> tuple[Json, bool]:
        """What stays of `node`, and whether anything in it is selected."""
        opened = _opened(node, path, depth)
        is_reference = isinstance(opened, int)
        covering = _covering(self._names.unique(path) if is_reference else path)
        self._selectable |= covering
        selected = not covering.isdisjoint(self._wanted)
        if isinstance(opened, int):
            return node, selected
        # What is in a selected container is visited too: other names may select there.
        children = [self.node(child, join(path, key), depth + 1) for key, child in opened]
        holds = any(holds for _, holds in children)
        return node if selected else _with_selected(node, children), selected or holds

    def check_found(self) -> None:
        """Raise NotFoundError for the names that selected nothing."""
        missing = sorted(self._wanted - self._selectable)
        if not missing:
            return
        shown = []
        for name in missing[:_MAX_NAMES_SHOWN]:
            near = difflib.get_close_matches(name, self._selectable)
            like = f" (did you mean {' or '.join(map(quoted, near))}?)" if near else ""
            shown.append(quoted(name) + like)
        more = len(missing) - len(shown)
        raise NotFoundError(
            f"nothing in the state is named {', '.join(shown)}"
            + (f" and {more} more" if more else "")
            + "; pysnap.open lists the names of its tensors"
        )


def _covering(path: str) -> set[str]:
    """Every name that `covers` a path."""
    return {path[: match.start()] for match in re.finditer(r"[/.]|\Z", path)}


def _with_selected(node: Json, children: list[tuple[Json, bool]]) -> Json:
    """`node` where it is no mapping; else with only those children that hold something selected."""
    if type(node) is not dict:
        return node
    tag = tag_of(node)
    if tag is None:
        items = zip(node, children, strict=True)
        return {key: child for key, (child, holds) in items if holds}
    if tag not in PAIRS:
        return node
    pairs = zip(pairs_of(node[tag]), children, strict=True)
    return {tag: [[key, child] for (key, _), (child, holds) in pairs if holds]}


def quoted(path: str) -> str:
    """`path` for a message."""
    return f'"{printable(path)}"' if path else "the root"


def corrupt(path: str, what: str) -> CorruptError:
    where, why = quoted(path), printable(what)
    return CorruptError(
        f"the tree is damaged at {where}: {why}; verify the snapshot and load an intact one"
    )


def is_unicode(text: str) -> bool:
    """Whether `text` has no unpaired surrogates."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def tag_of(node: dict[str, Json]) -> str | None:
    """The tag of `node`, or None if it is a dict in its plain form."""
    tag = None
    for key in node:
        if type(key) is not str or not is_unicode(key):
            raise ValueError("a key is not text")
        if key[:1] == "$":
            tag = key
    if tag is not None and len(node) > 1:
        raise ValueError(f"there are other keys beside {tag}")
    return tag


def list_of(content: Json) -> list[Json]:
    if type(content) is not list:
        raise ValueError("a list is missing")
    return content


def pairs_of(content: Json) -> list[tuple[Json, Json]]:
    pairs = []
    for pair in list_of(content):
        if type(pair) is not list or len(pair) != 2:
            raise ValueError("an entry is not a pair of key and value")
        pairs.append((pair[0], pair[1]))
    return pairs


def text_of(content: Json) -> str:
    if type(content) is not str or not is_unicode(content):
        raise ValueError("text is missing")
    return content


def index_of(content: Json) -> int:
    if type(content) is not int or content < 0:
        raise ValueError("an index is not an integer >= 0")
    return content


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def bytes_of(content: Json) -> bytes:
    text = text_of(content)
    data = base64.b64decode(text, validate=True)
    if base64_of(data) != text:
        raise ValueError("base64 is not in its canonical form")
    return data


def float_of(content: Json) -> float:
    digits = text_of(content)
    if not re.fullmatch("[0-9a-f]{16}", digits):
        raise ValueError("$float is not 16 hexadecimal digits")
    value: float = struct.unpack(">d", bytes.fromhex(digits))[0]
    if math.isfinite(value):
        raise ValueError("$float is finite")
    return value
