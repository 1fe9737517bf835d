"""Verifying: everything that is damaged is named, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference_writer import Writer
from support import flip

import pysnap
from pysnap.repository import Snapshot
from pysnap.verify import verify_repository, verify_snapshot


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A snapshot of five tensors, each in chunks of its own, in two packs."""
    writer = Writer(chunk_size=4096, packs=2)
    for index in range(5):
        data = torch.full((2048,), 3.0 + index).numpy().tobytes()
        writer.add(data, "float32", [2048])
    writer.write(tmp_path / "s", {f"t{index}": {"$tensor": index} for index in range(5)})
    return tmp_path / "s"


def place_of(path: Path, chunk: int) -> tuple[Path, int]:
    manifest = Snapshot.open(path).manifest
    row = manifest.chunks[chunk]
    return path / manifest.packs[row["pack"]][0], int(row["offset"])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A repository of three snapshots."""
    value = torch.zeros(5000)
    with pysnap.Snapshotter(
        tmp_path / "runs", every="off", keep=pysnap.Keep(last=3), value=value
    ) as snapshotter:
        for _ in range(3):
            with snapshotter.step():
                value += torch.rand(5000)
            snapshotter.save().wait()
    return tmp_path / "runs"


def test_an_intact_snapshot(saved: Path) -> None:
    verdict = verify_snapshot(saved)
    assert verdict.intact
    assert verdict.manifest is not None and verdict.manifest.step == 200
    assert (verdict.damaged, verdict.missing, verdict.extra, verdict.remarks) == ([], [], [], [])


def test_every_damaged_tensor_is_named_and_no_other(saved: Path) -> None:
    """It goes on after damage: chunk 2 and 3 are of t1, chunk 8 is of t4."""
    for chunk in (2, 3, 8):
        flip(*place_of(saved, chunk))
    verdict = verify_snapshot(saved)
    assert verdict.damaged == ["t1", "t4"]
    assert len(verdict.problems) == 3
    assert "0.pack, chunk 2" in verdict.problems[0] and "it holds t1" in verdict.problems[0]


def test_a_missing_pack_damages_what_it_holds_once(saved: Path) -> None:
    (saved / "1.pack").unlink()
    verdict = verify_snapshot(saved)
    assert verdict.missing == ["1.pack"]
    assert verdict.damaged == [f"t{index}" for index in range(5)]
    assert len(verdict.problems) == 1


def test_a_pack_of_another_length(saved: Path) -> None:
    with (saved / "0.pack").open("ab") as file:
        file.write(b"\0")
    verdict = verify_snapshot(saved)
    assert len(verdict.problems) == 1 and "bytes instead of" in verdict.problems[0]


def test_files_that_do_not_belong_to_it_are_no_damage(saved: Path) -> None:
    (saved / "7.pack").write_bytes(b"")
    (saved / "a\nb").write_bytes(b"")
    verdict = verify_snapshot(saved)
    assert verdict.intact
    assert verdict.extra == ["7.pack", "a\nb"]
    assert "\n" not in "".join(verdict.remarks)


def test_notes_that_cannot_be_read_are_remarked(saved: Path) -> None:
    (saved / "notes.json").write_bytes(b"{")
    verdict = verify_snapshot(saved)
    assert verdict.intact and "notes.json" in verdict.remarks[0]


def test_a_damaged_manifest(saved: Path) -> None:
    flip(saved / "manifest.json", 100)
    verdict = verify_snapshot(saved)
    assert not verdict.intact and verdict.manifest is None
    assert "manifest.json" in verdict.problems[0]


def test_a_tree_that_is_none(tmp_path: Path) -> None:
    Writer().write(tmp_path / "s", {"a": {"$tensor": 5}})
    verdict = verify_snapshot(tmp_path / "s")
    assert len(verdict.problems) == 1 and '"a" is tensor 5' in verdict.problems[0]


def test_progress_counts_every_stored_byte(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysnap.verify._BATCH", 3 * 4096)
    told: list[int] = []
    flip(*place_of(saved, 9))
    verdict = verify_snapshot(saved, progress=told.append)
    assert verdict.manifest is not None
    assert len(told) == 4 and sum(told) == verdict.manifest.stored
    assert verdict.damaged == ["t4"]


def test_more_damage_than_anybody_reads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysnap.verify._MOST_SENTENCES", 2)
    for chunk in range(10):
        flip(*place_of(saved, chunk))
    verdict = verify_snapshot(saved)
    assert len(verdict.problems) == 3 and "8 more chunks" in verdict.problems[2]
    assert len(verdict.damaged) == 5


def test_what_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(pysnap.NotFoundError, match="no snapshot"):
        verify_snapshot(tmp_path)
    with pytest.raises(pysnap.NotFoundError, match="no repository"):
        verify_repository(tmp_path)
    with pytest.raises(pysnap.NotFoundError, match="no repository"):
        verify_repository(tmp_path / "absent")


def test_a_repository(runs: Path) -> None:
    verdict = verify_repository(runs)
    assert verdict.intact and verdict.remarks == []
    assert [found.path.name for found in verdict.snapshots] == [
        "step-000000003", "step-000000002", "step-000000001",
    ]  # fmt: skip


def test_a_damaged_repository_is_read_to_its_end(runs: Path) -> None:
    flip(runs / "step-000000003" / "0.pack", 0)
    flip(runs / "step-000000002" / "manifest.json", 0)
    os.unlink(runs / ".pysnap")
    verdict = verify_repository(runs)
    assert not verdict.intact and ".pysnap" in verdict.problems[0]
    assert [(found.path.name, found.intact) for found in verdict.snapshots] == [
        ("step-000000003", False), ("step-000000001", True), ("step-000000002", False),
    ]  # fmt: skip


def test_copies_are_remarked(runs: Path) -> None:
    shutil.copytree(runs / "step-000000001", runs / "step-000000009")
    verdict = verify_repository(runs)
    assert verdict.intact
    assert len(verdict.remarks) == 2
    assert "same id" in verdict.remarks[0] and "step 1" in verdict.remarks[1]


def test_verifying_needs_no_torch(saved: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from pysnap.verify import verify_snapshot; "
        f"sys.exit(not verify_snapshot({str(saved)!r}).intact)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
