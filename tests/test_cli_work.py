"""Commands that compare, write or remove: diff, prune, export, doctor, watch, report."""

from __future__ import annotations

import html.parser
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Commands, newest_of_step, process
from support import assert_same, flip

import pysnap
from pysnap import notes
from pysnap.cli import diff


def add_events(root: Path, *events: dict[str, Any]) -> None:
    with open(root / "events.jsonl", "a") as file:
        for number, event in enumerate(events):
            file.write(json.dumps({"time": 1000.0 + 60 * number} | event) + "\n")


# diff


def test_diff_tells_every_kind_of_change(tmp_path: Path, commands: Commands) -> None:
    nan = float("nan")
    same = {"e": torch.tensor([1.0, nan])}
    before = {
        "a": torch.tensor([3.0, 0.0, nan]),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "whole": torch.tensor([2**62], dtype=torch.int64),
        "array": np.array([True, False]),
        "shape": torch.zeros(2),
        "gone": torch.zeros(1),
        "lr": 0.1,
        "deep": (1, {"x": "y", 5: "z"}),
    }
    after = {
        "a": torch.tensor([3.0, 4.0, nan]),
        "half": torch.full((4,), 2.0, dtype=torch.bfloat16),
        "whole": torch.tensor([2**62 + 1024], dtype=torch.int64),
        "array": np.array([True, True]),
        "shape": torch.zeros(3),
        "new": torch.zeros(1),
        "lr": 0.2,
        "deep": (1, {"x": "y", 5: "w"}),
    }
    one = pysnap.save(tmp_path / "1", before | same, metadata={"config": {"width": 1}})
    two = pysnap.save(tmp_path / "2", after | same, metadata={"config": {"width": 2}})
    found = commands.json("diff", one, two, status=1)
    tensors = {entry["name"]: entry for entry in found["tensors"]}
    assert list(tensors) == ["whole", "a", "half", "array"]
    assert tensors["a"]["norm"] == tensors["a"]["largest"] == 4.0
    assert tensors["a"]["elements"] == 1 and tensors["a"]["of"] == 3
    assert tensors["half"]["norm"] == 2.0 and tensors["half"]["relative"] == 1.0
    assert tensors["whole"]["norm"] == 1024.0 and tensors["array"]["elements"] == 1
    assert found["added"] == ["new"] and found["removed"] == ["gone"] and found["equal"] == 1
    assert found["other_kind"] == [
        {"name": "shape", "before": "float32 [2]", "after": "float32 [3]"}
    ]
    assert found["values"] == ["lr was 0.1, is 0.2", "deep/1/5 was 'z', is 'w'"]
    assert found["metadata"] == ["config.width was 1, is 2"]
    text = commands.text("diff", one, two, "--most=1", status=1)
    assert "and 3 more" in text and "lr was 0.1" in text and "metadata: config.width" in text


def test_diff_of_equal_states_is_fine(repository: Path, commands: Commands) -> None:
    assert "0 tensors changed" in commands.text("diff", repository, f"{repository}@newest")
    assert commands.json("diff", repository, f"{repository}@step=1", "model", status=1)["tensors"]


def test_diff_reads_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = torch.arange(1000.0).reshape(100, 10)
    right = left.clone()
    right[5, 5] += 3
    right[99, 9] -= 4
    views = [
        pysnap.open(pysnap.save(tmp_path / name, {"w": value}))["w"]
        for name, value in (("1", left), ("2", right))
    ]
    monkeypatch.setattr(diff, "_PIECE", 400)
    read: list[int] = []
    plain = diff._tensor

    def counted(value: Any) -> torch.Tensor:
        read.append(value.numel())
        return plain(value)

    monkeypatch.setattr(diff, "_tensor", counted)
    change = diff.compare("w", *views)
    assert change is not None and change.norm == 5.0 and change.elements == 2
    assert math.isclose(change.relative, 5 / float(left.double().norm()))
    assert max(read) == 100 and sum(read) == 2000


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.uint16])
def test_diff_of_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    values = [torch.ones(3).to(dtype), torch.tensor([1.0, 0.0, 1.0]).to(dtype)]
    views = [
        pysnap.open(pysnap.save(tmp_path / str(index), {"w": value}))["w"]
        for index, value in enumerate(values)
    ]
    change = diff.compare("w", *views)
    assert change is not None and change.norm == 1.0 and change.elements == 1
    assert diff.compare("w", views[0], views[0]) is None


def test_a_value_that_became_nan_stands_first(tmp_path: Path, commands: Commands) -> None:
    one = pysnap.save(tmp_path / "1", {"a": torch.ones(2), "b": torch.ones(2)})
    two = pysnap.save(tmp_path / "2", {"a": torch.zeros(2), "b": torch.tensor([1.0, float("nan")])})
    tensors = commands.json("diff", one, two, status=1)["tensors"]
    assert [entry["name"] for entry in tensors] == ["b", "a"]
    assert tensors[0]["norm"] == tensors[0]["largest"] == "nan"


# prune


def steps(root: Path, commands: Commands) -> list[int]:
    return sorted({entry["step"] for entry in commands.json("ls", root)["snapshots"]})


def test_prune_says_why_and_does_what_it_said(repository: Path, commands: Commands) -> None:
    words = ["prune", repository, "--last=1", "--best=1"]
    planned = commands.json(*words, "--dry-run")
    assert steps(repository, commands) == [1, 2, 3]
    done = commands.json(*words)
    assert planned["dry_run"] and not done["dry_run"]
    assert planned["snapshots"] == done["snapshots"]
    assert planned["freed_bytes"] == done["freed_bytes"] > 0
    reasons = {entry["step"]: entry["reason"] for entry in done["snapshots"] if entry["kept"]}
    assert reasons[3] == "the newest" and "number 1 by min loss: 0.5" in reasons[2]
    assert steps(repository, commands) == [2, 3]


def test_prune_keeps_marks_and_what_cannot_be_read(repository: Path, commands: Commands) -> None:
    notes.pin(newest_of_step(repository, 1))
    broken = newest_of_step(repository, 2)
    flip(broken / "manifest.json", 100)
    text = commands.text("prune", repository, "--last=1")
    assert "pinned" in text and f"{broken.name} cannot be read and stays" in text
    assert broken.exists() and newest_of_step(repository, 1).exists()


def test_prune_takes_the_rule_of_the_last_run(repository: Path, commands: Commands) -> None:
    (repository / "events.jsonl").unlink(missing_ok=True)
    commands.text("prune", repository, status=2)
    assert "does not say what its run keeps" in commands.errors
    keep = {"last": 1, "best": 0, "every": "2 steps", "for_": None}
    add_events(
        repository,
        {"event": "run", "keep": {"last": 3}, "best": None},
        {"event": "run", "keep": keep, "best": None},
    )
    commands.text("prune", repository)
    assert steps(repository, commands) == [2, 3]


def test_prune_makes_no_repository(tmp_path: Path, commands: Commands) -> None:
    commands.text("prune", tmp_path / "none", "--last=1", status=3)
    assert not (tmp_path / "none").exists()


# export


def test_export_to_safetensors(repository: Path, tmp_path: Path, commands: Commands) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    target = tmp_path / "w.safetensors"
    found = commands.json("export", repository, target, "--only=model")
    state = pysnap.load(repository)["model"]
    assert found["tensors"] == 2 and found["bytes"] == target.stat().st_size
    assert_same(dict(sorted(safetensors.load_file(target).items())), dict(sorted(state.items())))
    commands.text("export", repository, target, status=2)
    assert "--force" in commands.errors
    commands.text("export", repository, target, "--force", "--only=optimizer", status=3)
    assert set(safetensors.load_file(target)) == {"weight", "bias"}
    commands.text("export", repository, target, "--force")
    assert set(safetensors.load_file(target)) == {"model/weight", "model/bias"}
    assert sorted(os.listdir(tmp_path)) == ["gpt", "w.safetensors"]


def test_export_for_torch_load(repository: Path, tmp_path: Path, commands: Commands) -> None:
    commands.text("export", f"{repository}@step=1", tmp_path / "w.pt", "--only=model")
    saved = torch.load(tmp_path / "w.pt", weights_only=True)
    assert_same(dict(saved), dict(pysnap.load(newest_of_step(repository, 1))["model"]))
    commands.text("export", repository, tmp_path / "all.pt")
    assert "optimizer" in torch.load(tmp_path / "all.pt", weights_only=False)


def test_export_of_tied_weights(tmp_path: Path, commands: Commands) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tied = torch.randn(8, 8)
    state = {"m": {"a": tied, "b": tied, "c": tied.t()}, "n": np.arange(3)}
    path = pysnap.save(tmp_path / "one", state)
    commands.text("export", path, tmp_path / "w.safetensors")
    loaded = safetensors.load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["m/a"], tied) and torch.equal(loaded["m/c"], tied.t())
    assert torch.equal(loaded["n"], torch.arange(3))
    commands.text("export", path, tmp_path / "w.pt", "--only=m")
    both = torch.load(tmp_path / "w.pt", weights_only=True)
    assert both["a"].data_ptr() == both["b"].data_ptr()


def test_an_export_that_fails_leaves_the_old_file(
    repository: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "w.pt"
    target.write_bytes(b"old")

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    commands.text("export", repository, target, "--force", status=5)
    assert "unexpected pos" in commands.errors
    assert target.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["gpt", "w.pt"]


def test_a_damaged_snapshot_is_not_exported(
    repository: Path, tmp_path: Path, commands: Commands
) -> None:
    flip(newest_of_step(repository, 3) / "0.pack", 0)
    commands.text("export", repository, tmp_path / "w.pt", status=1)
    assert not (tmp_path / "w.pt").exists()


# doctor


def test_doctor_measures_and_leaves_nothing(tmp_path: Path) -> None:
    done = process("doctor", tmp_path, "--json", code="import os; os.environ['PYSNAP_NICE'] = '3'")
    found = {item["what"]: item for item in json.loads(done.stdout)["findings"]}
    assert found["writing, with fsync"]["found"].endswith("/s")
    assert found["O_DIRECT"]["found"].startswith(("works", "not here"))
    assert found["PYSNAP_NICE"]["found"] == "3 (environment)"
    assert found["PYSNAP_CODEC"]["found"] == "auto"
    assert found["torch"]["found"].startswith(torch.__version__)
    assert ("CUDA" in found) or ("device 0" in found)
    assert os.listdir(tmp_path) == []


def test_doctor_tells_a_wrong_setting(tmp_path: Path) -> None:
    done = process("doctor", tmp_path, code="import os; os.environ['PYSNAP_NICE'] = '99'")
    assert done.returncode == 1 and "PYSNAP_NICE is 99" in done.stdout


# watch


RUN = (
    {"event": "run", "pid": 7, "host": "h<1>", "command": ["train.py", "<b>"], "rule": "every 1"},
    {"event": "metrics", "step": 1, "values": {"loss": 0.9, "bad": "nan"}},
    {"event": "snapshot", "step": 1, "name": "step-000000001", "stall_seconds": 0.25,
     "durable_seconds": 1.5, "stored_bytes": 1000, "late": False, "metrics": {"loss": 0.9}},
    {"event": "removed", "step": 1, "name": "step-000000001", "reason": "no rule <keeps> it"},
    {"event": "failed", "step": 2, "error": "no space <left>", "errno": 28, "retry_seconds": None},
    {"event": "snapshot", "step": 9, "name": "step-000000009", "stall_seconds": 0.125,
     "durable_seconds": 2.5, "stored_bytes": 2000, "late": True, "metrics": None},
    {"event": "snapshot", "step": "foreign", "name": 7},
    {"event": "metrics", "step": 4, "values": ["foreign"]},
)  # fmt: skip


def test_watch_tells_how_a_run_stands(repository: Path, commands: Commands) -> None:
    (repository / "events.jsonl").unlink(missing_ok=True)
    add_events(repository, *RUN)
    (repository / ".partial-x").mkdir()
    state = commands.json("watch", repository)
    assert state["in_flight"] == 1 and state["step"] == 9
    assert state["stall_seconds"] == 0.125 and state["durable_seconds"] == 2.5
    assert state["failures"] == 1 and state["last_failure"] == "no space <left>"
    # Two snapshots, three minutes apart.
    assert state["snapshots_per_hour"] == 20.0
    assert state["metrics"] == {"loss": 0.7}
    text = commands.text("watch", repository, "--once")
    assert "125 ms" in text and "20 an hour" in text


def test_watch_of_a_new_repository(tmp_path: Path, commands: Commands) -> None:
    with pysnap.Snapshotter(tmp_path / "r", model=torch.nn.Linear(1, 1)):
        assert "none yet" in commands.text("watch", tmp_path / "r", "--once")


def test_watch_follows_until_interrupted(repository: Path) -> None:
    pytest.importorskip("rich")
    import pty
    import signal

    parent, child = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "pysnap", "watch", repository, "--interval=0.1"],
        stdout=child,
        stderr=child,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(child)
    shown = b""
    try:
        while b"newest" not in shown:
            shown += os.read(parent, 4096)
        pysnap.Snapshotter(repository, x=torch.ones(1)).close()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=60) == 130
    finally:
        watching.kill()
        watching.wait()
        os.close(parent)
    assert b"Traceback" not in shown


# report


class Page(html.parser.HTMLParser):
    """Tags that are open, text, and everything that would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [name for name, _ in attributes if name in ("src", "href", "onload")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_report_is_one_file_with_everything(
    repository: Path, tmp_path: Path, commands: Commands
) -> None:
    (repository / "events.jsonl").unlink(missing_ok=True)
    add_events(repository, *RUN)
    notes.add_tags(newest_of_step(repository, 2), "good")
    target = tmp_path / "report.html"
    commands.text("report", repository, target)
    page = Page(target.read_text())
    for word in (
        "kept: tagged good",
        "removed: no rule <keeps> it",
        "no space <left>",
        "train.py <b>",
        "stall per snapshot",
        "time to durable",
        "loss",
        "1 late",
    ):
        assert word in page.words, word
    assert page.loads == [] and "b" not in page.tags and "script" not in page.tags
    assert page.tags.count("polyline") == page.tags.count("svg") == 4
    commands.text("report", repository, target, status=2)
    assert commands.json("report", repository, target, "--force")["bytes"] > 0
    assert sorted(os.listdir(tmp_path)) == ["gpt", "report.html"]


def test_report_as_a_picture(repository: Path, tmp_path: Path, commands: Commands) -> None:
    pytest.importorskip("matplotlib", reason="it draws the picture")
    image = pytest.importorskip("matplotlib.image")
    (repository / "events.jsonl").unlink(missing_ok=True)
    commands.text("report", repository, tmp_path / "few.png")
    add_events(repository, *RUN)
    odd = {"$x^{": 1.0, "日本": 2.0, "<b>": 1e300}
    add_events(repository, {"event": "metrics", "step": 3, "values": odd})
    found = commands.json("report", repository, tmp_path / "r.png")
    data = (tmp_path / "r.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n") and found["bytes"] == len(data)
    few, more = (image.imread(tmp_path / name) for name in ("few.png", "r.png"))
    # Loss and sizes alone; then stalls, times to durable and the three odd metrics besides.
    assert few.shape[1] == more.shape[1] and more.shape[0] / few.shape[0] == 7 / 2
    assert more.std() > 0.05
    commands.text("report", repository, tmp_path / "r.png", status=2)
    assert sorted(os.listdir(tmp_path)) == ["few.png", "gpt", "r.png"]


def test_a_picture_of_nothing_or_without_matplotlib_is_refused(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    pysnap.Snapshotter(tmp_path / "new", x=torch.zeros(1)).close()
    (tmp_path / "new" / "events.jsonl").unlink(missing_ok=True)
    commands.text("report", tmp_path / "new", tmp_path / "r.png", status=3)
    assert "nothing to plot" in commands.errors
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    commands.text("report", tmp_path / "new", tmp_path / "r.png", status=2)
    assert "pip install 'pysnap[cli]'" in commands.errors
    commands.text("report", tmp_path / "new", tmp_path / "r.svg", status=2)
    assert "must end in .html, or in .png" in commands.errors
    assert os.listdir(tmp_path) == ["new"]


def test_report_of_a_repository_without_events(
    repository: Path, tmp_path: Path, commands: Commands
) -> None:
    (repository / "events.jsonl").unlink(missing_ok=True)
    commands.text("report", repository, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "loss" in page.words and "size on disk" in page.words
    assert "nan" not in (tmp_path / "r.html").read_text()
