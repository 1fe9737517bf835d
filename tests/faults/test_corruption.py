"""P4: what is damaged on disk is found by every reader, named, and never returned.

Damage is made in place, one thing at a time, and put back. The truth is the state in memory, and
the places of tensors as the independent reader worked them out before anything was damaged.

The digest of a chunk is that of its raw bytes. A zstd frame has bits that change nothing when it is
decoded, such as those that fill its last byte: to flip one is not found, and harms nothing. Each
such trial is checked to give what was saved, in every reader, and they must be few.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Count
from damage import (
    Saved,
    assert_found,
    assert_intact,
    assert_loads,
    assert_reader_reads,
    changed,
    copy_of,
    flipped,
    refusal,
    small_state,
    state_of_all_encodings,
)
from reference_writer import Writer
from support import assert_same

import pysnap
from pysnap import reader
from pysnap.manifest import ENCODINGS
from pysnap.notes import Notes
from pysnap.reader import ReaderError
from pysnap.repository import Snapshot
from pysnap.verify import verify_repository, verify_snapshot

HARNESS = "corruption"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of a few pages is read sooner so. The tests of restore use more."""
    monkeypatch.setattr("pysnap.restore._MOST_THREADS", 1)


def save(path: Path, state: dict[str, object], chunk_size: str) -> Saved:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYSNAP_CODEC", "fast")
        environment.setenv("PYSNAP_CHUNK_SIZE", chunk_size)
        return Saved(pysnap.save(path, state), state)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A snapshot with chunks of every encoding."""
    saved = save(tmp_path_factory.mktemp("every") / "s", state_of_all_encodings(), "16KiB")
    assert {chunk[5] for chunk in saved.manifest["chunks"]} == set(ENCODINGS)
    return saved


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A snapshot with a pack of two pages."""
    saved = save(tmp_path_factory.mktemp("small") / "s", small_state(), "4KiB")
    assert len(saved.files["0.pack"]) == 2 * 4096
    return saved


def several_packs(path: Path, seed: int) -> Saved:
    """A snapshot of three packs of the same length."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"t{n}": torch.randn(1024, generator=generator) for n in range(6)}
    writer = Writer(chunk_size=4096, packs=3, encoding="raw")
    for tensor in state.values():
        writer.add(tensor.numpy().tobytes(), "float32", [1024])
    writer.write(path, {f"t{n}": {"$tensor": n} for n in range(6)})
    return Saved(path, state)


def check_flip(saved: Saved, pack: str, bit: int) -> bool:
    """One flipped bit of a pack: the tensors of its chunk cannot be read. False where it is one
    of an encoding that says nothing, and everything reads as it was saved."""
    names = saved.tensors_at(pack, bit // 8, bit // 8 + 1)
    with flipped(saved.path / pack, bit):
        try:
            pysnap.load(saved.path)
        except pysnap.CorruptError as error:
            message = str(error)
        else:
            assert saved.is_encoded(pack, bit // 8)
            assert_loads(saved)
            # Its zstd is another one, and may ask for more.
            with contextlib.suppress(ReaderError):
                assert_reader_reads(saved)
            return False
        assert pack in message and any(name in message for name in names), message
        view = pysnap.open(saved.path)
        assert pack in refusal(lambda: view[names[0]][...], pysnap.CorruptError)
        arrays = reader.read_snapshot(saved.path).tensors()
        assert pack in refusal(lambda: arrays[names[0]], ReaderError)
    return True


def check_flips(saved: Saved, pack: str, bits: Iterable[int], count: Count) -> None:
    found = [check_flip(saved, pack, bit) for bit in bits]
    assert found.count(False) <= len(found) / 100
    count(len(found))
    assert_intact(saved)


# Bits.


def test_every_bit_of_a_manifest(small: Saved, count: Count) -> None:
    file = small.path / "manifest.json"
    for bit in range(8 * len(small.files["manifest.json"])):
        with flipped(file, bit):
            for message in (
                refusal(lambda: Snapshot.open(small.path), pysnap.CorruptError),
                refusal(lambda: reader.read_snapshot(small.path), ReaderError),
            ):
                assert "manifest.json" in message
            if bit % 97 == 0:
                assert_found(small, "manifest.json", [])
        count()
    assert_intact(small)


def test_every_bit_of_a_small_pack(small: Saved, count: Count, full: bool) -> None:
    bits = 8 * len(small.files["0.pack"])
    check_flips(small, "0.pack", range(0, bits, 1 if full else 41), count)


def test_random_bits_of_every_encoding(every: Saved, count: Count, full: bool) -> None:
    """Also in the zeros behind a chunk."""
    bits = 8 * len(every.files["0.pack"])
    check_flips(
        every, "0.pack", random.Random(0).sample(range(bits), 20_000 if full else 5000), count
    )


def test_the_first_and_the_last_bits_of_every_chunk(every: Saved, count: Count, full: bool) -> None:
    """Headers, the end of an encoding, the first and the last zero behind it."""
    places = set()
    for _, offset, stored, *_ in every.manifest["chunks"]:
        behind = offset + -(-stored // 4096) * 4096
        places |= {
            offset,
            offset + 4,
            offset + stored - 1,
            min(offset + stored, behind - 1),
            behind - 1,
        }
    bits = [8 * place + bit for place in sorted(places) for bit in range(8)]
    check_flips(every, "0.pack", bits if full else bits[::4], count)


def test_verifying_lists_every_damaged_tensor_of_random_damage(
    every: Saved, count: Count, full: bool
) -> None:
    pack = every.path / "0.pack"
    data = every.files["0.pack"]
    chance = random.Random(1)
    for _ in range(600 if full else 60):
        places = [chance.randrange(len(data)) for _ in range(chance.randrange(1, 30))]
        damaged = bytearray(data)
        expected: set[str] = set()
        for place in set(places):
            damaged[place] ^= chance.randrange(1, 256)
            expected.update(every.tensors_at("0.pack", place, place + 1))
        with changed(pack, bytes(damaged)):
            verdict = verify_snapshot(every.path)
            assert verdict.damaged == [name for name in every.arrays if name in expected]
            findings = reader.verify(every.path)
            assert len(findings) == len(verdict.problems)
        count(len(places))
    assert_intact(every)


# Lengths.


def test_every_truncation_of_a_manifest(small: Saved, count: Count) -> None:
    data = small.files["manifest.json"]
    for length in range(len(data)):
        with changed(small.path / "manifest.json", data[:length]):
            for message in (
                refusal(lambda: Snapshot.open(small.path), pysnap.CorruptError),
                refusal(lambda: reader.read_snapshot(small.path), ReaderError),
            ):
                assert "manifest.json" in message
        count()


def test_every_truncation_of_a_pack(small: Saved, count: Count, full: bool) -> None:
    data = small.files["0.pack"]
    for length in range(0, len(data), 1 if full else 31):
        with changed(small.path / "0.pack", data[:length]):
            message = refusal(lambda: pysnap.load(small.path), pysnap.CorruptError)
            assert "0.pack" in message and str(length) in message
            assert "0.pack" in refusal(lambda: reader.read_snapshot(small.path), ReaderError)
        count()
    with changed(small.path / "0.pack", data[:4096]):
        assert_found(small, "0.pack", list(small.arrays))


@pytest.mark.parametrize("file", ["manifest.json", "0.pack"])
def test_appended_bytes(small: Saved, count: Count, file: str) -> None:
    data = small.files[file]
    for more in (b"\0", b"}", b"\n", b" ", bytes(4096), data, data[-4096:], bytes(2**20)):
        with changed(small.path / file, data + more):
            assert_found(small, file, [] if file == "manifest.json" else list(small.arrays))
        with changed(small.path / file, more + data):
            assert_found(small, file, [] if file == "manifest.json" else list(small.arrays))
        count(2)
    assert_intact(small)


# Pages, as disks lose them.


def lost(page: bytes, other: bytes) -> Iterator[bytes]:
    """What a disk may give in place of a page that is not all zero."""
    yield bytes(len(page))
    yield b"\xff" * len(page)
    yield other
    yield page[1:] + page[:1]
    yield page[:512] + bytes(len(page) - 512)
    yield bytes(512) + page[512:]


def test_pages_that_are_lost_stale_or_misplaced(every: Saved, count: Count, full: bool) -> None:
    data = every.files["0.pack"]
    pages = range(0, len(data), 4096)
    for start in pages if full else pages[::3]:
        page = data[start : start + 4096]
        other_start = (start + 4096) % len(data)
        other = data[other_start : other_start + 4096]
        names = every.tensors_at("0.pack", start, start + 4096)
        for replaced in lost(page, other):
            if replaced == page:
                continue
            with changed(every.path / "0.pack", data[:start] + replaced + data[start + 4096 :]):
                verdict = verify_snapshot(every.path)
                assert verdict.damaged == names
                refusal(lambda: pysnap.load(every.path), pysnap.CorruptError)
                assert len(reader.verify(every.path)) == len(verdict.problems)
            count()
    assert_intact(every)


# Files.


def test_missing_files(small: Saved, count: Count) -> None:
    with changed(small.path / "0.pack", None):
        for read in (pysnap.load, lambda path: pysnap.open(path)["noise"][...]):
            message = refusal(lambda read=read: read(small.path), pysnap.StorageError)
            assert "0.pack" in message
        assert "0.pack" in refusal(lambda: reader.read_snapshot(small.path), ReaderError)
        assert verify_snapshot(small.path).damaged == list(small.arrays)
        assert verify_snapshot(small.path).missing == ["0.pack"]
    with changed(small.path / "manifest.json", None):
        for read in (pysnap.load, pysnap.open, verify_snapshot):
            refusal(lambda read=read: read(small.path), pysnap.NotFoundError)
        assert "manifest.json" in refusal(lambda: reader.read_snapshot(small.path), ReaderError)
    count(2)
    assert_intact(small)


def test_extra_files(small: Saved, count: Count) -> None:
    for name in ("1.pack", "00.pack", "manifest.json.bak", ".hidden", "notes.json~"):
        with changed(small.path / name, small.files["0.pack"]):
            assert_intact(small)
            assert verify_snapshot(small.path).extra == [name]
        count()


def test_packs_that_are_swapped_or_duplicated(tmp_path: Path, count: Count) -> None:
    saved = several_packs(tmp_path / "s", 0)
    assert_intact(saved)
    for first in saved.packs:
        for second in saved.packs:
            if first == second:
                continue
            hit = saved.tensors_at(first, 0, 2**20)
            with changed(saved.path / first, saved.files[second]):
                assert_found(saved, first, hit)
                both = [*hit, *saved.tensors_at(second, 0, 2**20)]
                with changed(saved.path / second, saved.files[first]):
                    assert_found(saved, ".pack", sorted(both))
            count(2)
    assert_intact(saved)


def test_files_of_another_snapshot(tmp_path: Path, count: Count) -> None:
    """Of the same run, so that shapes and lengths are the same."""
    here, there = several_packs(tmp_path / "a", 1), several_packs(tmp_path / "b", 2)
    for name in here.packs:
        with changed(here.path / name, there.files[name]):
            assert_found(here, name, here.tensors_at(name, 0, 2**20))
        count()
    with changed(here.path / "manifest.json", there.files["manifest.json"]):
        assert_found(here, "0.pack", list(here.arrays))
    count()
    for name in here.packs:
        (here.path / name).write_bytes(there.files[name])
    assert_found(here, "0.pack", list(here.arrays))
    # All of it is that snapshot under another name.
    (here.path / "manifest.json").write_bytes(there.files["manifest.json"])
    assert_intact(Saved(here.path, there.state))
    count(2)


# Repositories.


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """A run of three snapshots, and the values at each, oldest first."""
    values = {"w": torch.zeros(3000), "h": torch.zeros(500, dtype=torch.bfloat16)}
    truth = []
    with pysnap.Snapshotter(
        tmp_path / "run", every="off", keep=pysnap.Keep(last=3), values=values
    ) as snapshotter:
        for step in range(3):
            with snapshotter.step():
                values["w"] += torch.randn(3000)
                values["h"] += step + 1
            snapshotter.save(tag=f"t{step}").wait()
            truth.append({name: tensor.clone() for name, tensor in values.items()})
    return tmp_path / "run", truth


def resumed(root: Path) -> dict[str, torch.Tensor]:
    values = {"w": torch.full((3000,), 7.0), "h": torch.zeros(500, dtype=torch.bfloat16)}
    with pysnap.Snapshotter(root, every="off", values=values) as snapshotter:
        snapshotter.resume()
    return values


def flip_in(name: str, place: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 16
        (path / name).write_bytes(data)

    return damage


def cut(name: str, place: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, int(place * (path / name).stat().st_size))


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"manifest bit at {p}": flip_in("manifest.json", p) for p in (0, 0.02, 0.3, 0.7, 1)},
    **{f"pack bit at {p}": flip_in("0.pack", p) for p in (0, 0.3, 0.7, 1)},
    **{f"manifest cut at {p}": cut("manifest.json", p) for p in (0, 0.5, 0.99)},
    **{f"pack cut at {p}": cut("0.pack", p) for p in (0, 0.5, 0.99)},
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "no pack": lambda path: (path / "0.pack").unlink(),
    "empty directory": lambda path: (shutil.rmtree(path), path.mkdir()),
    "a file in its place": lambda path: (shutil.rmtree(path), path.write_bytes(b"x")),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("newest", [1, 2])
def test_resume_and_load_go_to_the_next_older_intact_snapshot_and_say_so(
    repository: tuple[Path, list[dict[str, torch.Tensor]]],
    count: Count,
    caplog: pytest.LogCaptureFixture,
    name: str,
    newest: int,
) -> None:
    """`newest` snapshots are damaged."""
    root, truth = repository
    damaged = [f"step-{step:09}" for step in (3, 2)[:newest]]
    for snapshot in damaged:
        DAMAGES[name](root / snapshot)
    expected = truth[2 - newest]
    for read in (lambda: resumed(root), lambda: pysnap.load(root)["values"]):
        caplog.clear()
        assert_same(read(), expected)
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        for snapshot in damaged:
            assert any(snapshot in warning for warning in warnings), warnings
        assert not any("step-000000001" in warning[:60] for warning in warnings)
        count()
    verdict = verify_repository(root)
    assert {found.path.name for found in verdict.snapshots if not found.intact} == set(damaged)
    count()


def test_two_snapshots_whose_files_were_exchanged(
    repository: tuple[Path, list[dict[str, torch.Tensor]]], count: Count
) -> None:
    """Both are damaged; the one between them is the newest intact one."""
    root, truth = repository
    first, last = root / "step-000000001", root / "step-000000003"
    for name in ("0.pack", "manifest.json"):
        (first / name).rename(root / name)
        (last / name).rename(first / name)
        (root / name).rename(last / name)
        if name == "0.pack":
            assert_same(resumed(root), truth[1])
            assert_same(pysnap.load(root)["values"], truth[1])
            verdict = verify_repository(root)
            assert [found.intact for found in verdict.snapshots] == [False, True, False]
        else:
            # Now they are whole again, under each other's name.
            assert_same(resumed(root), truth[2])
            assert_same(pysnap.load(first)["values"], truth[2])
            assert len(verify_repository(root).remarks) == 2
        count(2)


def test_where_none_is_intact_nothing_is_returned(
    repository: tuple[Path, list[dict[str, torch.Tensor]]], count: Count
) -> None:
    root, _ = repository
    for path in root.glob("step-*"):
        flip_in("0.pack", 0)(path)
    for read in (lambda: resumed(root), lambda: pysnap.load(root)):
        message = refusal(read, pysnap.CorruptError)
        assert all(f"step-{step:09}" in message for step in (1, 2, 3))
        count()


def test_a_copy_under_another_name_is_the_snapshot_that_it_was(
    repository: tuple[Path, list[dict[str, torch.Tensor]]], count: Count
) -> None:
    """A name says nothing: what counts stands in the manifest."""
    root, truth = repository
    for name in ("step-000000009", "step-000000000", "step-000000001.7"):
        copy_of(root / "step-000000001", root / name)
        assert_same(resumed(root), truth[2])
        assert_same(pysnap.load(root)["values"], truth[2])
        assert_same(pysnap.load(root / name)["values"], truth[0])
        verdict = verify_repository(root)
        assert verdict.intact and any(name in remark for remark in verdict.remarks)
        shutil.rmtree(root / name)
        count(3)
    # The newest one is gone: its copy is as good.
    (root / "step-000000003").rename(root / "step-000000000")
    assert_same(resumed(root), truth[2])
    count()


def test_every_bit_of_the_header(
    repository: tuple[Path, list[dict[str, torch.Tensor]]], count: Count
) -> None:
    root, truth = repository
    header = root / ".pysnap"
    for bit in range(8 * header.stat().st_size):
        with flipped(header, bit):
            try:
                state = pysnap.load(root)
            except (pysnap.CorruptError, pysnap.FormatError) as error:
                assert str(root) in str(error)
            else:
                assert_same(state["values"], truth[2])
            # Each snapshot is readable without it.
            assert all(found.intact for found in verify_repository(root).snapshots)
        count()
    for length in range(header.stat().st_size):
        with changed(header, header.read_bytes()[:length]):
            assert str(root) in refusal(lambda: pysnap.load(root), pysnap.CorruptError)
        count()


def test_every_bit_of_the_notes(
    repository: tuple[Path, list[dict[str, torch.Tensor]]], count: Count
) -> None:
    """They have no digest: a bit may make another tag, but nothing else, and harms no tensor."""
    root, truth = repository
    path = root / "step-000000003"
    file = path / "notes.json"
    for bit in range(8 * file.stat().st_size):
        with flipped(file, bit):
            try:
                notes = Notes.read(path)
            except pysnap.CorruptError as error:
                assert str(file) in str(error)
                assert any("notes.json" in remark for remark in verify_snapshot(path).remarks)
            else:
                assert all(type(tag) is str for tag in notes.tags) and type(notes.pinned) is bool
            if bit % 8 == 0:
                assert verify_snapshot(path).intact
                assert_same(pysnap.load(path)["values"], truth[2])
        count()
