"""Every command in every situation that a script may meet: a documented exit status, a sentence
where it fails, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import Commands, make_repository, newest_of_step
from support import flip

import pysnap
from pysnap import _engine
from pysnap.cli import COMMANDS, main
from pysnap.manifest import _MIDDLE, _PREFIX, _SUFFIX

# `{root}` is the repository, `{out}` a folder for what is written.
WORDS = {
    "ls": ["{root}"],
    "show": ["{root}"],
    "verify": ["{root}"],
    "diff": ["{root}", "{root}"],
    "tag": ["{root}", "good"],
    "pin": ["{root}"],
    "note": ["{root}", "text"],
    "prune": ["{root}", "--last=2"],
    "export": ["{root}", "{out}/w.safetensors"],
    "doctor": ["{root}"],
    "watch": ["{root}", "--once"],
    "report": ["{root}", "{out}/r.html"],
}


def intact(root: Path) -> None:
    make_repository(root)


def not_there(root: Path) -> None:
    del root


def of_something_else(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("mine")


def without_snapshots(root: Path) -> None:
    pysnap.Snapshotter(root, x=torch.zeros(1)).close()


def of_a_newer_format(root: Path) -> None:
    make_repository(root)
    header = json.loads((root / ".pysnap").read_bytes())
    (root / ".pysnap").write_text(json.dumps(header | {"format": 99}))


def with_a_damaged_header(root: Path) -> None:
    make_repository(root)
    (root / ".pysnap").write_bytes(b"\xff" * 10)


def with_a_newer_snapshot(root: Path) -> None:
    make_repository(root)
    manifest = newest_of_step(root, 3) / "manifest.json"
    data = manifest.read_bytes()
    start = data.index(_MIDDLE)
    body = data[start + len(_MIDDLE) : -len(_SUFFIX)].replace(b'"format":1', b'"format":9')
    manifest.write_bytes(_PREFIX + _engine.digest(body).encode() + _MIDDLE + body + _SUFFIX)


def with_a_damaged_manifest(root: Path) -> None:
    make_repository(root)
    flip(newest_of_step(root, 3) / "manifest.json", 100)


def with_damaged_manifests_alone(root: Path) -> None:
    make_repository(root)
    for step in (3, 2, 1):
        for path in root.glob(f"step-{step:09d}*"):
            if not path.is_symlink():
                (path / "manifest.json").write_bytes(b"{")


def with_a_damaged_pack(root: Path) -> None:
    make_repository(root)
    flip(newest_of_step(root, 3) / "0.pack", 0)


def with_odd_events(root: Path) -> None:
    make_repository(root)
    (root / "events.jsonl").write_bytes(
        b'{"event": "snapshot", "time": "x", "step": []}\n[]\n\xff\n{"event": "run", "time": 1}\n'
        b'{"event": "failed", "time": 1e400, "step": 1}\n{"event": "metrics", "time": 1, "step": 3'
    )


SITUATIONS: dict[Callable[[Path], None], tuple[int, dict[str, int]]] = {
    intact: (0, {}),
    not_there: (3, {}),
    of_something_else: (3, {"doctor": 0}),
    without_snapshots: (
        3,
        {"ls": 0, "verify": 0, "prune": 0, "doctor": 0, "watch": 0, "report": 0},
    ),
    of_a_newer_format: (1, {"doctor": 0}),
    with_a_damaged_header: (1, {"doctor": 0}),
    with_a_newer_snapshot: (1, {"prune": 0, "doctor": 0, "watch": 0, "report": 0}),
    with_a_damaged_manifest: (0, {"ls": 1, "verify": 1}),
    with_damaged_manifests_alone: (1, {"prune": 0, "doctor": 0, "watch": 0, "report": 0}),
    with_a_damaged_pack: (0, {"verify": 1, "diff": 1, "export": 1}),
    with_odd_events: (0, {}),
}


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(autouse=True)
def no_long_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysnap.cli.doctor._MEASURED", 1 << 20)


def words(command: str, folder: Path) -> list[str]:
    return [
        command,
        *(word.format(root=folder / "runs", out=folder / "out") for word in WORDS[command]),
    ]


def test_every_command_is_here() -> None:
    assert set(WORDS) == set(COMMANDS) - {"demo"}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("command", WORDS)
def test_status_and_sentence(
    tmp_path: Path, commands: Commands, command: str, situation: Callable[[Path], None]
) -> None:
    situation(tmp_path / "runs")
    (tmp_path / "out").mkdir()
    usual, others = SITUATIONS[situation]
    status = others.get(command, usual)
    text = commands.text(*words(command, tmp_path), status=status)
    assert "Traceback" not in text + commands.errors
    # Plain, and made for a script: no colours, no cursor.
    assert "\x1b" not in text + commands.errors
    if status == 0:
        assert text
    else:
        assert text or commands.errors.startswith("pysnap: ")
    if status in (1, 3):
        assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("command", WORDS)
def test_beside_a_running_writer(tmp_path: Path, commands: Commands, command: str) -> None:
    make_repository(tmp_path / "runs")
    (tmp_path / "out").mkdir()
    with pysnap.Snapshotter(tmp_path / "runs", x=torch.zeros(5)) as snapshotter:
        snapshotter.save().wait()
        commands.text(*words(command, tmp_path), status=4 if command == "prune" else 0)
        assert (tmp_path / "runs" / "step-000000003").exists()
    if command == "prune":
        assert "in use by another writer" in commands.errors


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_reader_that_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, as_json: bool
) -> None:
    make_repository(tmp_path / "runs")
    (tmp_path / "out").mkdir()
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([*words(command, tmp_path), *["--json"][: int(as_json)]]) == 141


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command, which ends with 0, sends to a terminal."""
    pytest.importorskip("rich", reason="colours are its own")
    parent, child = os.openpty()
    os.set_blocking(parent, False)
    with monkeypatch.context() as patch, open(child, "w") as file:
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "stdout", file)
        patch.setattr(sys, "stderr", file)
        assert main(list(words)) == 0
        file.flush()
        text = os.read(parent, 1 << 20).decode()
    os.close(parent)
    return text


COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")


@pytest.mark.parametrize("command", WORDS)
def test_no_colour_where_none_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    make_repository(tmp_path / "runs")
    (tmp_path / "out").mkdir()
    text = on_a_terminal(monkeypatch, *words(command, tmp_path))
    assert text and not COLOUR.search(text)


def test_a_terminal_gets_colours_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    make_repository(tmp_path / "runs")
    assert COLOUR.search(on_a_terminal(monkeypatch, "verify", str(tmp_path / "runs")))


def test_a_newest_that_is_passed_over_is_told(
    tmp_path: Path, commands: Commands, caplog: pytest.LogCaptureFixture
) -> None:
    with_a_damaged_manifest(tmp_path / "runs")
    damaged = [path.name for path in (tmp_path / "runs").glob("step-000000003*")]
    text = commands.text("show", tmp_path / "runs")
    assert "skipping a damaged snapshot" in caplog.text
    assert any(name in caplog.text for name in damaged) and text
