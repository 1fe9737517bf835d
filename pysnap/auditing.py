"""Is a program deterministic? Its steps, run twice from one snapshot, must leave the same bits."""

from __future__ import annotations

import reprlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch

from pysnap import _engine, rng, tree
from pysnap.errors import ConfigError
from pysnap.files import save
from pysnap.layout import Leaf
from pysnap.loader import ResumableLoader, StatefulLoaderPart
from pysnap.match import Terms, load_parts
from pysnap.parts import Stateful, as_part
from pysnap.repository import Snapshot
from pysnap.restore import describe

Kind: TypeAlias = Literal["random state", "loader position", "value", "tensor"]

_OUTSIDE = (
    "Random states and loader positions agree, so a step reads what no snapshot holds. Look for",
    "an object that is not registered: an optimizer, a loader, a counter, a non-persistent buffer",
    "a random generator of your own that is not registered",
    "gradients, or a mode such as eval(), that a step leaves behind",
    "the clock, the operating system, or another thread",
    "a kernel that is not deterministic: torch.use_deterministic_algorithms(True) names it",
)
# A kind explains those behind it: draws decide batches, and both decide values and tensors.
_HINTS: dict[Kind, tuple[str, ...]] = {
    "random state": (
        "Something drew a different number of times. Look for",
        "an iterator over a loader that began before the step, or a loader that is not registered",
        "draws whose number hangs on an object or a generator that is not registered",
        "another thread that draws",
    ),
    "loader position": (
        "The loader stands elsewhere, or has another order. Look for",
        "a number of batches that hangs on an object that is not registered",
        "a sampler with state of its own, or with a generator that is not an attribute of it",
    ),
    "value": _OUTSIDE,
    "tensor": _OUTSIDE,
}
_NOT_PUT_BACK = (
    "load_state_dict() of this part does not put back all that state_dict() returned: correct it",
)


@dataclass(frozen=True)
class Difference:
    """One place in the state whose content was not the same in both runs.

    `path` is the name that it has in a snapshot; `what` says what was there in either run.
    """

    path: str
    kind: Kind
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.path}: {self.what}"


@dataclass(frozen=True)
class Audit:
    """What `audit` found; as text, a verdict with what to do.

    `steps` is the number of steps that were compared. `differences` are those after the last of
    them, the most telling first; with 0 steps, those after the snapshot was put back.
    """

    steps: int
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """Whether both runs left the same bits."""
        return not self.differences

    def __str__(self) -> str:
        if self.same:
            return (
                "deterministic: two runs from one snapshot left the same bits in every tensor, "
                f"value, random state and loader position (steps: {self.steps})"
            )
        first, *others = self.differences
        counts = Counter(difference.kind for difference in others)
        more = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
        where = f"after step {self.steps}" if self.steps else "before the first step"
        hint, *causes = _HINTS[first.kind] if self.steps else _NOT_PUT_BACK
        return "\n".join(
            [
                f"not deterministic: two runs from one snapshot differ {where}, first in",
                f"  {first}",
                *([f"  and {len(others)} more ({more})"] if others else []),
                hint,
                *(f"  - {cause}" for cause in causes),
            ]
        )


def audit(step: Callable[[], object], /, *, steps: int = 3, **parts: object) -> Audit:
    """Whether `step`, run twice from one snapshot of `parts`, leaves the same bits both times.

    `parts` are those of a Snapshotter. `step()` trains one step: without `snapshotter.step()`, and
    with iterators over loaders that it makes itself. It is called up to `steps` times in each run,
    and the first call after which a tensor, value, random state or loader position differs ends the
    audit. So what differs was caused by state that no snapshot holds.

    Call it before the loops over epochs and loaders. Afterwards, also when `step` raises, parts and
    random states are what they were before. The snapshot lies in the directory for temporary files
    (`TMPDIR`) meanwhile. Raises ConfigError for arguments that cannot be, StateError for a part
    that cannot be stored, StorageError where the disk refuses, and whatever `step` raises.
    """
    if not callable(step):
        raise ConfigError(
            f"step is a {type(step).__qualname__}; it must be a function that trains one step"
        )
    if type(steps) is not int or steps < 1:
        raise ConfigError(f"steps is {steps!r}; it must be a whole number, at least 1")
    if not parts:
        raise ConfigError(
            "an audit without parts compares nothing; pass them by keyword, as to a Snapshotter"
        )
    # Adapted once, for what stands for a loader keeps a part of its position.
    adapted = {name: as_part(name, value) for name, value in parts.items()}
    with tempfile.TemporaryDirectory(prefix="pysnap-audit-") as directory:
        # As a Snapshotter takes it; but PYSNAP_EVERY and PYSNAP_RESUME, which rule a Snapshotter,
        # are meant for the run. Last the random states, for a state_dict may draw.
        state = {name: part.state_dict() for name, part in adapted.items()}
        state |= {"progress": None, "rng": rng.capture()}
        snapshot = Snapshot.open(save(Path(directory) / "snapshot", state))

        def advance(index: int) -> _State:
            """The state after step `index`; 0 is what the snapshot puts back."""
            if index == 0:
                _resume(snapshot, adapted)
            else:
                step()
            return _note(adapted)

        try:
            first = [advance(index) for index in range(steps + 1)]
            for index, before in enumerate(first):
                differences = _compare(before, advance(index))
                if differences:
                    return Audit(index, differences)
            return Audit(steps, ())
        finally:
            _resume(snapshot, adapted)


def _resume(snapshot: Snapshot, parts: dict[str, Stateful]) -> None:
    rest = load_parts(snapshot, parts, Terms())
    # Last: whatever is loaded before may draw.
    rng.restore(rest["rng"])


@dataclass(frozen=True)
class _Content:
    """What one place in the state held; the live object will have changed by the next step."""

    kind: Kind
    shown: str
    bits: str  # what is compared


_State: TypeAlias = "dict[str, _Content]"


def _note(parts: dict[str, Stateful]) -> _State:
    state: _State = {}
    for name, part in parts.items():
        state.update(_note_part(name, part))
    # Last, as in a snapshot: a state_dict may draw.
    for name, value in rng.capture().items():
        state[f"rng/{name}"] = _Content("random state", "a global generator", repr(value))
    return state


def _note_part(name: str, part: Stateful) -> _State:
    is_loader = isinstance(part, (ResumableLoader, StatefulLoaderPart))
    found: _State = {}

    def put(path: str, leaf: Leaf) -> int:
        found[path] = _Content(
            "loader position" if is_loader else "tensor", describe(leaf), _digest(leaf)
        )
        return len(found) - 1

    state = {name: part.state_dict()}
    # Refuses what a snapshot would refuse, so that only plain values are left to note.
    tree.encode(state, put)
    for path, value in _plain_values(state):
        # The keys 0 and "0" read the same.
        while path in found:
            path += "#2"
        if isinstance(value, torch.Generator):
            bits = _digest(value.get_state())
            found[path] = _Content("random state", "a torch.Generator", bits)
        else:
            kind: Kind = "loader position" if is_loader else "value"
            found[path] = _Content(kind, reprlib.repr(value), repr(value))
    return found


def _plain_values(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Path and value of all that is neither a tensor or array nor a container that holds
    something."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    if not items:
        yield path, value
    for key, item in items:
        yield from _plain_values(item, tree.join(path, key))


def _digest(leaf: Leaf) -> str:
    """Digest of the bytes in row-major order."""
    if isinstance(leaf, torch.Tensor):
        tensor = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
        leaf = tensor.reshape(-1).view(torch.uint8).numpy()
    return _engine.digest(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def _compare(first: _State, second: _State) -> tuple[Difference, ...]:
    differences = []
    for path in dict.fromkeys([*first, *second]):
        before, after = first.get(path), second.get(path)
        if before == after:
            continue
        here, there = (content.shown if content else "missing" for content in (before, after))
        what = f"{here} in the first run, {there} in the second"
        if here == there:
            what = f"{here}, other bits"
        kind = (before or second[path]).kind
        differences.append(Difference(path, kind, what))
    order = list(_HINTS)
    return tuple(sorted(differences, key=lambda difference: order.index(difference.kind)))
