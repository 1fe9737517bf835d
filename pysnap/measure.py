"""Amounts of training, as rules name them (`200 steps`, `10m`, `1 epoch`), and how durations and
sizes are shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

FORMS = "`500`, `200 steps`, `30s`, `10m`, `2h`, `7d`, `1 epoch`"

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AMOUNT = re.compile(r"(\d{1,18})\s*(steps?|epochs?|[smhd]|)", re.ASCII)
_TIME = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([smhd]?)", re.ASCII)


@dataclass(frozen=True)
class Amount:
    """A positive number of steps, seconds or epochs."""

    measure: Literal["steps", "seconds", "epochs"]
    value: int

    @classmethod
    def parse(cls, text: str | int) -> Amount:
        """The amount that `text` names; a bare number means steps. Raises ValueError."""
        match = _AMOUNT.fullmatch(str(text).strip().lower())
        if match is None or int(match[1]) == 0:
            raise ValueError(f"expected an amount such as {FORMS}")
        number, unit = int(match[1]), match[2]
        if unit in _SECONDS:
            return cls("seconds", number * _SECONDS[unit])
        return cls("epochs" if unit.startswith("epoch") else "steps", number)

    def __str__(self) -> str:
        if self.measure == "seconds":
            return shown_seconds(self.value)
        return f"{self.value} {self.measure if self.value != 1 else self.measure[:-1]}"


def parse_seconds(text: str) -> float:
    """Seconds of a time such as `6h`, `1.5m` or `30`. Raises ValueError."""
    match = _TIME.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError("expected a time such as 30s, 10m, 6h or 2d")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def shown_seconds(seconds: float) -> str:
    """A duration for people, to two digits or in the largest unit that divides it: `0.31s`,
    `47s`, `90m`, `6h`."""
    if seconds < 10:
        return f"{seconds:.2g}s"
    whole = round(seconds)
    for unit in ("d", "h", "m"):
        if whole % _SECONDS[unit] == 0:
            return f"{whole // _SECONDS[unit]}{unit}"
    for unit in ("d", "h", "m"):
        if whole >= 3 * _SECONDS[unit]:
            return f"{whole / _SECONDS[unit]:.1f}{unit}"
    return f"{whole}s"


def shown_size(size: float) -> str:
    """Bytes for people: `312 B`, `4.7 MB`, `1.49 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.3g} {unit}"
