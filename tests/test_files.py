"""pysnap.save and pysnap.load: what goes in comes out, by the engine and by the independent
reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_writer import Writer
from support import assert_same, bits, flip

import pysnap
from pysnap import files, reader
from pysnap.dtypes import TORCH_ELEMENTS
from pysnap.repository import Snapshot
from pysnap.restore import Restore

ALL_DTYPES = [getattr(torch, name) for name in TORCH_ELEMENTS if hasattr(torch, name)]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits as a tensor: every value of the type occurs, nan payloads too."""
    count = int(np.prod(shape))
    raw = torch.randint(
        0,
        256,
        (count * dtype.itemsize,),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(3),
    )
    return (
        (raw % 2).bool().reshape(shape) if dtype is torch.bool else raw.view(dtype).reshape(shape)
    )


@pytest.mark.filterwarnings("ignore:ComplexHalf")  # torch warns of complex32 wherever it is made
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, 7, 33)
    loaded = pysnap.load(pysnap.save(tmp_path / "s", {"x": tensor}))["x"]
    assert loaded.dtype == dtype and loaded.shape == (7, 33)
    assert bits(loaded) == bits(tensor)
    assert reader.read_snapshot(tmp_path / "s").tensors()["x"].tobytes() == bits(tensor)


@pytest.mark.parametrize("codec", ["auto", "none", "fast", "small"])
def test_the_independent_reader_sees_the_same_values(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_CODEC", codec)
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "64KiB")
    generator = torch.Generator().manual_seed(0)
    state = {
        "weights": torch.randn(300, 200, generator=generator),
        "half": torch.randn(100_000, generator=generator).bfloat16(),
        "rows": torch.zeros(5000, 16).index_fill_(0, torch.arange(0, 5000, 7), 1.5),
        "tokens": torch.randint(0, 50_000, (40_000,), generator=generator),
        "constant": torch.full((30_000,), 3, dtype=torch.int16),
        "noise": random_tensor(torch.uint8, 70_000),
        "array": np.linspace(0, 1, 9999),
    }
    path = pysnap.save(tmp_path / "s", state)
    assert_same(pysnap.load(path), state)
    assert reader.verify(path) == []
    read = reader.read_snapshot(path).tensors()
    for name, value in state.items():
        expected = value.tobytes() if isinstance(value, np.ndarray) else bits(value)
        assert read[name].tobytes() == expected, name
    chunks = reader.read_snapshot(path).manifest["chunks"]
    encodings = {row[5] for row in chunks}
    assert encodings == ({"raw"} if codec == "none" else {"raw", "planes"})
    assert all(row[1] % 4096 == 0 and row[2] <= row[3] for row in chunks)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    embedding = torch.nn.Embedding(1000, 64)
    head = torch.nn.Linear(64, 1000, bias=False)
    head.weight = embedding.weight
    state = torch.nn.ModuleDict({"embedding": embedding, "head": head}).state_dict()
    path = pysnap.save(tmp_path / "s", state)
    assert reader.read_snapshot(path).manifest["stream"] == 1000 * 64 * 4
    loaded = pysnap.load(path)
    assert loaded["embedding.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    loaded["embedding.weight"][0, 0] = 42.0
    assert loaded["head.weight"][0, 0] == 42.0


def test_views_of_one_tensor_are_views_again(tmp_path: Path) -> None:
    base = torch.arange(100, dtype=torch.float32)
    loaded = pysnap.load(
        pysnap.save(tmp_path / "s", {"head": base[:60], "tail": base[40:], "all": base})
    )
    assert_same(loaded, {"head": base[:60], "tail": base[40:], "all": base})
    loaded["all"][50] = -1
    assert loaded["head"][50] == -1 and loaded["tail"][10] == -1


def test_separate_tensors_do_not_share_memory_after_load(tmp_path: Path) -> None:
    loaded = pysnap.load(pysnap.save(tmp_path / "s", [torch.zeros(4), torch.zeros(4)]))
    assert loaded[0].untyped_storage().data_ptr() != loaded[1].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24.0).reshape(4, 6)[:, ::2],
        torch.arange(48.0).reshape(2, 3, 4, 2).contiguous(memory_format=torch.channels_last),
        torch.tensor(3.0).expand(5, 2),
        torch.arange(4.0)[1:3],
        torch.zeros(0, 5),
        torch.tensor(7),
        torch.complex(torch.ones(3), torch.arange(3.0)).conj(),
        torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag,
    ],
    ids=[
        "transposed",
        "gaps",
        "channels-last",
        "expanded",
        "slice",
        "empty",
        "scalar",
        "conjugate",
        "negative",
    ],
)
def test_tensors_of_any_layout(tmp_path: Path, tensor: torch.Tensor) -> None:
    loaded = pysnap.load(pysnap.save(tmp_path / "s", tensor))
    assert_same(loaded, tensor.resolve_conj().resolve_neg())


def test_strides_of_a_dense_tensor_are_kept(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert pysnap.load(pysnap.save(tmp_path / "s", tensor)).stride() == tensor.stride()


def test_optimizer_state_with_integer_keys(tmp_path: Path) -> None:
    model = torch.nn.Linear(5, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert_same(
        pysnap.load(pysnap.save(tmp_path / "s", optimizer.state_dict())), optimizer.state_dict()
    )


def test_a_state_larger_than_the_staging_memory_streams_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "4KiB")
    monkeypatch.setenv("PYSNAP_HOST_MEMORY", "8KiB")
    state = {"x": torch.randn(50_000)}
    assert_same(pysnap.load(pysnap.save(tmp_path / "s", state)), state)


def test_an_unsupported_object_is_named_by_its_path_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(pysnap.StateError, match="model/hook"):
        pysnap.save(tmp_path / "s", {"model": {"hook": lambda: None}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["directory", "file"])
def test_save_overwrites_nothing(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "s")
    with pytest.raises(pysnap.StorageError, match="exists"):
        pysnap.save(tmp_path / "s", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_save_into_a_missing_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(pysnap.StorageError, match="missing"):
        pysnap.save(tmp_path / "missing" / "s", {})


def test_a_flipped_bit_is_named_by_file_and_tensor(tmp_path: Path) -> None:
    path = pysnap.save(tmp_path / "s", {"first": torch.randn(10), "second": torch.arange(10)})
    chunks = reader.read_snapshot(path).manifest["chunks"]
    (offset,) = (row[1] for row in chunks if row[4] == "f32")
    flip(path / "0.pack", offset + 5)
    with pytest.raises(pysnap.CorruptError, match=r"0\.pack.*first"):
        pysnap.load(path)


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    path = pysnap.save(tmp_path / "s", {"x": torch.arange(3)})
    manifest = path / "manifest.json"
    for offset in range(manifest.stat().st_size):
        flip(manifest, offset, bit=offset % 8)
        with pytest.raises((pysnap.CorruptError, pysnap.FormatError)):
            pysnap.load(path)
        flip(manifest, offset, bit=offset % 8)
    assert_same(pysnap.load(path), {"x": torch.arange(3)})


def test_every_flipped_byte_of_a_pack_is_found(tmp_path: Path) -> None:
    path = pysnap.save(tmp_path / "s", {"x": torch.arange(300), "y": torch.randn(20)})
    pack = path / "0.pack"
    for offset in range(pack.stat().st_size):
        flip(pack, offset, bit=offset % 8)
        with pytest.raises(pysnap.CorruptError):
            pysnap.load(path)
        flip(pack, offset, bit=offset % 8)
    assert_same(pysnap.load(path)["x"], torch.arange(300))


@pytest.mark.parametrize("keep", [0, 1, 4095, 4096, -1])
def test_a_truncated_pack_is_found(tmp_path: Path, keep: int) -> None:
    path = pysnap.save(tmp_path / "s", {"x": torch.randn(5000)})
    data = (path / "0.pack").read_bytes()
    (path / "0.pack").write_bytes(data[:keep])
    with pytest.raises(pysnap.CorruptError, match=r"0\.pack"):
        pysnap.load(path)


def test_a_missing_pack_is_named(tmp_path: Path) -> None:
    path = pysnap.save(tmp_path / "s", {"x": torch.randn(5000)})
    (path / "0.pack").unlink()
    with pytest.raises(pysnap.StorageError, match=r"0\.pack"):
        pysnap.load(path)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [([500], [2]), ([1000, 1000], [0, 1]), ([3, 4], [1, 3]), ([7], [0])],
    ids=["gaps", "repeated rows", "transposed", "one element"],
)
def test_strides_of_a_manifest_do_not_lead_out_of_memory(
    tmp_path: Path, shape: list[int], strides: list[int]
) -> None:
    """A tensor of 1000x1000 that repeats one row of the stream was restored past the end of it, and
    an array with gaps past the end of its memory."""
    writer = Writer()
    values = np.arange(2000, dtype="<i4")
    writer.add(values.tobytes(), "int32", [2000])
    writer.alias(0, "int32", shape, strides=strides)
    writer.alias(0, "<i4", shape, strides=strides)
    writer.write(tmp_path / "s", [{"$tensor": 1}, {"$array": 2}])
    tensor, array = pysnap.load(tmp_path / "s")
    expected = torch.from_numpy(values).as_strided(shape, strides)
    assert torch.equal(tensor, expected)
    np.testing.assert_array_equal(array, expected.numpy())


def test_an_array_with_strides_goes_into_a_live_one(tmp_path: Path) -> None:
    writer = Writer()
    values = np.arange(200, dtype="<i4")
    writer.add(values.tobytes(), "int32", [200])
    writer.alias(0, "<i4", [50], strides=[3])
    writer.write(tmp_path / "s", [{"$array": 1}])
    live = np.full(60, -1, dtype="<i4")
    restore = Restore(Snapshot.open(tmp_path / "s"), {1: live[:50]})
    restore.read()
    np.testing.assert_array_equal(live, [*values[:150:3], *[-1] * 10])


def test_load_of_what_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(pysnap.NotFoundError, match=str(tmp_path)):
        pysnap.load(tmp_path)
    with pytest.raises(pysnap.NotFoundError):
        pysnap.load(tmp_path / "missing")


@pytest.mark.parametrize("metadata", [["n"], {"a": object()}, {"a": float("nan")}, {"a": "\ud800"}])
def test_metadata_that_is_no_json_is_refused_at_the_door(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(pysnap.ConfigError, match="metadata"):
        pysnap.save(tmp_path / "s", {}, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_load_tells_what_it_skips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": torch.ones(3)}) as snapshotter:
        for step in (1, 2):
            snapshotter.progress.step = step
            snapshotter.save().wait()
    flip(tmp_path / "step-000000002" / "0.pack", 0)
    assert pysnap.load(tmp_path)["progress"]["step"] == 1
    assert "step-000000002" in caplog.text


# Parts of a state.


def test_load_of_parts(tmp_path: Path) -> None:
    shared = torch.randn(50, 4)
    state = {
        "model": {"encoder.weight": shared, "head.weight": shared[10:20], "bias": torch.ones(3)},
        "optimizer": {"state": {0: {"m": torch.randn(3)}}, "groups": [{"lr": 0.1}, {"lr": 0.2}]},
        "arrays": {"a": np.arange(7), "b": np.arange(9)},
        "progress": {"step": 3},
    }
    path = pysnap.save(tmp_path / "s", state)
    model, groups = state["model"], state["optimizer"]["groups"]
    assert_same(pysnap.load(path, only=["model"]), {"model": model})
    assert_same(pysnap.load(path, only=("arrays/b",)), {"arrays": {"b": np.arange(9)}})
    assert_same(
        pysnap.load(path, (name for name in ("optimizer/groups/0", "progress/step"))),
        {"optimizer": {"groups": groups}, "progress": {"step": 3}},
    )
    assert_same(
        pysnap.load(path, only=pysnap.open(path)),
        {
            "model": model,
            "optimizer": {"state": state["optimizer"]["state"]},
            "arrays": state["arrays"],
        },
    )
    loaded = pysnap.load(path, only=["model/encoder", "model/head"])["model"]
    assert list(loaded) == ["encoder.weight", "head.weight"]
    loaded["encoder.weight"][15] = 7
    assert (loaded["head.weight"][5] == 7).all()
    alone = pysnap.load(path, only=["model/head"])["model"]["head.weight"]
    assert_same(alone, shared[10:20])
    assert alone.untyped_storage().nbytes() == 10 * 4 * 4


def test_load_of_a_part_reads_its_chunks_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "4KiB")
    state = {name: {"w": torch.randn(1024)} for name in ("a", "b", "c")}
    path = pysnap.save(tmp_path / "s", state)
    offsets = [row[1] for row in reader.read_snapshot(path).manifest["chunks"]]
    for name, offset in zip(state, offsets, strict=True):
        flip(path / "0.pack", offset + 1)
        for other in state:
            if other == name:
                with pytest.raises(pysnap.CorruptError, match=rf"0\.pack.*{name}/w"):
                    pysnap.load(path, only=[other])
            else:
                assert_same(pysnap.load(path, only=[other]), {other: state[other]})
        flip(path / "0.pack", offset + 1)


def test_load_of_a_part_that_is_not_there(tmp_path: Path) -> None:
    """It is not sought in older snapshots: that would mix two moments of the run."""
    for step, values in enumerate([{"old": 1}, {"new": 2}]):
        with pysnap.Snapshotter(tmp_path / "r", values=values) as snapshotter:
            snapshotter.progress.step = step
            snapshotter.save().wait()
    assert pysnap.load(tmp_path / "r", only=["values"]) == {"values": {"new": 2}}
    with pytest.raises(pysnap.NotFoundError, match=r'step-000000001: .*"values/old"'):
        pysnap.load(tmp_path / "r", only=["values/new", "values/old"])
    with pytest.raises(pysnap.NotFoundError, match=r'"valeus" .did you mean "values"'):
        pysnap.load(tmp_path / "r" / "step-000000001", only=["valeus"])


def test_load_of_a_part_of_a_tree_that_names_a_tensor_of_none(tmp_path: Path) -> None:
    Writer().write(tmp_path / "s", {"a": {"$tensor": 7}, "b": 1})
    assert pysnap.load(tmp_path / "s", only=["b"]) == {"b": 1}
    with pytest.raises(pysnap.CorruptError, match="tensor 7 does not exist"):
        pysnap.load(tmp_path / "s", only=["a"])


@pytest.mark.parametrize("only", ["model", [], [1], [None], ["model", 2]])
def test_names_that_are_none_are_refused(tmp_path: Path, only: Any) -> None:
    path = pysnap.save(tmp_path / "s", {"model": {"m": 1}})
    with pytest.raises(pysnap.ConfigError, match="only must be a list of names"):
        pysnap.load(path, only)


def test_load_beside_a_writer_that_removes_what_was_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader said that none is intact, while a newer snapshot was."""
    values = {"a": torch.ones(3)}
    with pysnap.Snapshotter(tmp_path, values=values, keep=pysnap.Keep(last=1)) as snapshotter:
        snapshotter.save().wait()
        read = files.load_state

        def replaced_meanwhile(snapshot: Any, names: Any) -> Any:
            if snapshot.step == 0:
                snapshotter.progress.step = 1
                snapshotter.save().wait()
            return read(snapshot, names)

        monkeypatch.setattr(files, "load_state", replaced_meanwhile)
        assert pysnap.load(tmp_path)["progress"]["step"] == 1
