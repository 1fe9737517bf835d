"""What an attacker wrote is refused with an error of pysnap, for a small price; one test for each
way that once worked."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from reference_writer import Writer, manifest_bytes
from support import Run, assert_same

import pysnap
from pysnap import reader, rng, tree
from pysnap.notes import Notes
from pysnap.repository import Snapshot
from pysnap.storage import WriterLock


def rewrite(path: Path, change: Any) -> None:
    """Change the manifest of a snapshot, and its digest."""
    file = path / "manifest.json"
    snapshot = json.loads(file.read_bytes())["snapshot"]
    change(snapshot)
    file.write_bytes(manifest_bytes(snapshot))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return pysnap.save(tmp_path / "s", {"w": torch.arange(2000.0), "a": np.arange(9)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A repository with two snapshots of a run."""
    small = Run()
    with pysnap.Snapshotter(tmp_path / "run", every="off", **small.parts) as snapshotter:
        for _ in small.train(snapshotter, epochs=1):
            if snapshotter.progress.step in (2, 4):
                snapshotter.save().wait()
    return tmp_path / "run"


def refused(path: Path, match: str) -> None:
    for read in (pysnap.load, pysnap.open):
        with pytest.raises(pysnap.CorruptError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)
    with pytest.raises(reader.ReaderError):
        reader.read_snapshot(path)


# Manifests.


@pytest.mark.parametrize("raw", [7999, 8001])
def test_a_chunk_of_broken_elements_is_damage(tmp_path: Path, raw: int) -> None:
    """It was told as a setting that is wrong."""
    writer = Writer(encoding="raw")
    writer.add(bytes(8000), "float32", [2000])
    path = tmp_path / "s"
    writer.write(path, {"w": {"$tensor": 0}})
    chunk = {"stream": raw, "tensors": [], "tree": None}
    row = [0, 0, raw, raw, "f32", "raw", "0" * 32]
    rewrite(path, lambda s: s.update(chunk, chunks=[row]))
    refused(path, "whole elements")


@pytest.mark.parametrize("name", ["step", "sequence"])
def test_numbers_that_no_other_language_holds(saved: Path, name: str) -> None:
    rewrite(saved, lambda s: s.update({name: 2**63}))
    refused(saved, name)


@pytest.mark.parametrize(
    "dtype", ["O", "|O", "<f4,<f4", "(2,)<f4", "|V0", "<U999999999", "float33", "<M8[xx]", ""]
)
def test_a_dtype_that_is_none(saved: Path, dtype: str) -> None:
    """NumPy parsed whatever stood there."""
    rewrite(saved, lambda s: s["tensors"][1].update(dtype=dtype))
    refused(saved, "dtype|past the end")


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**40, 2**40], [2**62, 0, 4]])
def test_a_shape_without_elements_whose_product_overflows(saved: Path, shape: list[int]) -> None:
    """`load` raised a ValueError of NumPy."""
    rewrite(saved, lambda s: s["tensors"][1].update(shape=shape, at=0))
    refused(saved, "too large")


def test_strides_of_one_element_that_overflow(saved: Path) -> None:
    """`load` raised an OverflowError of NumPy."""
    rewrite(saved, lambda s: s["tensors"][1].update(shape=[1, 9], strides=[2**62, 1]))
    assert pysnap.load(saved)["a"].tolist() == [list(range(9))]
    assert pysnap.open(saved)["a"][0, 3] == 3


def test_packs_that_lie_about_their_length_cost_no_memory(saved: Path) -> None:
    """Memory for all that the manifest claims was allocated before a pack was looked at."""
    size = 2**26
    count = 2**14

    def claim(snapshot: dict[str, Any]) -> None:
        row = [0, 0, 4096, size, "u8", "planes", "0" * 32]
        snapshot["chunk_size"] = size
        snapshot["packs"][0]["size"] = count * 4096
        snapshot["chunks"] = [[0, index * 4096, *row[2:]] for index in range(count)]
        snapshot["stream"] = size * count
        snapshot["tensors"] = [{"dtype": "uint8", "shape": [size * count], "at": 0}] * 2

    rewrite(saved, claim)
    rewrite(saved, lambda s: s.update(tree={"w": {"$tensor": 0}}))
    for read in (pysnap.load, lambda path: pysnap.open(path)["w"][...]):
        with pytest.raises(pysnap.CorruptError, match=r"0\.pack: it has"):
            read(saved)


def test_more_than_there_is_memory_for_is_an_error_of_pysnap(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a RuntimeError of torch."""

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(pysnap.Error, match=f"no memory for 8000 bytes of {saved}"):
        pysnap.load(saved)


def test_arrays_over_the_same_bytes_share_memory(tmp_path: Path) -> None:
    """Each got a copy of its own: a small snapshot could claim any amount of memory."""
    writer = Writer()
    values = np.arange(1000, dtype="<i4")
    writer.add(values.tobytes(), "<i4", [1000])
    writer.alias(0, "<i4", [1000])
    writer.alias(4, "<i4", [10], strides=[3])
    writer.write(tmp_path / "s", [{"$array": index} for index in range(3)])
    first, second, third = pysnap.load(tmp_path / "s")
    assert np.shares_memory(first, second) and np.shares_memory(first, third)
    np.testing.assert_array_equal(second, values)
    np.testing.assert_array_equal(third, values[1:31:3])


@pytest.mark.parametrize("plane", [(1, b"a"), (2, zstandard.compress(b""))])
def test_planes_of_nothing_that_are_encoded(tmp_path: Path, plane: tuple[int, bytes]) -> None:
    """The engine took what the format does not allow, and the other reader refused."""
    method, payload = plane
    raw = bytes(4096)
    entry = struct.pack("<BBBBI", method, 0, 0, 0, len(payload))
    stored = struct.pack("<BBHI", 1, 1, 0, 0) + bytes(8) + entry + payload
    writer = Writer(encoding="raw")
    writer.add(raw, "uint8", [4096])
    path = tmp_path / "s"
    writer.write(path, {"x": {"$tensor": 0}})
    (path / "0.pack").write_bytes(stored + bytes(4096 - len(stored)))

    def encoded(snapshot: dict[str, Any]) -> None:
        snapshot["chunks"][0][2] = len(stored)
        snapshot["chunks"][0][5] = "planes"

    rewrite(path, encoded)
    with pytest.raises(pysnap.CorruptError, match="cannot be decoded"):
        pysnap.load(path)
    with pytest.raises(reader.ReaderError):
        reader.read_snapshot(path).tree()


def test_views_of_bytes_that_are_not_aligned_to_the_first(tmp_path: Path) -> None:
    """A state that could be saved was refused when it was loaded."""
    memory = torch.arange(32, dtype=torch.uint8)
    state = {"bytes": memory[1:20], "words": memory[4:12].view(torch.int32)}
    path = pysnap.save(tmp_path / "s", state)
    loaded = pysnap.load(path)
    assert_same(loaded, state)
    assert (
        loaded["bytes"].untyped_storage().data_ptr() == loaded["words"].untyped_storage().data_ptr()
    )
    np.testing.assert_array_equal(reader.read_snapshot(path).tensors()["words"], state["words"])
    rewrite(path, lambda s: s["tensors"].append({"dtype": "int16", "shape": [2], "at": 2}))
    with pytest.raises(pysnap.CorruptError, match="parts of an element"):
        pysnap.load(path)
    with pytest.raises(reader.ReaderError, match="parts of an element"):
        reader.read_snapshot(path)


def test_names_of_tensors_cannot_write_into_a_log(tmp_path: Path) -> None:
    name = "w\n2030-01-01 ERROR \x1b[2Jall is lost\u202e"
    path = pysnap.save(tmp_path / "s", {name: torch.arange(100.0)})
    with (path / "0.pack").open("r+b") as file:
        file.write(b"\xff")
    for read in (pysnap.load, lambda path: pysnap.open(path)[name][...]):
        with pytest.raises(pysnap.CorruptError) as caught:
            read(path)
        assert str(caught.value).isprintable() and "all is lost" in str(caught.value)
    assert repr(pysnap.open(path)[name]).isprintable()


def test_a_message_does_not_repeat_a_megabyte(saved: Path) -> None:
    rewrite(saved, lambda s: s.update(id=["x" * 2**20]))
    with pytest.raises(pysnap.CorruptError) as caught:
        pysnap.load(saved)
    assert len(str(caught.value)) < 1000


def test_a_tensor_without_elements_stands_anywhere_for_both_readers(saved: Path) -> None:
    rewrite(saved, lambda s: s["tensors"][1].update(shape=[0, 3], at=10**9))
    assert pysnap.load(saved)["a"].shape == (0, 3)
    assert reader.read_snapshot(saved).tensors()["a"].shape == (0, 3)


def test_reading_a_small_manifest_asks_for_little_memory(saved: Path) -> None:
    """Room for the largest one, a gibibyte, was allocated and given back each time."""
    for read in (Snapshot.open, reader.read_snapshot):
        read(saved)
        tracemalloc.start()
        read(saved)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20, read


# Headers, notes and the lock.


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 4000,
        b'{"pysnap": "repository", "format": true}',
        b'{"pysnap": "repository", "format": 1.0}',
        b"\xff",
        b"[]",
        b"",
    ],
)
def test_a_header_that_is_none(run: Path, header: bytes) -> None:
    """4000 brackets raised a RecursionError, and `true` was format 1."""
    (run / ".pysnap").write_bytes(header)
    with pytest.raises((pysnap.CorruptError, pysnap.FormatError), match="run"):
        pysnap.load(run)


def test_a_format_of_4000_digits_is_told_in_short(run: Path) -> None:
    (run / ".pysnap").write_bytes(b'{"pysnap": "repository", "format": %s}' % (b"9" * 4000))
    with pytest.raises(pysnap.FormatError) as caught:
        pysnap.load(run)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b'{"tags": "abc"}', b'{"tags": {"a": 1}}', b"[" * 10**5])
def test_notes_with_tags_of_another_type(tmp_path: Path, content: bytes) -> None:
    """The letters of a text were taken for tags."""
    (tmp_path / "notes.json").write_bytes(content)
    with pytest.raises(pysnap.CorruptError, match=r"notes\.json is damaged"):
        Notes.read(tmp_path)


def test_the_lock_overwrites_no_file_that_has_another_name(tmp_path: Path) -> None:
    """A hard link to a file of the user's was cut to nothing."""
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    os.link(precious, tmp_path / ".writer")
    with pytest.raises(pysnap.StorageError, match=r"\.writer"):
        WriterLock(tmp_path / ".writer")
    assert precious.read_text() == "years of work"


def test_a_pipe_in_place_of_the_lock_leaves_no_file_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".writer")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(pysnap.StorageError, match=r"\.writer"):
        WriterLock(tmp_path / ".writer")
    assert os.listdir("/proc/self/fd") == before


def test_the_holder_of_the_lock_cannot_write_into_a_log(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path / ".writer")
    (tmp_path / ".writer").write_bytes(b"process 1\n\x1b[2J\xff")
    with pytest.raises(pysnap.BusyError) as caught:
        WriterLock(tmp_path / ".writer")
    lock.release()
    assert str(caught.value).isprintable()


# Repositories.


def test_a_snapshot_that_is_a_link_out_of_the_repository_is_not_followed(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.move(run / "step-000000004", tmp_path / "elsewhere")
    (run / "step-000000004").symlink_to(tmp_path / "elsewhere")
    assert pysnap.open(run).step == 2
    assert "step-000000004 is a link" in caplog.text
    # Who names a link means what it leads to.
    assert pysnap.open(run / "step-000000004").step == 4


def test_what_is_left_of_a_writer_cannot_write_into_a_log(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / ".partial-a\nb\x1b[2J" / "folder").mkdir(parents=True)
    pysnap.Snapshotter(run, every="off", x=torch.zeros(1)).close()
    assert "stays" in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_a_configuration_cannot_write_into_a_log_nor_nest_too_deep(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Deep nesting raised a RecursionError in resume()."""
    deep: Any = 1
    for _ in range(800):
        deep = {"d": deep}
    for config in ({"a\nb\x1b[2J": 1}, deep):
        for name in ("step-000000002", "step-000000004"):
            rewrite(run / name, lambda s, config=config: s["metadata"].update(config=config))
        small = Run()
        caplog.clear()
        with pysnap.Snapshotter(run, every="off", config={"lr": 1}, **small.parts) as snapshotter:
            snapshotter.resume()
        assert "the configuration is not that of" in caplog.text
        assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize("cuda", [5, None, [5], ["x"], [{}]])
def test_random_states_of_devices_that_are_none(cuda: Any) -> None:
    """It was a TypeError, or silently passed over."""
    state = rng.capture() | {"cuda": cuda}
    with pytest.raises(pysnap.CorruptError, match="random states"):
        rng.restore(state)


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu", "meta", "hpu", "privateuseone", "vulkan"])
def test_a_generator_of_a_device_that_is_not_here(device: str) -> None:
    node: tree.Json = {"$generator": {"device": f"{device}:0", "state": ""}}
    with pytest.raises((pysnap.MismatchError, pysnap.CorruptError)):
        tree.decode(node, lambda index: torch.zeros(1))
