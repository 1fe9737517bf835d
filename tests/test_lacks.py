"""What the process lacks, such as descriptors, says nothing of a snapshot: it is no damage, and no
reason to go on from an older one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Commands, make_repository, newest_of_step

import pysnap
from pysnap import _engine, storage, verify
from pysnap.errors import Error, StorageError
from pysnap.repository import Snapshot, list_snapshots
from pysnap.verify import verify_repository, verify_snapshot

NUMBERS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR]


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def under_every_limit(tmp_path: Path, code: str) -> list[str]:
    """What `attempt()` of `code` says in a process, with room for no descriptor, for one, and so
    on, until it says `fine`; whatever it raises is said by its type."""
    program = f"""
import os, resource, sys
import torch, pysnap
from pysnap.errors import StorageError

{code}

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
used = len(os.listdir("/proc/self/fd")) - 1
said = []
while not said or said[-1] != "fine":
    assert len(said) < 40, said
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + len(said), hard))
    try:
        said.append(attempt())
    except StorageError as error:
        assert "ulimit -n" in str(error), error
        said.append(f"errno {{error.errno}}")
    except BaseException as error:
        said.append(f"{{type(error).__name__}}: {{error}}")
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
print("\\n".join(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def make_runs(root: Path) -> Path:
    value = torch.zeros(5000)
    with pysnap.Snapshotter(root, every="off", value=value) as snapshotter:
        for _ in range(3):
            with snapshotter.step():
                value += 1
            snapshotter.save(tag=f"t{snapshotter.progress.step}").wait()
    return root


@pytest.mark.parametrize("which", ["", "tag='t3'", "step=3", "'./runs/step-000000003'"])
def test_a_run_without_descriptors_does_not_go_on_from_an_older_snapshot(
    tmp_path: Path, which: str
) -> None:
    make_runs(tmp_path / "runs")
    said = under_every_limit(
        tmp_path,
        f"""
value = torch.zeros(5000)
snapshotter = pysnap.Snapshotter("runs", every="off", value=value)
snapshotter.wait_ready()
def attempt():
    value.zero_()
    try:
        snapshot = snapshotter.resume({which})
    except StorageError:
        assert not value.any() and snapshotter.progress.step == 0
        raise
    assert snapshot.step == 3 and (value == 3).all()
    return "fine"
""",
    )
    assert set(said[:-1]) == {"errno 24"} and said[-1] == "fine"


def test_saving_and_resuming_import_nothing(tmp_path: Path) -> None:
    """An import in their midst, such as that of `numpy.ma` by `np.unique`, takes time and
    descriptors, and fails with an error that is not ours."""
    program = """
import sys
import pysnap, torch
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(4)).sum().backward()
optimizer.step()
with pysnap.Snapshotter("runs", every="off", model=model, optimizer=optimizer) as snapshotter:
    snapshotter.wait_ready()
    before = set(sys.modules)
    snapshotter.save().wait()
    snapshotter.resume()
    print(sorted(set(sys.modules) - before))
"""
    said = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True)
    assert said == "[]\n"


def test_a_repository_is_not_opened_by_halves(tmp_path: Path) -> None:
    make_runs(tmp_path / "runs")
    said = under_every_limit(
        tmp_path,
        """
pysnap.Snapshotter  # imported lazily
def attempt():
    with pysnap.Snapshotter("runs", every="off", value=torch.zeros(5000)) as snapshotter:
        assert len(snapshotter._repository._known) == 3
    return "fine"
""",
    )
    assert len(said) > 2 and set(said[:-1]) == {"errno 24"}


@pytest.mark.parametrize(
    "call",
    [
        "(pysnap.load('runs')['value'] == 3).all()",
        "(pysnap.load('runs/step-000000003')['value'] == 3).all()",
        "(pysnap.open('runs')['value'][...] == 3).all()",
        "verify_repository('runs').intact",
        "verify_snapshot('runs/step-000000003').intact",
    ],
)
def test_reading_without_descriptors_is_no_damage(tmp_path: Path, call: str) -> None:
    make_runs(tmp_path / "runs")
    said = under_every_limit(
        tmp_path,
        f"""
from pysnap.verify import verify_repository, verify_snapshot
assert {call}  # what is imported lazily is there
def attempt():
    assert {call}
    return "fine"
""",
    )
    assert len(said) > 1 and set(said[:-1]) == {"errno 24"}


@pytest.mark.parametrize("number", NUMBERS)
def test_advice_stands_behind_what_the_system_says(number: int) -> None:
    error = StorageError.wrap(OSError(number, os.strerror(number)), "reading x", "x")
    assert error.says_nothing and error.behind("so: ").says_nothing
    head, _, advice = str(error).partition(f" (errno {number}); ")
    assert head == f"reading x failed: {os.strerror(number)}" and advice


def test_a_disk_that_fails_is_damage_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not StorageError(errno.EIO, "x").says_nothing and not Error("x").says_nothing
    make_runs(tmp_path / "runs")
    fail(monkeypatch, tmp_path / "runs" / "step-000000003" / "manifest.json", errno.EIO)
    assert pysnap.load(tmp_path / "runs")["progress"]["step"] == 2
    assert not verify_repository(tmp_path / "runs").intact


def fail(monkeypatch: pytest.MonkeyPatch, file: Path, number: int) -> None:
    """Reading `file` fails."""
    read = storage.read_file

    def refuse(path: Path, limit: int) -> bytes:
        if path == file:
            raise StorageError(number, f"reading {path} failed: {os.strerror(number)}", str(path))
        return read(path, limit)

    monkeypatch.setattr(storage, "read_file", refuse)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_the_system_lacks_at_a_pack_ends_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    make_runs(tmp_path / "runs")
    restore = _engine.restore

    def refuse(*, packs: list[tuple[str, int]], **rest: Any) -> None:
        if "step-000000003" in packs[0][0]:
            raise StorageError(number, f"opening {packs[0][0]} failed: x", packs[0][0])
        restore(packs=packs, **rest)

    monkeypatch.setattr(_engine, "restore", refuse)
    value = torch.zeros(5000)
    with (
        pysnap.Snapshotter(tmp_path / "runs", every="off", value=value) as snapshotter,
        pytest.raises(StorageError) as caught,
    ):
        snapshotter.resume()
    assert caught.value.errno == number
    assert not value.any() and snapshotter.progress.step == 0
    with pytest.raises(StorageError):
        pysnap.load(tmp_path / "runs")


def _verified(root: Path) -> object:
    return verify_repository(root)


READS: list[Callable[[Path], object]] = [pysnap.load, pysnap.open, list_snapshots, _verified]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("read", READS)
def test_what_the_system_lacks_at_one_manifest_ends_the_reading(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path], object],
    number: int,
) -> None:
    make_runs(tmp_path / "runs")
    fail(monkeypatch, tmp_path / "runs" / "step-000000003" / "manifest.json", number)
    with pytest.raises(StorageError) as caught:
        read(tmp_path / "runs")
    assert caught.value.errno == number


@pytest.mark.parametrize("number", NUMBERS)
def test_verify_tells_what_the_engine_lacked_from_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands, number: int
) -> None:
    root = make_repository(tmp_path / "runs")
    what = f"opening {root}/x failed"

    def refused(**_: Any) -> list[tuple[int, str, int]]:
        return [(0, what, number)]

    monkeypatch.setattr(_engine, "verify", refused)
    for path in (root, newest_of_step(root, 2)):
        assert commands.text("verify", path, status=5) == ""
        assert what in commands.errors and f"errno {number}" in commands.errors


@pytest.mark.parametrize("error", [MemoryError(), pysnap.ConfigError("no libzstd is found")])
def test_verify_without_memory_or_libzstd_is_refused_and_calls_nothing_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands, error: Exception
) -> None:
    root = make_repository(tmp_path / "runs")

    def refused(**_: Any) -> list[tuple[int, str, int]]:
        raise error

    monkeypatch.setattr(_engine, "verify", refused)
    assert commands.text("verify", root, status=5) == ""
    assert f"cannot be verified: {error or 'there is no memory'}" in commands.errors


def test_notes_that_cannot_be_looked_at_are_not_no_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a tag would name an older snapshot that has it, too."""
    make_runs(tmp_path / "runs")
    fail(monkeypatch, tmp_path / "runs" / "step-000000003" / "notes.json", errno.EMFILE)
    with (
        pysnap.Snapshotter(tmp_path / "runs", every="off", value=torch.zeros(5000)) as snapshotter,
        pytest.raises(StorageError),
    ):
        snapshotter.resume(tag="t2")
    with pytest.raises(StorageError):
        verify_snapshot(tmp_path / "runs" / "step-000000003")
    assert Snapshot.open(tmp_path / "runs" / "step-000000003").step == 3
    assert verify.Verdict(tmp_path).intact
