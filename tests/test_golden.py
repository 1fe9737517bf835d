"""Snapshots of every released format stay readable (P12)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, bits

import pysnap
from pysnap import reader

GOLDEN = Path(__file__).parent / "golden"
STATES = {name: make() for name, make in runpy.run_path(str(GOLDEN / "state.py"))["STATES"].items()}


@pytest.mark.parametrize("name", STATES)
def test_the_golden_snapshot_of_a_format_is_read(name: str) -> None:
    assert_same(pysnap.load(GOLDEN / name), STATES[name])


def test_what_was_tied_in_the_golden_snapshot_is_tied_again() -> None:
    loaded = pysnap.load(GOLDEN / "format-1")
    assert loaded["tied"].data_ptr() == loaded["float32"].data_ptr()


@pytest.mark.parametrize("name", STATES)
def test_the_independent_reader_reads_it_too(name: str) -> None:
    assert reader.verify(GOLDEN / name) == []
    tensors = reader.read_snapshot(GOLDEN / name).tensors()
    for key, value in STATES[name].items():
        if isinstance(value, torch.Tensor) and value.is_contiguous():
            assert tensors[key].tobytes() == bits(value), key


@pytest.mark.parametrize(
    ("name", "expected"), [("format-1", {0, 1, 2}), ("format-1-moments", {0, 3, 4})]
)
def test_the_golden_snapshots_have_every_method(
    name: str, expected: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = set()
    decode = reader._decode_plane

    def spy(method: int, payload: bytes, size: int) -> Any:
        methods.add(method)
        return decode(method, payload, size)

    monkeypatch.setattr(reader, "_decode_plane", spy)
    reader.verify(GOLDEN / name)
    assert methods == expected


def test_the_golden_snapshot_has_every_kind_of_chunk() -> None:
    rows = reader.read_snapshot(GOLDEN / "format-1").manifest["chunks"]
    assert {row[4] for row in rows} == {"u8", "i16", "i32", "i64", "f16", "f32", "f64"}
    assert {row[5] for row in rows} == {"raw", "planes"}
