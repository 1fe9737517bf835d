"""The command line as a program: what it loads, exit statuses, pipes, words that name snapshots."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import Commands, newest_of_step, process
from support import flip

from pysnap import notes
from pysnap.cli import COMMANDS, exits
from pysnap.errors import BusyError, ConfigError, CorruptError, Error, NotFoundError, StorageError


def test_ls_loads_neither_torch_nor_rich(repository: Path) -> None:
    code = (
        "import atexit\n"
        "heavy = 'torch', 'rich', 'matplotlib', 'zstandard', 'pysnap.verify', 'pysnap.tree'\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))"
    )
    assert process("ls", repository, code=code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["ls", "show", "verify", "tag", "prune", "watch", "doctor"])
def test_commands_work_without_torch_and_rich(repository: Path, command: str) -> None:
    words = {"tag": ["good"], "prune": ["--last=1"], "watch": ["--once"]}.get(command, [])
    code = (
        "import importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'rich'): raise ModuleNotFoundError(name)\n"
        "sys.modules['torch'] = sys.modules['rich'] = None\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name in ('torch', 'rich') else find(name)"
    )
    done = process(command, repository, *words, code=code)
    # The doctor finds fault with a machine that has no torch.
    assert done.returncode == (1 if command == "doctor" else 0), done.stderr
    assert done.stdout


def test_python_m_pysnap(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pysnap", "ls", repository], capture_output=True, text=True
    )
    assert done.returncode == 0 and "step-000000003" in done.stdout


def test_every_command_has_help_that_tells_exit_statuses() -> None:
    for command in COMMANDS:
        if command != "demo":
            done = process(command, "--help")
            assert done.returncode == 0 and "exit status" in done.stdout, command
    listed = process("--help").stdout
    assert all(f"    {command} " in listed for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["ls", "{root}/none"], 3, "no repository"),
        (["ls", "{root}@step=9"], 3, "no repository"),
        (["show", "{root}@step=9"], 3, "holds no step 9 snapshot; there are those of step 3"),
        (["show", "{root}@tag=x"], 3, "holds no tag x snapshot"),
        (["show", "{root}@tag=a b"], 2, "is no tag"),
        (["show", "{root}@bset"], 2, "names no snapshot"),
        (["show", "{root}@min accuracy"], 3, "holds no best snapshot"),
        (["show", "{root}/latest@best"], 2, "one snapshot already"),
        (["show", "{root}", "nothing"], 3, 'no tensor under "nothing"'),
        (["show", ""], 2, "empty word"),
        (["show", "{root}", "--depth=-1"], 2, "at least 0"),
        (["prune", "{root}", "--last=0"], 2, "at least 1"),
        (["prune", "{root}", "--every=often"], 2, "expected an amount"),
        (["watch", "{root}", "--interval=nan"], 2, "must be from"),
        (["export", "{root}", "weights.bin"], 2, "must end in"),
        (["report", "{root}", "report.pdf"], 2, "must end in"),
        (["doctor", "{root}/none"], 3, "no directory"),
    ],
)
def test_bad_input_is_a_sentence_and_a_status(
    repository: Path, commands: Commands, words: list[str], status: int, sentence: str
) -> None:
    commands.text(*(word.format(root=repository) for word in words), status=status)
    assert sentence in commands.errors
    assert commands.errors.startswith("pysnap: ") and commands.errors.count("\n") == 1


def test_usage_errors_end_with_2() -> None:
    assert process("nonsense").returncode == 2
    assert process("ls").returncode == 2
    assert process().returncode == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (NotFoundError("x"), 3),
        (BusyError("x"), 4),
        (CorruptError("x"), 1),
        (StorageError(28, "x"), 5),
        (Error("x"), 5),
    ],
)
def test_statuses_of_errors(error: Error, status: int) -> None:
    assert exits.of(error) == status


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        ("", 3),
        ("@newest", 3),
        ("@step=1", 1),
        ("@tag=good", 1),
        ("@best", 2),
        ("@min loss", 2),
        ("@max loss", 1),
        ("/latest", 3),
    ],
)
def test_a_word_names_a_snapshot(
    repository: Path, commands: Commands, rule: str, step: int
) -> None:
    notes.add_tags(newest_of_step(repository, 1), "good")
    assert commands.json("show", f"{repository}{rule}")["step"] == step


def test_a_path_may_hold_the_sign(repository: Path, commands: Commands) -> None:
    other = repository.rename(repository.with_name("gpt@best"))
    assert commands.json("show", other)["step"] == 3
    assert commands.json("show", f"{other}@step=1")["step"] == 1


def test_ls_tells_what_is_there(repository: Path, commands: Commands) -> None:
    path = newest_of_step(repository, 2)
    notes.add_tags(path, "good")
    notes.pin(path)
    notes.write_note(path, "the\nbest \x1b[31m")
    text = commands.text("ls", repository)
    assert "loss=0.5" in text and 'pinned good "the best \\x1b[31m"' in text
    assert "\x1b" not in text
    entry = next(item for item in commands.json("ls", repository)["snapshots"] if item["tags"])
    assert entry["pinned"] and entry["tags"] == ["good"] and entry["metrics"] == {"loss": 0.5}
    assert entry["raw_bytes"] > 0 and entry["name"] == path.name


def test_ls_tells_damage_beside_what_is_whole(repository: Path, commands: Commands) -> None:
    flip(newest_of_step(repository, 2) / "manifest.json", 100)
    text = commands.text("ls", repository, status=1)
    assert "step-000000003" in text and "cannot be read" in commands.errors
    assert len(commands.json("ls", repository, status=1)["damaged"]) == 1


def test_a_pipe_without_a_reader_is_no_traceback(repository: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "pysnap", "ls", repository], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


def test_without_a_terminal_no_line_is_cut(repository: Path) -> None:
    notes.add_tags(newest_of_step(repository, 1), "x" * 64)
    assert "x" * 64 in process("ls", repository).stdout


def test_a_terminal_gets_a_table_of_its_width(repository: Path) -> None:
    pytest.importorskip("rich")
    parent, child = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "pysnap", "ls", repository],
        stdout=child,
        stderr=child,
        env=os.environ | {"COLUMNS": "60", "TERM": "xterm"},
    )
    os.close(child)
    os.set_blocking(parent, False)
    text = os.read(parent, 65536).decode()
    os.close(parent)
    assert done.returncode == 0
    assert "\x1b[1m" in text
    lines = [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in text.splitlines()]
    assert max(map(len, lines)) <= 60


def test_show_counts_tied_weights_once(tmp_path: Path, commands: Commands) -> None:
    import torch

    import pysnap

    tied = torch.randn(1000)
    path = pysnap.save(tmp_path / "one", {"model": {"a": tied, "b": tied}, "x": torch.zeros(2, 3)})
    tensors = {item["name"]: item for item in commands.json("show", path)["tensors"]}
    assert tensors["x"]["shape"] == [2, 3] and tensors["x"]["dtype"] == "float32"
    assert tensors["model/a"]["raw_bytes"] == 4000
    assert tensors["model/b"]["stored_bytes"] == 0 < tensors["model/a"]["stored_bytes"]
    names = [item["name"] for item in commands.json("show", path, "model")["tensors"]]
    assert names == ["model/a", "model/b"]
    shallow, deep = commands.text("show", path, "--depth=1"), commands.text("show", path)
    assert "model" in shallow and "2 tensors" in shallow and "    a" not in shallow
    assert "    a" in deep and "2 x 3" in deep


def test_verify_names_damaged_tensors(repository: Path, commands: Commands) -> None:
    assert commands.json("verify", repository)["intact"]
    assert commands.text("verify", f"{repository}@step=1") == "step-000000001.1: intact\n"
    flip(newest_of_step(repository, 2) / "0.pack", 0)
    assert commands.text("verify", f"{repository}@step=1").endswith("intact\n")
    text = commands.text("verify", repository, status=1)
    assert "DAMAGED" in text and "tensors that cannot be read: model/" in text
    found = commands.json("verify", f"{repository}@step=2", status=1)
    assert found["damaged"] and not found["intact"]


def test_verify_tells_a_damaged_manifest(repository: Path, commands: Commands) -> None:
    path = newest_of_step(repository, 2)
    flip(path / "manifest.json", 100)
    assert "digest" in commands.text("verify", path, status=1)


def test_tag_pin_note(repository: Path, commands: Commands) -> None:
    one, two = newest_of_step(repository, 1), newest_of_step(repository, 2)
    assert commands.json("tag", one, "good", "paper")["tags"] == ["good", "paper"]
    commands.text("tag", two, "good", status=2)
    assert "--move takes it from there" in commands.errors
    assert notes.Notes.read(two).tags == ()
    assert commands.json("tag", two, "good", "--move")["tags"] == ["good"]
    assert notes.Notes.read(one).tags == ("paper",)
    assert "pinned, paper" in commands.text("pin", one)
    assert not commands.json("pin", one, "--remove")["pinned"]
    assert "why not" in commands.text("note", one, "why not")
    commands.text("tag", one, "good", "--remove", status=3)
    assert commands.json("tag", one, "paper", "--remove")["tags"] == []
    commands.text("tag", one, "fine", "odd tag", status=2)
    assert notes.Notes.read(one).tags == ()


def test_marks_are_set_beside_a_writer_and_prune_is_not(
    repository: Path, commands: Commands
) -> None:
    with open(repository / ".writer", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        commands.text("tag", repository, "good")
        commands.text("prune", repository, "--last=1", status=4)
        assert "in use by another writer" in commands.errors
        assert "would be removed" in commands.text("prune", repository, "--last=1", "--dry-run")
    assert len(commands.json("ls", repository)["snapshots"]) > 2
