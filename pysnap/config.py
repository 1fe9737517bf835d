"""Settings: default < environment variable < explicit argument.

`PYSNAP_EVERY` and `PYSNAP_RESUME` are the exceptions: they win over the argument, so that the
cadence and the beginning of a program can be changed from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pysnap.errors import ConfigError
from pysnap.measure import parse_seconds

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
# Signals that ask a process to end, or that nobody else gives a meaning.
_CATCHABLE = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGQUIT", "SIGXCPU")
_PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
_PAGE = 4096
_MOST_THREADS = 1024
_LARGEST_CHUNK = 64 * 2**20


def parse_size(text: str) -> int:
    """Bytes of `"256MiB"`, `"1.5 GB"` or `"4096"`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("expected a size such as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_count(text: str) -> int:
    """A whole number that is not negative."""
    if not re.fullmatch(r"\d+", text.strip()):
        raise ValueError("expected a whole number")
    return int(text)


def parse_switch(text: str) -> bool:
    """`1`/`0`, `on`/`off`, `yes`/`no` or `true`/`false`."""
    words = {
        "1": True,
        "on": True,
        "yes": True,
        "true": True,
        "0": False,
        "off": False,
        "no": False,
        "false": False,
    }
    if text.strip().lower() not in words:
        raise ValueError("expected on or off")
    return words[text.strip().lower()]


def parse_signals(text: str) -> tuple[signal.Signals, ...]:
    """The signals of `"SIGTERM,SIGUSR1"`; none of `"off"`, the default ones of `"on"`."""
    with contextlib.suppress(ValueError):
        return _PREEMPTION if parse_switch(text) else ()
    names = [part.strip().upper() for part in text.split(",")]
    for name in names:
        if name not in _CATCHABLE:
            raise ValueError(f"expected off, or some of {', '.join(_CATCHABLE)} joined by `,`")
    return tuple(signal.Signals[name] for name in dict.fromkeys(names))


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.strip() not in words:
            raise ValueError(f"expected {' or '.join(words)}")
        return text.strip()

    return parse


@dataclass(frozen=True)
class Setting:
    """One setting: its name as an argument, its environment variable, how text becomes a value,
    what it means."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    shown_default: str
    meaning: str
    environment_wins: bool = False

    @property
    def variable(self) -> str:
        return f"PYSNAP_{self.name.upper()}"


SETTINGS = (
    Setting(
        "every",
        str,
        None,
        "off",
        "when a snapshot is due: `500`, `200 steps`, `30s`, `10m`, `2h`, `1 epoch`, `off`; `1%`: "
        "as often as this share of training time pays for; `auto`: as often as loses least work; "
        "several joined by `,` mean whichever comes first; wins over the argument",
        environment_wins=True,
    ),
    Setting(
        "mtbf",
        parse_seconds,
        6 * 3600,
        "6h",
        "mean time between failures of the run, such as `45m`, `6h`, `7d`; only `auto` asks for it",
    ),
    Setting(
        "resume",
        str,
        None,
        "newest",
        "which snapshot `resume()` puts back: `newest`, `best`, `step=N`, `tag=NAME`, a path, or "
        "`off` for a fresh start; wins over the argument",
        environment_wins=True,
    ),
    Setting(
        "overlap",
        parse_switch,
        True,
        "on",
        "whether what the registered optimizers alone change is copied while the next step runs, "
        "up to the optimizer's own; else the step waits for the whole copy",
    ),
    Setting(
        "host_memory",
        parse_size,
        None,
        "a quarter of the free memory",
        "bound of the staging memory, such as `2GiB`; no more is used than the state needs, and a "
        "step waits for the disk where the state is larger",
    ),
    Setting(
        "codec",
        _one_of("auto", "none", "fast", "small"),
        "auto",
        "auto",
        "which chunks are encoded: `auto` (where the disk is much slower than the encoder), "
        "`fast` (all), `small` (all, for the smallest files, at a fraction of the speed), `none`",
    ),
    Setting(
        "chunk_size",
        parse_size,
        4 * 2**20,
        "4MiB",
        "piece in which the state is staged, encoded, written; a multiple of 4KiB up to 64MiB",
    ),
    Setting(
        "workers",
        parse_count,
        0,
        "half of the cores, 3 to 8",
        "background threads that encode and write",
    ),
    Setting(
        "copy_threads",
        parse_count,
        0,
        "the cores, at most 8",
        "threads that copy host tensors while the step waits",
    ),
    Setting(
        "nice",
        parse_count,
        10,
        "10",
        "priority of the workers, 0 (like training) to 19 (only what training leaves)",
    ),
    Setting(
        "direct_io",
        parse_switch,
        True,
        "on",
        "write past the page cache where the file system can",
    ),
    Setting(
        "on_error",
        _one_of("warn", "raise"),
        "warn",
        "warn",
        "what a failed snapshot does: `warn` logs it, `raise` raises it at the next step",
    ),
    Setting(
        "preemption",
        parse_signals,
        _PREEMPTION,
        "SIGTERM,SIGUSR1",
        "signals at which the run takes a snapshot at the end of its step and ends; `off` for none",
    ),
    Setting(
        "grace",
        parse_seconds,
        30.0,
        "30s",
        "how long after such a signal the process may live, such as `30s`, `2m`, `1h`",
    ),
    Setting(
        "trace",
        str,
        None,
        "off",
        "file for a timeline of every thread of pysnap, for https://ui.perfetto.dev",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Resolved settings; `Config.resolve` makes one. Sizes are bytes; 0 workers or threads and
    None mean automatic."""

    every: str | None
    mtbf: float
    resume: str | None
    overlap: bool
    host_memory: int | None
    codec: Literal["auto", "none", "fast", "small"]
    chunk_size: int
    workers: int
    copy_threads: int
    nice: int
    direct_io: bool
    on_error: Literal["warn", "raise"]
    preemption: tuple[signal.Signals, ...]
    grace: float
    trace: str | None
    sources: Mapping[str, str]
    """Where each value came from: `default`, `argument`, or the name of an environment variable."""

    @classmethod
    def resolve(cls, environment: Mapping[str, str] | None = None, **arguments: object) -> Config:
        """Settle every setting. An argument that is None counts as not given; text is parsed as in
        the environment.

        Raises ConfigError for an unknown argument or a value that does not parse, naming the
        argument or variable.
        """
        environment = os.environ if environment is None else environment
        unknown = sorted(set(arguments) - {setting.name for setting in SETTINGS})
        if unknown:
            known = ", ".join(setting.name for setting in SETTINGS)
            raise ConfigError(f"unknown setting {unknown[0]!r}; the settings are {known}")
        known_variables = {setting.variable for setting in SETTINGS}
        for variable in environment:
            if variable.startswith("PYSNAP_") and variable not in known_variables:
                known = ", ".join(sorted(known_variables))
                raise ConfigError(
                    f"unknown environment variable {variable}; the known ones are {known}"
                )
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for setting in SETTINGS:
            argument = arguments.get(setting.name)
            text = environment.get(setting.variable)
            if text is not None and (argument is None or setting.environment_wins):
                values[setting.name], sources[setting.name] = (
                    _parse(setting, text, setting.variable),
                    setting.variable,
                )
            elif argument is not None:
                value = (
                    _parse(setting, argument, setting.name)
                    if isinstance(argument, str)
                    else argument
                )
                values[setting.name], sources[setting.name] = value, "argument"
            else:
                values[setting.name], sources[setting.name] = setting.default, "default"
        config = cls(**values, sources=sources)
        config._check()
        return config

    def _check(self) -> None:
        def refuse(name: str, rule: str) -> None:
            source = self.sources[name]
            where = name if source in ("argument", "default") else source
            raise ConfigError(f"{where} is {getattr(self, name)!r}; it must be {rule}")

        for name in ("chunk_size", "workers", "copy_threads", "nice"):
            if (
                isinstance(getattr(self, name), bool)
                or not isinstance(getattr(self, name), int)
                or getattr(self, name) < 0
            ):
                refuse(name, "a whole number that is not negative")
        if self.chunk_size == 0 or self.chunk_size % _PAGE or self.chunk_size > _LARGEST_CHUNK:
            refuse("chunk_size", "a multiple of 4KiB, at most 64MiB")
        for name in ("workers", "copy_threads"):
            if getattr(self, name) > _MOST_THREADS:
                refuse(name, f"at most {_MOST_THREADS}")
        if self.nice > 19:
            refuse("nice", "between 0 and 19")
        if self.host_memory is not None and (
            isinstance(self.host_memory, bool)
            or not isinstance(self.host_memory, int)
            or self.host_memory < 2 * self.chunk_size
        ):
            refuse("host_memory", f"a number of bytes, at least two chunks ({2 * self.chunk_size})")
        if self.codec not in ("auto", "none", "fast", "small"):
            refuse("codec", "auto, none, fast or small")
        if self.on_error not in ("warn", "raise"):
            refuse("on_error", "warn or raise")
        for name in ("grace", "mtbf"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (
                isinstance(value, (int, float)) and 0 < value < float("inf")
            ):
                refuse(name, "a time of more than 0 seconds")
        if not isinstance(self.preemption, tuple):
            refuse("preemption", "`off`, or names of signals joined by `,`")
        for name in ("overlap", "direct_io"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "True or False")


def _parse(setting: Setting, text: str, where: str) -> Any:
    try:
        return setting.parse(text)
    except ValueError as error:
        raise ConfigError(f"{where} is {text!r}: {error}") from None
