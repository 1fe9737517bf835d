"""The rule that says when a snapshot is due."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pysnap.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_FORMS = "`500`, `200 steps`, `30s`, `10m`, `2h`, `1 epoch`, `off`, or several joined by `,`"


@dataclass(frozen=True)
class Cadence:
    """Due every `steps` steps, `seconds` seconds or `epochs` epochs, whichever comes first;
    None: not by that measure."""

    steps: int | None = None
    seconds: float | None = None
    epochs: int | None = None

    @classmethod
    def parse(cls, rule: str | int | None, where: str) -> Cadence:
        """The cadence of a rule such as `"200 steps, 10m"`; None and `"off"` are never due.
        ConfigError names `where`."""
        if rule is None:
            return cls()
        found: dict[str, int] = {}
        for part in str(rule).split(","):
            measure, amount = _parse(part.strip().lower(), rule, where)
            if measure in found:
                raise ConfigError(f"{where} is {rule!r}: it names {measure} twice")
            found[measure] = amount
        if "off" in found:
            if len(found) > 1:
                raise ConfigError(f"{where} is {rule!r}: `off` stands alone")
            return cls()
        return cls(found.get("steps"), found.get("seconds"), found.get("epochs"))

    def __str__(self) -> str:
        parts = [
            f"{amount:g} {measure}"
            for measure, amount in (
                ("steps", self.steps),
                ("seconds", self.seconds),
                ("epochs", self.epochs),
            )
            if amount is not None
        ]
        return "every " + " or ".join(parts) if parts else "off"

    def due_after_step(self, step: int, seconds_since_last: float) -> bool:
        """Whether a snapshot is due when `step` steps are done."""
        by_steps = self.steps is not None and step % self.steps == 0
        by_time = self.seconds is not None and seconds_since_last >= self.seconds
        return by_steps or by_time

    def due_after_epoch(self, epochs: int) -> bool:
        """Whether a snapshot is due when `epochs` epochs are done."""
        return self.epochs is not None and epochs % self.epochs == 0


def _parse(part: str, rule: str | int, where: str) -> tuple[str, int]:
    if part == "off":
        return "off", 0
    match = re.fullmatch(r"(\d+)\s*(steps?|s|m|h|epochs?|)", part)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"{where} is {rule!r}; it must be {_FORMS}")
    amount, unit = int(match[1]), match[2]
    if unit in _SECONDS:
        return "seconds", amount * _SECONDS[unit]
    return ("epochs" if unit.startswith("epoch") else "steps"), amount
