"""Whether a run can keep its snapshots is told before its first step."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import Run
from test_retention import run as snapshots_of

import pysnap
from pysnap import notes, preflight, repository, snapshotter
from pysnap.cadence import Cadence
from pysnap.capture import Size
from pysnap.retention import Keep

MB = 1_000_000


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    status = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(preflight.os, "statvfs", lambda _: status)


def values(megabytes: int = 4) -> dict[str, Any]:
    return {"x": torch.randn(megabytes * MB // 4)}


# Disk


@pytest.mark.parametrize(
    ("keep", "best", "codec", "free", "outcome"),
    [
        (Keep(last=3), None, "none", 15 * MB, "error"),
        (Keep(last=3), None, "none", 18 * MB, "warning"),
        (Keep(last=3), None, "none", 25 * MB, "silent"),
        (Keep(last=3), None, "fast", 15 * MB, "warning"),
        (Keep(last=3), None, "fast", 7 * MB, "error"),
        (Keep(last=1), None, "none", 9 * MB, "warning"),
        (Keep(last=1, best=3), "min loss", "none", 18 * MB, "error"),
        (Keep(last=None), None, "none", 30 * MB, "warning"),
        (Keep(last=None), None, "none", 90 * MB, "silent"),
        (Keep(last=1, every="10 steps"), None, "none", 30 * MB, "warning"),
        (Keep(last=1, every="10 steps", for_="40 steps"), None, "none", 25 * MB, "error"),
        (Keep(last=1, every="10 steps", for_="40 steps"), None, "none", 50 * MB, "silent"),
        (Keep(last=1, for_="40 steps"), None, "none", 25 * MB, "error"),
    ],
    ids=str,
)
def test_what_the_rule_keeps_is_held_against_the_free_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    keep: Keep,
    best: str | None,
    codec: str,
    free: int,
    outcome: str,
) -> None:
    disk_of(monkeypatch, free)

    def make() -> None:
        pysnap.Snapshotter(
            tmp_path, values=values(), every=10, keep=keep, best=best, codec=codec
        ).close()

    if outcome == "error":
        with pytest.raises(pysnap.StorageError, match="in flight, of up to") as raised:
            make()
        assert raised.value.errno == errno.ENOSPC and str(tmp_path) in str(raised.value)
        monkeypatch.undo()
        pysnap.Snapshotter(tmp_path, values=values()).close()  # the lock is free
        return
    make()
    told = [one for one in warnings_of(caplog) if " free" in one]
    assert bool(told) == (outcome == "warning")


def test_what_is_there_already_needs_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with pysnap.Snapshotter(tmp_path, values=values(), codec="none") as first:
            first.resume()
            with first.step():
                pass
            first.save()
    disk_of(monkeypatch, 6 * MB)
    pysnap.Snapshotter(tmp_path, values=values(), codec="none").close()
    with pytest.raises(pysnap.StorageError, match="keep fewer"):
        pysnap.Snapshotter(tmp_path, values=values(), codec="none", keep=Keep(last=6))


def test_a_tagged_snapshot_takes_room_besides(tmp_path: Path) -> None:
    taken = snapshots_of([1, 2, 3])
    for one in taken:
        (tmp_path / one.path).mkdir()
    held = [repository.Snapshot(tmp_path / one.path, one.manifest) for one in taken]
    for one in held:
        (one.path / "0.pack").write_bytes(bytes(100_000))
    arguments: Any = (1000, Keep(last=1), Cadence(), repository.Listing(held, []))
    plain = preflight.forecast(*arguments, {}, improvements=False)
    tagged = preflight.forecast(*arguments, {held[0].path: "tagged a"}, improvements=False)
    # Three go when the first is durable; or two go and one stays for good.
    assert plain.peak == plain.present + 1000 == tagged.peak
    many = preflight.forecast(
        300_000,
        Keep(last=1),
        Cadence(),
        repository.Listing(held, []),
        {held[0].path: "tagged a"},
        improvements=False,
    )
    assert many.peak == 2 * 300_000 + many.present // 3 > 700_000
    # What cannot be read is removed by no rule.
    unread = repository.Listing(held[1:], [(held[0].path, pysnap.CorruptError("x"))])
    assert (
        preflight.forecast(300_000, Keep(last=1), Cadence(), unread, {}, improvements=False) == many
    )


@pytest.mark.parametrize(
    ("keep", "cadence", "improvements", "kept", "bounded"),
    [
        (Keep(last=3), "10 steps", True, 3, True),
        (Keep(last=3, best=2), "10 steps", True, 5, True),
        (Keep(last=None), "10 steps", False, 1, False),
        (Keep(last=2, every="1h"), "10m", False, 2, False),
        (Keep(last=2, every="1h", for_="1d"), "10m", False, 27, True),
        (Keep(last=2, every="1h", for_="1000 steps"), "10m", False, 2, False),
        (Keep(last=2, for_="1h"), "10m", False, 9, True),
        (Keep(last=2, for_="1h"), "10m", True, 2, False),
        (Keep(last=2, for_="1h"), "10m, 100 steps", False, 2, False),
        (Keep(last=2, for_="1h"), "1%", False, 2, False),
        (Keep(last=2, for_="1h"), "1%, 10m", False, 2, False),
        (Keep(last=2, for_="1h"), "25m", False, 6, True),
    ],
    ids=str,
)
def test_how_many_stay(
    keep: Keep, cadence: str, improvements: bool, kept: int, bounded: bool
) -> None:
    rule = Cadence.parse(cadence, "every")
    found = preflight.forecast(
        1000, keep, rule, repository.Listing([], []), {}, improvements=improvements
    )
    assert (found.kept, found.bounded) == (kept, bounded)
    assert found.peak == (kept + 1) * 1000


class Watch:
    """The most that the files in a folder have taken of the disk, looked at before each call that
    removes something, after each that makes something, and all the time in a thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def look(self) -> None:
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in [".", *names]:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
                except FileNotFoundError:
                    continue
        self.peak = max(self.peak, total)

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            self.look()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("codec", ["none", "fast"])
@pytest.mark.parametrize(
    "keep",
    [
        Keep(last=1),
        Keep(last=3, best=1),
        Keep(last=2, best=2, every="8 steps", for_="16 steps"),
        Keep(last=1, for_="6 steps"),
    ],
    ids=str,
)
def test_the_disk_never_holds_more_than_preflight_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: Keep, codec: str
) -> None:
    """Through restarts, with tags and pins set before and meanwhile, and a damaged snapshot."""
    root = tmp_path / "run"
    announced: list[preflight.Forecast] = []
    check = preflight.check

    def noted(*arguments: Any, **named: Any) -> preflight.Forecast:
        announced.append(check(*arguments, **named))
        return announced[-1]

    monkeypatch.setattr(snapshotter.preflight, "check", noted)
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "64KiB")
    delete, publish = repository.Repository.delete, repository.publish
    for stop in (14, 28, 42):
        run = Run()
        run.model.append(torch.nn.Linear(6, 50_000))
        run.optimizer.add_param_group({"params": run.model[-1].parameters()})
        watch = Watch(root)
        marked: list[str] = []

        def deleted(self: repository.Repository, path: Path, watch: Watch = watch) -> bool:
            watch.look()
            return delete(self, path)

        def published(*arguments: Any, watch: Watch = watch) -> repository.Snapshot:
            snapshot = publish(*arguments)
            watch.look()
            return snapshot

        monkeypatch.setattr(repository.Repository, "delete", deleted)
        monkeypatch.setattr(repository, "publish", published)
        parts = {"model": run.model, "optimizer": run.optimizer}
        best = "min loss" if keep.best else None
        with (
            watch,
            pysnap.Snapshotter(
                root, **parts, every="2 steps", keep=keep, best=best, codec=codec
            ) as training,
        ):
            training.resume()

            def within(
                training: Any = training, watch: Watch = watch, marked: list[str] = marked
            ) -> None:
                """Now, and at whatever moment since the last call."""
                training._committer.wait_idle()
                watch.look()
                now = announced[-1]
                assert watch.peak <= now.peak + len(marked) * now.snapshot

            for step in training.steps(stop):
                with training.step():
                    run.optimizer.zero_grad()
                    run.model(torch.randn(4, 6)).square().mean().backward()
                    run.optimizer.step()
                training.report(loss=float(step * 7 % 11))
                within()
                if step % 14 == 5:
                    marked.append(f"at-{step}")  # before, for it takes room before it is durable
                    training.save(tag=marked).wait()
                    within()
            within()
        assert announced[-1].bounded
        # The promise is no empty one: more than a third of it is used.
        assert codec == "fast" or watch.peak > 0.34 * announced[-1].peak
        paths = sorted(root.glob("step-*"))
        notes.pin(paths[0])
        if stop == 14:
            (paths[-1] / "manifest.json").write_bytes(b"{")
    one = max(
        sum(file.stat().st_blocks * 512 for file in path.iterdir()) for path in root.glob("step-*")
    )
    assert one <= announced[-1].snapshot < (1.3 * one if codec == "none" else 1.8 * one)


# Memory


def test_staging_that_memory_does_not_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotter, "available_memory", lambda: 10 * MB)
    with pytest.raises(
        pysnap.ConfigError, match=r"host_memory: staging needs 20 MB, and 10 MB .* such as 4MiB"
    ):
        pysnap.Snapshotter(tmp_path, values=values(20), host_memory="32MiB")
    pysnap.Snapshotter(tmp_path, values=values(20), host_memory="8MiB").close()


def test_tight_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshotter, "available_memory", lambda: 22 * MB)
    pysnap.Snapshotter(tmp_path, values=values(20), host_memory="32MiB").close()
    (told,) = warnings_of(caplog)
    assert "staging takes 20" in told and "22 MB" in told


def test_a_state_larger_than_staging_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pysnap.Snapshotter(tmp_path, values=values(20), host_memory="8MiB").close()
    (told,) = warnings_of(caplog)
    assert "waits for the disk" in told and "8.39 MB" in told


def test_the_time_that_a_step_waits_is_that_of_what_staging_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moments = iter([100.0, 108.0])
    monkeypatch.setattr(preflight.time, "monotonic", lambda: next(moments))
    opened = repository.Repository(tmp_path)
    preflight.check(
        opened,
        Size(stream=4000, disk=4000, staging=1000),
        Keep(),
        Cadence(),
        encodes=False,
        improvements=False,
        free_memory=10**9,
        metadata=0,
    )
    opened.close()
    (told,) = warnings_of(caplog)
    assert "about 6s" in told


def test_a_large_configuration_is_part_of_every_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[preflight.Forecast] = []
    check = preflight.check
    monkeypatch.setattr(
        snapshotter.preflight, "check", lambda *a, **named: announced.append(check(*a, **named))
    )
    config = {str(number): "x" * 1000 for number in range(300)}
    with pysnap.Snapshotter(tmp_path, x=torch.zeros(9), config=config, codec="none") as training:
        training.save().wait()
    (path,) = tmp_path.glob("step-*")
    taken = sum(file.stat().st_blocks * 512 for file in path.iterdir())
    assert 300_000 < taken <= announced[0].snapshot < taken + 100_000


def test_a_fresh_optimizer_counts_with_the_state_it_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotter, "available_memory", lambda: 10 * MB)
    net = torch.nn.Linear(1000, 1000, bias=False)
    parts = {"net": net, "optimizer": torch.optim.AdamW(net.parameters())}
    with pytest.raises(pysnap.ConfigError, match="staging needs 12"):
        pysnap.Snapshotter(tmp_path, **parts, host_memory="32MiB")
    parts["optimizer"] = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pysnap.Snapshotter(tmp_path, **parts, host_memory="32MiB").close()


# Writing, time, place


def test_a_directory_that_takes_no_bytes_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise pysnap.StorageError(errno.EDQUOT, f"writing {path} failed", str(path))

    opened = repository.Repository(tmp_path)
    monkeypatch.setattr(preflight.storage, "write_file", full)
    with pytest.raises(pysnap.StorageError, match="writing"):
        checked(opened)
    assert sorted(os.listdir(tmp_path)) == [".pysnap", ".writer"]
    opened.close()


def checked(
    opened: repository.Repository,
    cadence: str = "off",
    *,
    size: Size | None = None,
    metadata: int = 0,
) -> preflight.Forecast:
    return preflight.check(
        opened,
        size or Size(4 * MB, 4 * MB, 4 * MB),
        Keep(),
        Cadence.parse(cadence, "every"),
        encodes=False,
        improvements=False,
        free_memory=10**12,
        metadata=metadata,
    )


def test_what_describes_a_snapshot_takes_room_besides(tmp_path: Path) -> None:
    opened = repository.Repository(tmp_path)
    plain, described = checked(opened), checked(opened, metadata=MB)
    opened.close()
    assert described.snapshot == plain.snapshot + MB and described.peak == plain.peak + 4 * MB
    # Notes, directory and pages that are not full, beside packs and tree.
    assert plain.snapshot >= 4 * MB + 3 * 4096


def test_a_state_larger_than_the_test_takes_as_many_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moments = iter([100.0, 102.0])
    monkeypatch.setattr(preflight.time, "monotonic", lambda: next(moments))
    opened = repository.Repository(tmp_path)
    # The four times larger state takes 8 s, of which the step waits for what is not staged.
    whole = 4 * preflight._TEST_BYTES
    checked(opened, "7s", size=Size(stream=whole, disk=whole, staging=whole // 4))
    opened.close()
    staging, cadence = warnings_of(caplog)
    assert "waits for the disk, about 6s" in staging
    assert "due every 7s" in cadence and "about 8s" in cadence


def test_a_cadence_faster_than_the_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moments = iter([100.0, 107.5])
    monkeypatch.setattr(preflight.time, "monotonic", lambda: next(moments))
    opened = repository.Repository(tmp_path)
    checked(opened, "5s")
    opened.close()
    (told,) = warnings_of(caplog)
    assert "due every 5s" in told and "about 7.5s" in told
    assert sorted(os.listdir(tmp_path)) == [".pysnap", ".writer"]


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /home rw - nfs4 server:/home rw
31 30 254:1 / /home/me/with\\040blank rw - xfs /dev/vdb rw
32 22 0:30 / /dev/shm rw - tmpfs tmpfs rw
33 22 0:31 / /over rw - ext4 /dev/vdc rw
34 33 0:32 / /over rw - nfs4 server:/over rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/run", "ext4"),
        ("/home/me/run", "nfs4"),
        ("/homes/run", "ext4"),
        ("/home/me/with blank/run", "xfs"),
        ("/dev/shm", "tmpfs"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    for mounts in (MOUNTS, "\n".join(reversed(MOUNTS.splitlines()))):
        assert preflight.file_system(Path(path), mounts) == kind


def test_of_two_file_systems_at_one_place_the_one_that_was_mounted_last_is_seen() -> None:
    assert preflight.file_system(Path("/over/run"), MOUNTS) == "nfs4"


@pytest.mark.parametrize(("kind", "words"), [("nfs4", "network"), ("tmpfs", "in memory")])
def test_a_place_that_keeps_no_promise_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    words: str,
) -> None:
    monkeypatch.setattr(preflight, "file_system", lambda *_: kind)
    pysnap.Snapshotter(tmp_path, values={"a": 1}).close()
    (told,) = warnings_of(caplog)
    assert words in told and kind in told


@pytest.mark.parametrize(
    ("argument", "environment", "words"),
    [
        (None, {}, ": off (from default)"),
        (200, {}, ": every 200 steps (from argument)"),
        (200, {"PYSNAP_EVERY": "off"}, ": off (from PYSNAP_EVERY)"),
        (200, {"PYSNAP_EVERY": "1%, 1h"}, "pays for (from PYSNAP_EVERY)"),
        ("auto", {}, ", at a failure every 6h (from argument)"),
        ("auto", {"PYSNAP_MTBF": "45m"}, ", at a failure every 45m of PYSNAP_MTBF (from argument)"),
    ],
)
def test_the_first_line_of_the_log_is_the_rule_in_force_and_where_it_came_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    argument: str | int | None,
    environment: dict[str, str],
    words: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO, "pysnap")
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every=argument):
        first = caplog.messages[0]
    assert first.startswith(f"snapshots to {tmp_path}: ") and first.endswith(words)


def test_the_first_line_tells_the_rule_and_the_second_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYSNAP_EVERY", "auto")
    monkeypatch.setenv("PYSNAP_MTBF", "45m")
    monkeypatch.setattr(preflight, "file_system", lambda *_: "nfs")
    caplog.set_level(logging.INFO, "pysnap")
    pysnap.Snapshotter(tmp_path, values=values(), every="1 step").close()
    first, *rest = [one.getMessage() for one in caplog.records]
    assert "as often as loses least work, at a failure every 45m of PYSNAP_MTBF" in first
    assert "from PYSNAP_EVERY" in first
    assert any("4.0" in line and "on disk" in line and "at most" in line for line in rest)
