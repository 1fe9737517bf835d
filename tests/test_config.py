"""Settings: their order, their parsing, and the README's table of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pysnap.cadence import Cadence
from pysnap.config import SETTINGS, Config, parse_size
from pysnap.errors import ConfigError
from pysnap.measure import shown_size


def test_default_environment_argument() -> None:
    assert Config.resolve({}).nice == 10
    assert Config.resolve({"PYSNAP_NICE": "5"}).nice == 5
    assert Config.resolve({"PYSNAP_NICE": "5"}, nice=7).nice == 7


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("1", "every 1 step"),
        ("200, 90m", "every 200 steps or every 90m"),
        ("1 epoch, 1%", "every 1 epoch or as often as 1% of training time pays for"),
        ("auto", "as often as loses least work"),
        ("off", "off"),
    ],
)
def test_cadences_as_text(rule: str, text: str) -> None:
    assert str(Cadence.parse(rule, "every")) == text


def test_the_time_between_failures() -> None:
    assert Config.resolve({}).mtbf == 21600
    assert Config.resolve({"PYSNAP_MTBF": "45m"}).mtbf == 2700
    # Without a unit it is seconds, as the grace.
    assert Config.resolve({"PYSNAP_MTBF": "90", "PYSNAP_GRACE": "1.5"}).mtbf == 90


@pytest.mark.parametrize("text", ["6 hours", "0h", "5 steps", "often"])
def test_times_between_failures_that_do_not_parse(text: str) -> None:
    with pytest.raises(ConfigError, match=r"PYSNAP_MTBF.*(such as 30s|more than 0 seconds)"):
        Config.resolve({"PYSNAP_MTBF": text})


def test_the_cadence_of_the_environment_wins() -> None:
    config = Config.resolve({"PYSNAP_EVERY": "10m"}, every="200")
    assert config.every == "10m" and config.sources["every"] == "PYSNAP_EVERY"


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("2KiB", 2048), ("1.5 GB", 1_500_000_000), ("1tib", 2**40), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.5, "1 kB"),
        (9_994, "9.99 kB"),
        (99_940, "99.9 kB"),
        (12_340_000, "12.3 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1 GB"),
        (1_234e12, "1234 TB"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert shown_size(size) == text


@pytest.mark.parametrize("text", ["", "-1", "5 apples", "1e9", "0x10", "GiB"])
def test_sizes_that_do_not_parse(text: str) -> None:
    with pytest.raises(ConfigError, match="PYSNAP_HOST_MEMORY"):
        Config.resolve({"PYSNAP_HOST_MEMORY": text})


@pytest.mark.parametrize(
    ("rule", "cadence"),
    [
        ("500", Cadence(steps=500)),
        (200, Cadence(steps=200)),
        ("1 step", Cadence(steps=1)),
        ("30s", Cadence(seconds=30)),
        ("10m", Cadence(seconds=600)),
        ("2h", Cadence(seconds=7200)),
        ("2 epochs", Cadence(epochs=2)),
        ("100 steps, 5m", Cadence(steps=100, seconds=300)),
        ("off", Cadence()),
        ("7d", Cadence(seconds=604_800)),
        ("1%", Cadence(share=0.01)),
        ("0.5 %, 1h", Cadence(share=0.005, seconds=3600)),
        ("Auto", Cadence(auto=True)),
        ("auto, 1000 steps", Cadence(auto=True, steps=1000)),
        (None, Cadence()),
    ],
)
def test_cadences(rule: str | int | None, cadence: Cadence) -> None:
    assert Cadence.parse(rule, "every") == cadence


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "0",
        "-5",
        "10 minutes",
        "1.5h",
        "off, 5m",
        "5,6",
        "5 steps 6",
        "sometimes",
        "0%",
        "100%",
        "-1%",
        "%",
        "1%, 2%",
        "auto, auto",
        "auto, off",
        "nan%",
    ],
)
def test_cadences_that_do_not_parse(rule: str) -> None:
    with pytest.raises(ConfigError, match="PYSNAP_EVERY"):
        Cadence.parse(rule, "PYSNAP_EVERY")


@pytest.mark.parametrize(
    ("rule", "step", "seconds", "due"),
    [
        ("200", 200, 0.0, True),
        ("200", 201, 1e9, False),
        ("30s", 1, 29.9, False),
        ("30s", 1, 30.0, True),
        ("200, 30s", 7, 31.0, True),
        ("200, 30s", 400, 0.0, True),
        ("200, 30s", 7, 0.0, False),
        ("1 epoch", 200, 1e9, False),
        ("off", 200, 1e9, False),
    ],
)
def test_when_a_step_is_due(rule: str, step: int, seconds: float, due: bool) -> None:
    assert Cadence.parse(rule, "every").due_after_step(step, seconds) is due


def test_when_an_epoch_is_due() -> None:
    assert [Cadence.parse("2 epochs", "every").due_after_epoch(n) for n in (1, 2, 3, 4)] == [
        False,
        True,
        False,
        True,
    ]
    assert not Cadence.parse("2 steps", "every").due_after_epoch(2)


def test_the_table_in_the_readme_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    rows = re.findall(r"^\| `(PYSNAP_\w+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert rows == [
        (setting.variable, setting.shown_default, setting.meaning) for setting in SETTINGS
    ]
