"""The benchmark's own reasoning: README's figures, what is left out, medians, bars and growth."""

from __future__ import annotations

import copy
import json
import math
import mmap
import re
import sys
from pathlib import Path
from typing import Any

import pytest

for _name in ("matplotlib", "psutil", "rich", "safetensors"):
    pytest.importorskip(_name)

ROOT = Path(__file__).parent.parent
# Its modules are no package: they are imported as its programs do.
sys.path.insert(0, str(ROOT / "bench"))

import bench_scaling
import bench_snapshot
import jobs
import peers
import readme
import report
import scaling
import torch
from floors import Buffer, WriteFloor, write_and_sync
from growth import exponent, per_decade
from peers.plain_files import flat_tensors
from rich.console import Console

STATE_BYTES = 1000


@pytest.fixture
def results() -> dict[str, Any]:
    """Those that are in the repository."""
    return json.loads(readme.RESULTS.read_text())


# README


def test_the_figures_in_readme_are_those_of_the_results_file(results: dict[str, Any]) -> None:
    text = readme.README.read_text()
    assert readme.replaced(text, readme.figures(results, readme.RESULTS)) == text, (
        "run `python bench/readme.py`"
    )


def test_what_readme_links_to_is_there(results: dict[str, Any]) -> None:
    part = readme.figures(results, readme.RESULTS)
    links = re.findall(r"\]\(([^)]*)\)", part)
    assert len(links) == 3
    assert all((ROOT / link).stat().st_size for link in links)


def test_readme_follows_the_results(results: dict[str, Any]) -> None:
    rows = results["saves"][peers.PYSNAP]["warm"]
    for row in rows:
        row["blocked_seconds"] = 7.125
    results["note"] = "The disk was slow."
    results["skipped"] = {"orbax": "it is not installed"}
    part = readme.figures(results, readme.RESULTS)
    assert "| pysnap | 7.12 s |" in part
    assert "The disk was slow." in part
    assert f"Not installed where this was measured: {peers.ORBAX}." in part


def test_a_figure_that_was_not_measured_is_a_dash(results: dict[str, Any]) -> None:
    results["saves"][peers.TORCH_SAVE]["extra_memory"] = None
    row = next(
        line
        for line in readme.figures(results, readme.RESULTS).splitlines()
        if line.startswith(f"| {peers.TORCH_SAVE} |")
    )
    assert " - |" in row


def test_a_readme_without_the_comments_is_refused() -> None:
    with pytest.raises(ValueError, match="there must be a line"):
        readme.replaced("# pysnap\n", "")
    with pytest.raises(ValueError, match="after it a line"):
        readme.replaced(f"{readme.END}\n{readme.BEGIN}\n", "")


def test_the_command_writes_readme_and_plots(results: dict[str, Any], tmp_path: Path) -> None:
    file, text = tmp_path / "run.json", tmp_path / "README.md"
    file.write_text(json.dumps(results))
    text.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.main([str(file), "--readme", str(text)])
    written = text.read_text()
    assert written.startswith(f"before\n{readme.BEGIN}\n\n`python bench/")
    assert written.endswith(f"{readme.END}\nafter\n")
    assert "old" not in written
    assert "](run-training.png)" in written
    for name in ("run.png", "run-training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# Peers


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = peers.Subject("gone", "no_such_library.part", peers.PEERS["dcp"].make)
    monkeypatch.setitem(peers.PEERS, "gone", gone)
    console = Console(record=True, width=120)
    installed, skipped = bench_snapshot.installed(("torch.save", "gone", "dcp"), console)
    assert installed == ("torch.save", "dcp")
    assert skipped == {"gone": "no_such_library.part is not installed"}
    assert "gone is left out: no_such_library.part is not installed" in console.export_text()


def test_what_is_left_out_is_not_measured() -> None:
    plan = bench_snapshot.Plan(
        parameters=1000, repeats=1, more_firsts=0, pairs=1, segment_seconds=1, peers=("dcp",)
    )
    subjects = {job.subject for job in bench_snapshot.measurements(plan)} - {""}
    assert subjects == {*peers.OURS, peers.DCP}


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_snapshot.parse(["--peers", "torch.save,nobody"])
    assert "'nobody' is none of torch.save, safetensors, dcp" in capsys.readouterr().err


def test_every_subject_has_a_name_of_its_own() -> None:
    names = [*peers.OURS, *(peer.name for peer in peers.PEERS.values())]
    assert len(set(names)) == len(names)


def test_plain_files_take_every_tensor_by_where_it_is() -> None:
    a, b, c = (torch.tensor(number) for number in range(3))
    found = flat_tensors({"model": {"w": a}, "optimizer": {"state": {0: {"m": b}}, "g": [1, c]}})
    assert found == {"model.w": a, "optimizer.state.0.m": b, "optimizer.g.1": c}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["torch.save", "safetensors", "dcp", "dcp-stager"])
def test_what_a_peer_saved_is_durable_and_whole(name: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    saver = peers.open_saver(peers.PEERS[name].name, {"model": model}, tmp_path, None)
    first, second = saver.save().wait(), saver.save().wait()
    saver.close()
    assert first != second
    files = [path for path in (first, *first.rglob("*")) if path.is_file()]
    weights = model.weight.detach().numpy().tobytes()
    assert any(weights in path.read_bytes() for path in files)


# Medians and bars


def saves(blocked: list[float], durable: float = 1.0, extra: int | None = 0) -> dict[str, Any]:
    rows = [
        {
            "blocked_seconds": seconds,
            "durable_seconds": durable,
            "write_seconds": 0.5,
            "memcpy_seconds": {"slow": 9.0, "fast": 2.0},
            "bytes": STATE_BYTES,
        }
        for seconds in blocked
    ]
    return {
        "first": rows[:1],
        "warm": rows[1:],
        "extra_memory": extra,
        "staging_budget": STATE_BYTES,
        "damaged_chunks": 0,
    }


def made(**changed: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "saves": {},
        "training": {},
        "codecs": None,
        "restores": None,
        "state": {"bytes": STATE_BYTES},
    }
    return empty | changed


def bar_of(results: dict[str, Any], what: str) -> report.Bar:
    (found,) = [bar for bar in report.bars(results) if bar.what == what]
    return found


def test_bars_without_a_measurement_are_neither_met_nor_missed() -> None:
    bars = report.bars(made())
    assert len(bars) > 20
    assert {bar.passed for bar in bars} == {None}


def test_blocked_time_is_judged_beside_the_best_memcpy_of_its_repetition() -> None:
    results = made(saves={peers.PYSNAP: saves([6.0, 2.0, 4.0, 2.0])})
    assert bar_of(results, "pysnap: blocked / best memcpy").values == [1.0, 2.0, 1.0]
    assert bar_of(results, "pysnap: blocked / best memcpy").passed
    first = bar_of(results, "pysnap: first blocked / warm")
    assert (first.values, first.passed) == ([3.0], False)


def test_durable_is_judged_beside_a_plain_write_and_its_pair_without_codec() -> None:
    pairs = [
        {
            "auto": {"durable_seconds": 1.1, "bytes": 900},
            "none": {"durable_seconds": none, "bytes": 1010},
        }
        for none in (1.0, 1.1, 1.1)
    ]
    results = made(
        saves={peers.PYSNAP_RAW: saves([1.0, 1.0], durable=0.6)},
        codecs={"pairs": pairs, "state_bytes": STATE_BYTES},
    )
    assert bar_of(results, "pysnap, codec none: durable / write and sync").values == [1.2]
    assert bar_of(results, "pysnap, codec none: durable / write and sync").passed is False
    assert bar_of(results, "pysnap: durable / that of codec none").passed
    assert bar_of(results, "pysnap: bytes on disk / of the state").values == [0.9, 0.9, 0.9]
    for pair in pairs:
        pair["auto"] = pair["none"]
    assert bar_of(results, "pysnap: bytes on disk / of the state").passed is False


def test_what_a_save_loses_is_judged_beside_the_segments_around_it() -> None:
    result = {
        "steps": 10,
        "without": [{"seconds": 5.0}, {"seconds": 6.0}, {"seconds": 5.0}],
        "with": [{"seconds": 5.75}, {"seconds": 5.25}],
    }
    assert report.lost_seconds(result) == [0.25, -0.25]
    results = made(training={"GIL-bound": {peers.PYSNAP: result}})
    assert bar_of(results, "pysnap: s of a GIL-bound loop lost by a save").passed
    assert bar_of(results, "pysnap: s of a compute-bound loop lost by a save").passed is None
    worse = copy.deepcopy(results)
    worse["training"]["GIL-bound"][peers.PYSNAP]["with"] = [{"seconds": 5.7}, {"seconds": 5.7}]
    assert bar_of(worse, "pysnap: s of a GIL-bound loop lost by a save").passed is False


def test_memory_is_judged_beside_the_state() -> None:
    results = made(saves={peers.PYSNAP: saves([1.0, 1.0], extra=1051)})
    assert bar_of(results, "pysnap: extra memory / bytes of the state").passed is False
    results["saves"][peers.PYSNAP]["extra_memory"] = 1049
    assert bar_of(results, "pysnap: extra memory / bytes of the state").passed


def test_a_restore_is_judged_beside_the_fastest_way_of_its_repetition() -> None:
    times = {
        "safetensors load_file + copy_": [4.0, 1.0],
        "safetensors, one torch thread": [2.0, 3.0],
        peers.PYSNAP: [2.0, 1.0],
        peers.PYSNAP_RAW: [3.0, 1.5],
    }
    restores = {
        "times": {name: {"first": 1.0, "warm": warm} for name, warm in times.items()},
        "extra_memory": {peers.PYSNAP: [], peers.PYSNAP_RAW: []},
    }
    results = made(restores=restores)
    assert report.restore_seconds(results, peers.SAFETENSORS) == [2.0, 1.0]
    name = "pysnap: restore / faster of safetensors load_file + copy_"
    assert bar_of(results, name).values == [1.0, 1.0]
    assert bar_of(results, name.replace("pysnap", "pysnap, codec none")).passed is False


def test_every_bar_says_value_limit_and_verdict() -> None:
    console = Console(record=True, width=120)
    console.print(
        report.table_of_bars(
            [
                report.Bar("one", 1.05, [1.0, 1.01, 1.02]),
                report.Bar("two", 0.1, [0.2]),
                report.Bar("three", 3, []),
            ]
        )
    )
    rows = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert ["one", "1.01", "1.05", "met"] in rows
    assert ["two", "0.20", "0.10", "missed"] in rows
    assert ["three", "3.00", "not"] in rows


# Scaling


def test_growth_is_the_factor_for_ten_times_as_much() -> None:
    assert per_decade([(1, 5), (10, 50), (1000, 50)]) == pytest.approx([10, 1])
    assert per_decade([(1, 1), (100, 10_000)]) == pytest.approx([100])
    assert exponent([(1, 3), (10, 30), (100, 300)]) == pytest.approx(1)
    assert exponent([(1, 3), (10, 3), (100, 3)]) == pytest.approx(0)
    assert math.isnan(exponent([(1, 3)]))


def point(**given: Any) -> dict[str, Any]:
    row = {
        "blocked_seconds": 1.0,
        "python_seconds": 0.5,
        "state_dict_seconds": 0.1,
        "durable_seconds": 2.0,
        "manifest_bytes": 100,
    }
    whole = {"bytes": 10, "tensors": 10, "extra_memory": 5, "staging_bytes": 20}
    row |= {name: given.pop(name) for name in list(given) if name in row}
    return whole | given | {"warm": [row]}


def test_what_grows_faster_than_linearly_misses_its_bar() -> None:
    axes = {
        "bytes": [
            point(bytes=10, staging_bytes=10_000, durable_seconds=2.0),
            point(bytes=100, staging_bytes=10_000, durable_seconds=50.0),
            point(bytes=1000, staging_bytes=10_000, durable_seconds=60.0),
        ],
        "tensors": [
            point(tensors=1000, python_seconds=0.001),
            point(tensors=100_000, python_seconds=0.051),
        ],
    }
    bars = {bar.what: bar for bar in bench_scaling.bars(axes)}
    assert bars["durable: growth per tenfold bytes, at worst"].passed is False
    assert bars["blocked: growth per tenfold bytes, at worst"].passed
    assert bars["Python: growth per tenfold tensors, at worst"].passed
    python = bars["ms of Python in a warm save of 100000 tensors"]
    assert (python.values, python.passed) == ([51.0], False)


def test_blocked_time_that_waits_for_the_disk_is_no_point_of_its_curve() -> None:
    axis = [point(bytes=10), point(bytes=100, staging_bytes=20, blocked_seconds=99.0)]
    figures = {figure.title: figure for figure in bench_scaling.FIGURES}
    assert bench_scaling.curve(axis, "bytes", figures["blocked"]) == [(10.0, 1000.0)]
    assert len(bench_scaling.curve(axis, "bytes", figures["durable"])) == 2


def test_a_state_that_does_not_fit_is_cut_and_it_is_said() -> None:
    sizes = (10, 100, 1000)
    enough = bench_scaling.Room(memory=10**6, disk=2000)
    assert bench_scaling.sizes_that_fit(sizes, enough) == ([10, 100, 1000], None)
    fit, said = bench_scaling.sizes_that_fit(sizes, bench_scaling.Room(memory=10**6, disk=900))
    assert fit == [10, 100, 450]
    assert said is not None
    # Hardly more than the one before: no point of its own.
    assert bench_scaling.sizes_that_fit(sizes, bench_scaling.Room(10**6, 300))[0] == [10, 100]
    short = bench_scaling.Room(memory=100, disk=10**6)
    assert bench_scaling.sizes_that_fit(sizes, short)[0] == [10, 100]


# Measurements in processes


def test_saves_with_and_without_codec_are_measured_in_pairs(tmp_path: Path) -> None:
    job = jobs.Job("codecs", "", {"parameters": 100_000, "repeats": 2})
    told: list[str] = []
    result = jobs.run(job, tmp_path, told.append)
    assert len(result["pairs"]) == 2
    for pair in result["pairs"]:
        assert pair["none"]["bytes"] > result["state_bytes"]
        assert min(pair[name]["durable_seconds"] for name in ("auto", "none")) > 0
    assert "building the state" in told


def test_a_state_larger_than_the_memory_repeats_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "PATTERN_BYTES", 3 * mmap.ALLOCATIONGRANULARITY)
    tensors = scaling.repeated(8 * mmap.ALLOCATIONGRANULARITY, 8)
    assert len({tensor.data_ptr() for tensor in tensors}) == 8
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 8
    assert {tensor.nbytes for tensor in tensors} == {mmap.ALLOCATIONGRANULARITY}
    assert len({bytes(tensor.numpy()) for tensor in tensors}) == 3
    assert len({bytes(tensor.numpy()) for tensor in scaling.repeated(4000, 10)}) == 3


def test_a_state_larger_than_its_staging_is_a_point_of_the_curve(tmp_path: Path) -> None:
    size, staging = 40_000_000, 16 * 2**20
    arguments = {"size": size, "tensors": 10, "repeats": 1, "host_memory": staging}
    result = jobs.run(jobs.Job("scaling", "", arguments), tmp_path, lambda _: None)
    assert (result["bytes"], result["tensors"]) == (size, 10)
    (row,) = result["warm"]
    assert 0 < row["python_seconds"] < row["blocked_seconds"] <= row["durable_seconds"]
    assert row["bytes"] > row["manifest_bytes"] > 0


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(jobs.JobError, match=r"saves: nobody ended with status 1:(.|\n)*KeyError"):
        arguments = {"subject": "nobody", "parameters": 1000, "repeats": 0, "host_memory": None}
        jobs.run(jobs.Job("saves", "nobody", arguments), tmp_path, lambda _: None)


def test_the_floor_of_writing_writes_every_byte(tmp_path: Path) -> None:
    data = Buffer(37 * 2**20)
    data.view[:] = bytes(range(256)) * (data.size // 256)
    for threads in (1, 2, 4):
        path = tmp_path / str(threads)
        write_and_sync(path, data.view, direct=False, threads=threads)
        assert path.read_bytes() == data.view
    floor = WriteFloor(tmp_path, data.view)
    assert floor.measure() > 0
    assert re.fullmatch(r"(direct|buffered), [124] in flight", floor.way)
    assert not (tmp_path / "floor").exists()
