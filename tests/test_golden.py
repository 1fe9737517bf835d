"""Snapshots of every released format stay readable (P12)."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from support import assert_same, bits

import pysnap
from pysnap import reader

GOLDEN = Path(__file__).parent / "golden"
STATE = runpy.run_path(str(GOLDEN / "state.py"))["state"]()


@pytest.mark.parametrize("name", ["format-1"])
def test_the_golden_snapshot_of_a_format_is_read(name: str) -> None:
    loaded = pysnap.load(GOLDEN / name)
    assert_same(loaded, STATE)
    assert loaded["tied"].data_ptr() == loaded["float32"].data_ptr()


@pytest.mark.parametrize("name", ["format-1"])
def test_the_independent_reader_reads_it_too(name: str) -> None:
    assert reader.verify(GOLDEN / name) == []
    tensors = reader.read_snapshot(GOLDEN / name).tensors()
    for key in ("float32", "bfloat16", "float8", "int64", "zero rows", "bool"):
        assert tensors[key].tobytes() == bits(STATE[key]), key


def test_the_golden_snapshot_has_every_kind_of_chunk() -> None:
    rows = reader.read_snapshot(GOLDEN / "format-1").manifest["chunks"]
    assert {row[4] for row in rows} == {"u8", "i16", "i32", "i64", "f16", "f32", "f64"}
    assert {row[5] for row in rows} == {"raw", "planes"}
