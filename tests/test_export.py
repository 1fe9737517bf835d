"""`pysnap export` to .safetensors: what the library of that name reads is what was stored."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Commands

import pysnap
from pysnap.cli import safetensors as format_
from pysnap.dtypes import TORCH_ELEMENTS
from pysnap.view import Entry

library = pytest.importorskip("safetensors.torch", reason="it judges what was written")


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def of_dtype(name: str) -> torch.Tensor:
    """Twelve elements of other bits each, `[3, 4]`."""
    dtype = getattr(torch, name)
    if dtype is torch.bool:
        return torch.arange(12).reshape(3, 4) % 3 == 0
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.arange(12 * size, dtype=torch.uint8).reshape(3, 4 * size).view(dtype)


def known_to_library() -> list[str]:
    """Names of the dtypes that the library writes."""
    names = []
    for name in TORCH_ELEMENTS:
        # Of complex32, torch warns that it is an experiment.
        if hasattr(torch, name) and name != "complex32":
            try:
                library.save({"x": of_dtype(name)})
            except KeyError:
                continue
            names.append(name)
    return names


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and what is behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    assert end % 8 == 0
    return json.loads(data[8:end]), data[end:]


def test_every_dtype_that_the_library_knows_is_written_as_the_library_does(
    tmp_path: Path, commands: Commands
) -> None:
    names = known_to_library()
    assert {"bool", "bfloat16", "float8_e5m2", "uint64", "complex64"} <= set(names)
    assert set(names) == {name for name in format_._DTYPES if hasattr(torch, name)}
    state = {name: of_dtype(name) for name in names}
    state |= {"nothing": torch.empty(3, 0), "ünï \"'\n": torch.tensor(2.5)}
    path = pysnap.save(tmp_path / "one", state)
    commands.text("export", path, tmp_path / "w.safetensors")
    header, elements = parts((tmp_path / "w.safetensors").read_bytes())
    assert header.pop("__metadata__")["pysnap"] == pysnap.open(path).id
    expected, as_expected = parts(library.save(state))
    assert header.keys() == expected.keys()
    end = 0
    for name, entry in header.items():
        start, last = end, entry["data_offsets"][1]
        of_library = expected[name]
        assert entry["data_offsets"][0] == start and start % state[name].element_size() == 0, name
        assert (entry["dtype"], entry["shape"]) == (of_library["dtype"], of_library["shape"]), name
        assert elements[start:last] == as_expected[slice(*of_library["data_offsets"])], name
        end = last
    assert end == len(elements)


def test_what_is_exported_is_read_bit_for_bit(tmp_path: Path, commands: Commands) -> None:
    readable = set(library._TYPES.values())
    state = {name: of_dtype(name) for name in known_to_library()}
    state = {name: tensor for name, tensor in state.items() if tensor.dtype in readable}
    commands.text("export", pysnap.save(tmp_path / "one", state), tmp_path / "w.safetensors")
    loaded = library.load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_tensors_in_pieces_and_of_any_order_of_axes(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format_, "_PIECE", 100)
    base = torch.randn(7, 5, 9)
    state = {
        "plain": base,
        "turned": base.permute(2, 0, 1),
        "tall": torch.randn(1000, 1),
        "long": torch.randn(1, 1000),
        "scalar": torch.tensor(3, dtype=torch.int8),
        "arrays": [
            np.arange(10, dtype=">u4"),
            np.asfortranarray(np.arange(12.0).reshape(3, 4)),
            np.array(True),
        ],
    }
    commands.text("export", pysnap.save(tmp_path / "one", state), tmp_path / "w.safetensors")
    loaded = library.load_file(tmp_path / "w.safetensors")
    for name in ("plain", "turned", "tall", "long", "scalar"):
        expected = state[name]
        assert isinstance(expected, torch.Tensor) and torch.equal(loaded[name], expected), name
    for index, array in enumerate(state["arrays"]):
        assert np.array_equal(loaded[f"arrays/{index}"].numpy(), array)
    assert loaded["arrays/0"].dtype == torch.uint32


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (np.array(["a", "bc"]), "str64"),
        (np.zeros(2, "datetime64[ns]"), "datetime64[ns]"),
    ],
    ids=["complex128", "text", "times"],
)
def test_elements_that_the_format_lacks_are_named_and_nothing_is_written(
    tmp_path: Path, commands: Commands, value: Any, dtype: str
) -> None:
    path = pysnap.save(tmp_path / "one", {"model": {"a": torch.zeros(3), "odd": value}})
    commands.text("export", path, tmp_path / "w.safetensors", "--only=model", status=2)
    assert f'"odd" has elements of {dtype}, which' in commands.errors
    assert os.listdir(tmp_path) == ["one"]
    commands.text("export", path, tmp_path / "w.safetensors", "--only=model/a")


def test_a_name_that_means_something_else_in_the_format_is_refused(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pysnap.save(tmp_path / "one", {"__metadata__": torch.zeros(3)})
    commands.text("export", path, tmp_path / "w.safetensors", status=2)
    assert "__metadata__" in commands.errors
    path = pysnap.save(tmp_path / "two", {"x" * 200: torch.zeros(3)})
    monkeypatch.setattr(format_, "_LONGEST_HEADER", 200)
    commands.text("export", path, tmp_path / "w.safetensors", status=2)
    assert "the names of 1 tensors take" in commands.errors
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_one_tensor_is_in_memory_at_a_time(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pysnap.save(tmp_path / "one", {f"t{i}": torch.randn(50, 50) for i in range(20)})
    read = Entry.__getitem__
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(self: Entry, index: Any) -> Any:
        assert [ref() for ref in seen] == [None] * len(seen)
        value = read(self, index)
        seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Entry, "__getitem__", watched)
    commands.text("export", path, tmp_path / "w.safetensors")
    assert len(seen) == 20


def test_a_damaged_tensor_leaves_the_old_file(tmp_path: Path, commands: Commands) -> None:
    path = pysnap.save(tmp_path / "one", {"a": torch.randn(5), "b": torch.randn(5000)})
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"old")
    pack = path / "0.pack"
    pack.write_bytes(b"\xff" * pack.stat().st_size)
    commands.text("export", path, target, "--force", status=1)
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["one", "w.safetensors"]
