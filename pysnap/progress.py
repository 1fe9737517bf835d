"""Where training stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where training stands, over all processes of the run."""

    step: int = 0
    """Steps done in all."""
    epoch: int = 0
    """The epoch that it is in."""
    batch: int = 0
    """Steps done in this epoch."""
    samples: int = 0
    """As far as `step(samples=...)` told them."""
    seconds: float = 0.0
    """Wall time from the start of each process to its last finished step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The value of each metric that was reported last."""
    best: float | None = None
    """The best value so far of the metric that `best` names."""
    best_rule: str = ""
    """What `best` said then."""

    def state(self) -> dict[str, Any]:
        """A copy as plain values."""
        return asdict(self)

    def load(self, state: object) -> None:
        """Take over what `state()` returned, in this version or another: entries that are not
        known are left out. Raises ValueError, with nothing changed, for anything else."""
        if not isinstance(state, dict):
            raise ValueError("it is no dict")
        fresh = Progress()
        for name, value in state.items():
            if name in vars(fresh):
                setattr(fresh, name, _checked(name, value))
        vars(self).update(vars(fresh))


def _checked(name: str, value: Any) -> Any:
    if name == "metrics":
        if type(value) is not dict or not all(
            type(key) is str and type(item) is float for key, item in value.items()
        ):
            raise ValueError(f"its metrics are {value!r:.80}")
    elif name == "best":
        if value is not None and type(value) is not float:
            raise ValueError(f"its best is {value!r:.80}")
    elif name == "best_rule":
        if type(value) is not str:
            raise ValueError(f"its best_rule is {value!r:.80}")
    elif type(value) is not (float if name == "seconds" else int) or not value >= 0:
        raise ValueError(f"its {name} is {value!r:.80}")
    return value
