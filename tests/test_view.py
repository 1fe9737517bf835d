"""pysnap.open: names and values as they were saved, and no byte read that was not asked for."""

from __future__ import annotations

import pickle
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from reference_writer import Writer
from support import assert_same, bits, flip
from test_files import ALL_DTYPES, random_tensor

import pysnap
from pysnap import reader

GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")  # torch says it of every complex32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "4KiB")


def leaves_of(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and arrays of a state by name; written anew here, to hold the names against."""
    if isinstance(state, (torch.Tensor, np.ndarray)):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from leaves_of(value, f"{path}/{key}" if path else str(key))
    elif isinstance(state, (list, tuple)):
        yield from leaves_of(dict(enumerate(state)), path)


def assert_all_alike(path: Path, state: Any) -> None:
    """`open`, the independent reader and the state itself agree in names, types and bits."""
    view = pysnap.open(path)
    arrays = reader.read_snapshot(path).tensors()
    expected = dict(leaves_of(state))
    assert list(view) == list(arrays) == list(expected)
    for name, value in expected.items():
        assert_same(view[name][...], value, name)
        assert view[name].shape == value.shape and view[name].dtype == value.dtype
        assert view[name].nbytes == value.nbytes
        data = bits(value) if isinstance(value, torch.Tensor) else value.tobytes()
        assert arrays[name].tobytes() == data, name


def test_the_golden_snapshot() -> None:
    state = runpy.run_path(str(GOLDEN / "state.py"))["state"]()
    assert_all_alike(GOLDEN / "format-1", state)


def test_every_dtype_view_and_shape(tmp_path: Path) -> None:
    base = torch.randn(60, 50)
    weight = torch.nn.Linear(40, 70).weight.detach()
    state = {
        "dtypes": {str(dtype): random_tensor(dtype, 7, 333) for dtype in ALL_DTYPES},
        "views": [base, base[10:20], base.t(), base[:, 1], base.flatten()[3:1000]],
        "channels last": torch.randn(2, 3, 20, 5).to(memory_format=torch.channels_last),
        "gaps": torch.arange(2400.0).reshape(40, 60)[:, ::2],
        "expanded": torch.arange(40.0)[:, None].expand(40, 60),
        "tied": (weight, {"head.weight": weight}),
        "empty": [torch.zeros(0), torch.zeros(3, 0, 2), np.zeros((0, 4), "<i2")],
        "scalars": [torch.tensor(2.5), torch.tensor(True), np.array(7), np.array("text")],
        "arrays": [
            np.arange(3000).astype(name) for name in ("<u2", ">i4", "<f8", "<c16", "<M8[s]")
        ],
        "text": np.array(["a", "bcd"]),
        0: torch.ones(1),
        "plain": {"step": 7, "name": "x"},
    }
    path = pysnap.save(tmp_path / "s", state)
    assert_all_alike(path, state)


def test_what_a_view_says(tmp_path: Path) -> None:
    values = {"w": torch.zeros(30, 4), "n": 3, "a": np.zeros(5, "<i2")}
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        snapshotter.progress.step = 12
        snapshotter.save().wait()
    view = pysnap.open(tmp_path)
    manifest = reader.read_snapshot(tmp_path / "step-000000012").manifest
    assert view.path == tmp_path / "step-000000012"
    assert (view.step, view.id, view.metadata) == (12, manifest["id"], manifest["metadata"])
    assert repr(view) == f"<View of {view.path}: {len(view)} tensors>"
    entry = view["values/w"]
    assert (entry.name, entry.shape, entry.nbytes) == ("values/w", (30, 4), 480)
    assert entry.dtype is torch.float32 and view["values/a"].dtype == np.dtype("<i2")
    assert repr(entry) == '<Entry "values/w": float32[30, 4]>'
    assert "values/w" in view and "values/n" not in view and view.get("values") is None
    assert view == view and dict(view)["values/w"] is entry
    with pytest.raises(KeyError, match="nothing"):
        view["nothing"]
    with pytest.raises(TypeError):
        view["values/w"] = entry  # type: ignore[index]  # that is the test
    with pytest.raises(TypeError):
        entry[0] = 1  # type: ignore[index]  # that is the test


def test_each_reading_is_in_memory_of_its_own(tmp_path: Path) -> None:
    weight = torch.ones(4, 4)
    view = pysnap.open(pysnap.save(tmp_path / "s", {"a": weight, "tied": weight}))
    view["a"][...].zero_()
    view["a"][1:3].zero_()
    assert_same(view["a"][...], weight)
    assert_same(view["tied"][...], weight)


# Indexing.

SHAPE = (90, 6, 5)
FULL: dict[str, Any] = {
    "array": np.arange(2700, dtype="<i4").reshape(SHAPE),
    "tensor": torch.arange(2700, dtype=torch.int32).reshape(SHAPE),
    "permuted": torch.arange(2700, dtype=torch.int32).reshape(5, 90, 6).permute(1, 2, 0),
    "expanded": torch.arange(450, dtype=torch.int32).reshape(90, 1, 5).expand(SHAPE),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pysnap.View:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSNAP_CHUNK_SIZE", "4KiB")
        return pysnap.open(pysnap.save(tmp_path_factory.mktemp("view") / "s", FULL))


@pytest.mark.parametrize("name", ["array", "tensor", "permuted", "expanded"])
@given(index=basic_indices(SHAPE, allow_newaxis=True))
def test_any_basic_index_gives_what_numpy_gives(saved: pysnap.View, name: str, index: Any) -> None:
    full = FULL[name]
    if isinstance(full, np.ndarray):
        found, expected = saved[name][index], full[index]
        assert type(found) is type(expected) and found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        return
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, slice) and (part.step or 1) < 0 for part in parts):
        with pytest.raises(ValueError, match="step"):
            saved[name][index]
        return
    found = saved[name][index]
    assert found.dtype == full.dtype and torch.equal(found, full[index])
    np.testing.assert_array_equal(found.numpy(), full.numpy()[index])


BOUNDS = st.none() | st.integers(-200, 200)


@given(BOUNDS, BOUNDS, st.none() | st.integers(-100, 100).filter(bool))
def test_slices_clamp(saved: pysnap.View, start: Any, stop: Any, step: Any) -> None:
    rows = slice(start, stop, step)
    np.testing.assert_array_equal(saved["array"][rows, 1], FULL["array"][rows, 1])


@pytest.mark.parametrize("name", ["array", "tensor"])
@pytest.mark.parametrize(
    "index",
    [
        np.int64(3),
        np.uint8(89),
        89,
        0,
        -90,
        slice(np.int64(2), np.int64(4)),
        [3, 1, 80],
        (slice(10, 30), [0, 2]),
        (-2, [0, 2]),
        (4, slice(None), [0, 2]),
        (slice(3, 6), np.array([True, False, True, True, False, False])),
        np.arange(90) % 7 == 0,
        True,
        (None, slice(2, 4)),
        (..., 0),
        (),
    ],
    ids=str,
)
def test_other_indices(saved: pysnap.View, name: str, index: Any) -> None:
    found, expected = saved[name][index], FULL[name][index]
    assert type(found) is type(expected)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("name", ["array", "tensor", "permuted"])
@pytest.mark.parametrize(
    "index", [90, -91, np.int64(90), (0, 6), (slice(2), 0, 5), (0, 0, 0, 0), (slice(1), 7, 0)]
)
def test_an_index_out_of_range(saved: pysnap.View, name: str, index: Any) -> None:
    with pytest.raises(IndexError):
        saved[name][index]


def test_an_index_out_of_range_is_named(saved: pysnap.View) -> None:
    with pytest.raises(IndexError, match=r'index -91 .* 90 rows of "tensor"'):
        saved["tensor"][-91]


@pytest.mark.parametrize("index", ["rows", 1.5, slice(0.5)])
def test_what_is_no_index(saved: pysnap.View, index: Any) -> None:
    for name in ("array", "tensor"):
        with pytest.raises((TypeError, IndexError)):
            saved[name][index]


def test_without_dimensions(tmp_path: Path) -> None:
    state = {"tensor": torch.tensor(2.5), "array": np.array(7)}
    view = pysnap.open(pysnap.save(tmp_path / "s", state))
    for index in (..., (), None):
        for name, value in state.items():
            found = view[name][index]
            assert type(found) is type(value[index])
            assert found.shape == value[index].shape and found == value[index]
    for index in (0, slice(None), (0,)):
        for name in state:
            with pytest.raises(IndexError, match=r"0-dim|dimension 0"):
                view[name][index]


def test_without_elements(tmp_path: Path) -> None:
    state = {"rows": torch.zeros(0, 5), "columns": np.zeros((3, 0))}
    view = pysnap.open(pysnap.save(tmp_path / "s", state))
    assert view["rows"][:].shape == view["rows"][2:9].shape == (0, 5)
    assert view["columns"][1].shape == (0,) and view["columns"][1:].shape == (2, 0)
    with pytest.raises(IndexError):
        view["rows"][0]


def test_a_tensor_without_elements_may_stand_behind_the_stream(tmp_path: Path) -> None:
    writer = Writer()
    writer.add(bytes(8), "float32", [2])
    writer.alias(999, "float32", [0, 3])
    writer.alias(999, "<f4", [0, 3])
    writer.write(tmp_path / "s", [{"$tensor": 0}, {"$tensor": 1}, {"$array": 2}])
    view = pysnap.open(tmp_path / "s")
    assert [view[name][...].shape for name in view] == [(2,), (0, 3), (0, 3)]
    assert [leaf.shape for leaf in pysnap.load(tmp_path / "s")] == [(2,), (0, 3), (0, 3)]


def test_strides_of_a_manifest(tmp_path: Path) -> None:
    writer = Writer(chunk_size=64)
    values = np.arange(2000, dtype="<i4")
    writer.add(values.tobytes(), "int32", [2000])
    for dtype in ("int32", "<i4"):
        writer.alias(36, dtype, [30, 4], strides=[20, 3])
        writer.alias(36, dtype, [500, 4], strides=[0, 3])
    kinds = ["$tensor", "$tensor", "$tensor", "$array", "$array"]
    writer.write(tmp_path / "s", [{kind: index} for index, kind in enumerate(kinds)])
    view = pysnap.open(tmp_path / "s")
    for name, shape, strides in (
        ("1", (30, 4), (20, 3)),
        ("2", (500, 4), (0, 3)),
        ("3", (30, 4), (20, 3)),
        ("4", (500, 4), (0, 3)),
    ):
        steps = tuple(4 * stride for stride in strides)
        full = np.lib.stride_tricks.as_strided(values[9:], shape, steps)
        for index in (..., slice(5, 9), 7, (slice(2, 20, 3), 1), -1):
            np.testing.assert_array_equal(np.asarray(view[name][index]), full[index])


# Only what is needed is read.


def chunks_of(path: Path) -> list[tuple[int, int, int]]:
    """First byte and end in the stream, and offset in the pack, of each chunk."""
    found, start = [], 0
    for row in reader.read_snapshot(path).manifest["chunks"]:
        found.append((start, start + row[3], row[1]))
        start += row[3]
    return found


@pytest.mark.parametrize("codec", ["none", "fast"])
@pytest.mark.parametrize(
    ("index", "first", "last"),
    [
        (slice(100, 140), 100, 140),
        (slice(None, 1), 0, 1),
        (57, 57, 58),
        (-1, 299, 300),
        (np.int64(-300), 0, 1),
        ((slice(40, 80, 7), slice(5)), 40, 76),
        (slice(280, 9999), 280, 300),
        (..., 0, 300),
        (slice(9, 9), 0, 0),
    ],
)
def test_rows_read_their_chunks_and_no_other(
    tmp_path: Path,
    codec: str,
    index: Any,
    first: int,
    last: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYSNAP_CODEC", codec)
    before, weight = torch.randn(3000), torch.randn(300, 25)
    path = pysnap.save(tmp_path / "s", {"before": before, "w": weight, "after": before + 1})
    view, pack = pysnap.open(path), path / "0.pack"
    start, end = 12000 + first * 100, 12000 + last * 100
    chunks = chunks_of(path)
    needed = [offset for low, high, offset in chunks if first < last and low < end and start < high]
    assert first == last or 0 < len(needed) < len(chunks)
    for offset in needed:
        flip(pack, offset + 3)
        with pytest.raises(pysnap.CorruptError, match=r'"w".*0\.pack'):
            view["w"][index]
        flip(pack, offset + 3)
    for _, _, offset in chunks:
        if offset not in needed:
            flip(pack, offset + 3)
    assert_same(view["w"][index], weight[index])


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    state = {"w": torch.randn(3000)}
    path = pysnap.save(tmp_path / "s", state)
    (path / "0.pack").unlink()
    view = pysnap.open(path)
    assert view["w"].shape == (3000,) and view["w"].nbytes == 12000
    with pytest.raises(pysnap.StorageError, match=r"0\.pack"):
        view["w"][0]


def test_damage_names_the_tensor_among_many(tmp_path: Path) -> None:
    path = pysnap.save(tmp_path / "s", {f"w{n}": torch.full((8,), float(n)) for n in range(40)})
    flip(path / "0.pack", 5)
    with pytest.raises(pysnap.CorruptError, match=r'"w33".*0\.pack'):
        pysnap.open(path)["w33"][0]


# Which snapshot.


def fill(root: Path, *steps: int) -> None:
    values = {"w": torch.zeros(2000)}
    with pysnap.Snapshotter(root, values=values) as snapshotter:
        for step in steps:
            values["w"].fill_(step)
            snapshotter.progress.step = step
            snapshotter.save().wait()


def test_the_newest_readable_snapshot_of_a_repository(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 1, 2, 3)
    assert pysnap.open(tmp_path).step == 3
    flip(tmp_path / "step-000000003" / "manifest.json", 200)
    view = pysnap.open(str(tmp_path))
    assert view.step == 2 and view["values/w"][5] == 2
    assert "step-000000003" in caplog.text
    flip(tmp_path / "step-000000002" / "manifest.json", 200)
    flip(tmp_path / "step-000000001" / "manifest.json", 200)
    with pytest.raises(pysnap.CorruptError, match="none is intact"):
        pysnap.open(tmp_path)


def test_what_is_no_snapshot(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(pysnap.NotFoundError, match=str(path)):
            pysnap.open(path)
    fill(tmp_path)
    with pytest.raises(pysnap.NotFoundError, match="no snapshot"):
        pysnap.open(tmp_path)


def test_a_tree_that_names_a_tensor_of_none(tmp_path: Path) -> None:
    Writer().write(tmp_path / "s", {"a": {"$tensor": 0}})
    with pytest.raises(pysnap.CorruptError, match='"a" is tensor 0'):
        pysnap.open(tmp_path / "s")


def remove(path: Path) -> None:
    shutil.rmtree(path)


def replace(path: Path) -> None:
    shutil.rmtree(path)
    pysnap.save(path, {"values": {"w": torch.ones(500)}})


@pytest.mark.parametrize("change", [remove, replace])
def test_a_snapshot_that_is_gone_is_told(tmp_path: Path, change: Callable[[Path], None]) -> None:
    fill(tmp_path, 1)
    view = pysnap.open(tmp_path)
    change(view.path)
    with pytest.raises(pysnap.NotFoundError, match=r"step-000000001 was deleted or replaced"):
        view["values/w"][...]


def test_a_view_outlives_a_change_of_directory_and_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "runs", 4)
    monkeypatch.chdir(tmp_path)
    view = pysnap.open("runs")
    monkeypatch.chdir("/")
    for each in (view, pickle.loads(pickle.dumps(view))):
        assert each["values/w"][7] == 4
