"""The rule that says when a snapshot is due."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pysnap.errors import ConfigError
from pysnap.measure import FORMS, Amount, shown_seconds

_FORMS = f"{FORMS}, `1%`, `auto`, `off`, or several joined by `,`"
_SHARE = re.compile(r"(\d{1,2}(?:\.\d{1,6})?)\s*%", re.ASCII)


@dataclass(frozen=True)
class Cadence:
    """Due every `steps` steps, `seconds` seconds or `epochs` epochs, as often as the share `share`
    of training time pays for, or, `auto`, as loses least work; whichever comes first. None: not by
    that measure."""

    steps: int | None = None
    seconds: float | None = None
    epochs: int | None = None
    share: float | None = None
    auto: bool = False

    @classmethod
    def parse(cls, rule: str | int | None, where: str) -> Cadence:
        """The cadence of a rule such as `"200 steps, 10m"`; None and `"off"` are never due.
        ConfigError names `where`."""
        if rule is None:
            return cls()
        found: dict[str, float] = {}
        for part in str(rule).split(","):
            measure, amount = _parse(part.strip().lower(), rule, where)
            if measure in found:
                raise ConfigError(f"{where} is {rule!r}: it names {measure} twice")
            found[measure] = amount
        if "off" in found:
            if len(found) > 1:
                raise ConfigError(f"{where} is {rule!r}: `off` stands alone")
            return cls()
        steps, epochs = found.get("steps"), found.get("epochs")
        return cls(
            None if steps is None else int(steps),
            found.get("seconds"),
            None if epochs is None else int(epochs),
            found.get("share"),
            "auto" in found,
        )

    def __str__(self) -> str:
        amounts = [
            str(Amount("steps", self.steps)) if self.steps else "",
            shown_seconds(self.seconds) if self.seconds else "",
            str(Amount("epochs", self.epochs)) if self.epochs else "",
        ]
        rules = [f"every {amount}" for amount in amounts if amount]
        if self.share is not None:
            rules.append(f"as often as {self.share * 100:g}% of training time pays for")
        if self.auto:
            rules.append("as often as loses least work")
        return " or ".join(rules) or "off"

    @property
    def measured(self) -> bool:
        """Whether it depends on what snapshots cost."""
        return self.share is not None or self.auto

    def due_after_step(self, step: int, seconds_since_last: float) -> bool:
        """Whether a snapshot is due by number or time when `step` steps are done."""
        by_steps = self.steps is not None and step % self.steps == 0
        by_time = self.seconds is not None and seconds_since_last >= self.seconds
        return by_steps or by_time

    def due_after_epoch(self, epochs: int) -> bool:
        """Whether a snapshot is due when `epochs` epochs are done."""
        return self.epochs is not None and epochs % self.epochs == 0


def _parse(part: str, rule: str | int, where: str) -> tuple[str, float]:
    if part in ("off", "auto"):
        return part, 0
    share = _SHARE.fullmatch(part)
    if share is not None and float(share[1]) > 0:
        return "share", float(share[1]) / 100
    try:
        amount = Amount.parse(part)
    except ValueError:
        raise ConfigError(f"{where} is {rule!r}; it must be {_FORMS}") from None
    return amount.measure, amount.value
