"""The benchmark's own reasoning: README's figures, what is left out, medians, bars and growth."""

from __future__ import annotations

import copy
import inspect
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
import child
import coders
import coding
import jobs
import peers
import readme
import report
import scaling
import torch
import training
from floors import Buffer, MemcpyFloor, WriteFloor, write_and_sync
from growth import beside_linear, exponent
from payloads import Payload
from peers.plain_files import flat_tensors
from rich.console import Console
from saves import measure as measure_saves
from state import State

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


def test_the_figures_of_a_gpu_in_readme_are_those_of_the_results_file() -> None:
    text = readme.README.read_text()
    part = readme.gpu_figures(json.loads(readme.GPU_RESULTS.read_text()), readme.GPU_RESULTS)
    assert readme.replaced(text, part, readme.BEGIN_GPU) == text, "run `python bench/readme.py`"


def test_what_readme_links_to_is_there(results: dict[str, Any]) -> None:
    part = readme.figures(results, readme.RESULTS)
    links = re.findall(r"\]\(([^)]*)\)", part)
    assert len(links) == 3
    assert all((ROOT / link).stat().st_size for link in links)


def test_readme_follows_the_results(results: dict[str, Any]) -> None:
    for name in peers.OURS:
        saved = results["saves"][name]
        saved["warm"] = saved["warm"][: 3 if name in report.TIMED else 1]
    for row in results["saves"][peers.PYSNAP]["warm"]:
        row["blocked_seconds"] = 7.125
    results["note"] = "The disk was slow."
    results["skipped"] = {"orbax": "it is not installed"}
    part = readme.figures(results, readme.RESULTS)
    assert "| pysnap | 7.12 s |" in part
    assert f"medians of {results['repeats']}, of pysnap's own saves of 1 or 3, of " in part
    restores = len(results["restores"]["times"][peers.PYSNAP]["warm"])
    assert f", of restores of {restores}. All" in part
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


def test_readme_says_what_copying_and_writing_alone_cost_training(results: dict[str, Any]) -> None:
    results["lost"] = {}
    assert ", blocked time included. pysnap's are" in readme.figures(results, readme.RESULTS)
    for loop, seconds in zip(training.LOOPS, (1.25, 1.0625), strict=True):
        saved = {"subject": peers.FLOOR, "steps": 2, "seconds": seconds}
        results["lost"][loop] = {
            "without": [{"steps": 1, "seconds": 0.5}] * 2, "with": [saved], "foreign_cpu": 0.0,
        }  # fmt: skip
    said = "a direct write of its bytes, with nothing else, cost 0.25 s and 0.062 s. pysnap's"
    assert said in readme.figures(results, readme.RESULTS)
    console = Console(record=True, width=200)
    report.show(results, console)
    assert f"lost by {peers.FLOOR} alone: 0.25 s" in console.export_text()
    assert report.summary(results)["floors"][training.COMPUTE]["lost_seconds"]["median"] == 0.25


def test_readme_says_how_little_the_few_segments_of_others_tell(results: dict[str, Any]) -> None:
    results["lost"] = {}
    plain = [{"steps": 10, "seconds": seconds} for seconds in (5.0, 5.5, 5.5, 5.5)]
    for loop in training.LOOPS:
        for name, result in results["training"][loop].items():
            rows = [{"subject": name, "steps": 10, "seconds": 6.0}] * 3
            results["training"][loop][name] = result | {"without": plain, "with": rows}
    said = (
        "medians of 3 saves, the others' of 3 in longer segments, which differ by 0.12 s and 0.12 s"
    )
    assert f"pysnap's are {said} without any save." in readme.figures(results, readme.RESULTS)
    for loop in training.LOOPS:
        results["training"][loop] = {
            name: results["training"][loop][name] for name in bench_snapshot.TRAINED_WITH
        }
    assert "the others' of" not in readme.figures(results, readme.RESULTS)


def test_readme_shows_coders_where_they_were_measured(results: dict[str, Any]) -> None:
    results.pop("coders", None)
    without = readme.figures(results, readme.RESULTS)
    assert "stored / raw" not in without
    results["coders"] = coded(pysnap=[0.5, 0.25, 0.25], zstd=[2.0, 2.0, 2.0])
    part = readme.figures(results, readme.RESULTS)
    assert "a model trained for 200 steps, by pysnap / zstd-1; medians of 3:" in part
    assert "\n\n| | stored / raw | encode, GB/s | decode, GB/s |\n|---|---:|---:|---:|\n" in part
    assert "| bf16 weights | 0.60 / 0.90 | 4.00 / 0.50 | 2.00 / 0.25 |" in part
    del results["coders"]["kinds"]["bf16 weights"]["coders"][coders.ZSTD]
    part = readme.figures(results, readme.RESULTS)
    assert "| bf16 weights | 0.60 / - | 4.00 / - | 2.00 / - |" in part


def test_a_readme_without_the_comments_is_refused() -> None:
    with pytest.raises(ValueError, match="there must be a line"):
        readme.replaced("# pysnap\n", "")
    with pytest.raises(ValueError, match="after it a line"):
        readme.replaced(f"{readme.END}\n{readme.BEGIN}\n", "")


def test_the_command_writes_readme_and_plots(results: dict[str, Any], tmp_path: Path) -> None:
    file, text = tmp_path / "run.json", tmp_path / "README.md"
    file.write_text(json.dumps(results))
    text.write_text(
        f"before\n{readme.BEGIN}\nold\n{readme.END}\nbetween\n{readme.BEGIN_GPU}\nold\n"
        f"{readme.END}\nafter\n"
    )
    readme.main([str(file), "--readme", str(text)])
    written = text.read_text()
    assert written.startswith(f"before\n{readme.BEGIN}\n\n`python bench/")
    assert f"{readme.END}\nbetween\n{readme.BEGIN_GPU}\n\n`python bench/" in written
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


PLAN = bench_snapshot.Plan(
    parameters=1000,
    repeats=1,
    processes=2,
    rounds=1,
    segment_seconds=1,
    lost_rounds=1,
    trained_steps=1,
    peers=("dcp",),
)


def test_what_is_left_out_is_not_measured() -> None:
    planned = bench_snapshot.measurements(PLAN)
    assert {job.subject for job in planned} - {""} == {*peers.OURS, peers.DCP}
    assert [job.arguments["subjects"] for job in planned if job.kind == "lost"] == [
        [peers.PYSNAP, peers.PYSNAP_OVERLAP, peers.FLOOR]
    ] * len(training.LOOPS)


def test_every_kind_of_measurement_is_planned_with_the_arguments_that_it_takes() -> None:
    planned = bench_snapshot.measurements(PLAN)
    # The curves have a command of their own.
    assert {job.kind for job in planned} == child.MEASURES.keys() - {"scaling"}
    for job in planned:
        parameters = inspect.signature(child.MEASURES[job.kind]).parameters
        assert {*job.arguments, "directory", "tell"} == parameters.keys()


def test_saves_with_bars_of_time_are_taken_in_several_processes() -> None:
    planned = [job.subject for job in bench_snapshot.measurements(PLAN) if job.kind == "saves"]
    for subject in (*peers.OURS, peers.DCP):
        assert planned.count(subject) == (PLAN.processes if subject in report.TIMED else 1)


def test_what_has_bars_and_is_compared_in_turn_is_repeated_more_often() -> None:
    planned = {job.kind: job.arguments for job in bench_snapshot.measurements(PLAN)}
    for kind in ("codecs", "restores"):
        assert planned[kind]["repeats"] == bench_snapshot.PAIR_REPEATS * PLAN.repeats


def test_the_saves_of_all_processes_are_judged_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    size = {"state": {"bytes": STATE_BYTES}, "wall_seconds": 1.0}
    ended = [
        saves([4.0, 2.0, 2.0], extra=2) | size | {"foreign_cpu": 0.3, "damaged_chunks": 1},
        saves([6.0, 3.0, 3.0], extra=1) | size | {"foreign_cpu": 0.1},
        saves([8.0, 9.0], extra=None) | size | {"foreign_cpu": 0.2, "damaged_chunks": 1},
    ]
    job = jobs.Job("saves", peers.PYSNAP, {})
    monkeypatch.setattr(jobs, "run_all", lambda *_: [(job, result) for result in ended])
    results, failed = bench_snapshot.run(PLAN, tmp_path, Console())
    assert not failed
    found = results["saves"][peers.PYSNAP]
    assert [row["blocked_seconds"] for row in found["first"]] == [4.0, 6.0, 8.0]
    assert [row["blocked_seconds"] for row in found["warm"]] == [2.0, 2.0, 3.0, 3.0, 9.0]
    assert (found["extra_memory"], found["foreign_cpu"]) == (2, 0.3)
    assert (found["damaged_chunks"], found["wall_seconds"]) == (2, 3.0)


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_snapshot.parse(["--peers", "torch.save,nobody"])
    assert "'nobody' is none of torch.save, safetensors, dcp" in capsys.readouterr().err


def test_every_subject_has_a_name_of_its_own() -> None:
    names = [*peers.OURS, peers.FLOOR, *(peer.name for peer in peers.PEERS.values())]
    assert len(set(names)) == len(names)


def test_plain_files_take_every_tensor_by_where_it_is() -> None:
    a, b, c = (torch.tensor(number) for number in range(3))
    found = flat_tensors({"model": {"w": a}, "optimizer": {"state": {0: {"m": b}}, "g": [1, c]}})
    assert found == {"model.w": a, "optimizer.state.0.m": b, "optimizer.g.1": c}


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # in torch 2.4
@pytest.mark.parametrize(
    "name", ["torch.save", "safetensors", "dcp", "dcp-stager", "dcp-async-stager"]
)
def test_what_a_peer_saved_is_durable_and_whole(name: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    try:
        saver = peers.open_saver(peers.PEERS[name].name, {"model": model}, tmp_path, None)
    except ImportError as error:
        # DefaultStager came after torch 2.4.
        pytest.skip(str(error))
    first, second = saver.save().wait(), saver.save().wait()
    saver.close()
    assert first != second
    files = [path for path in (first, *first.rglob("*")) if path.is_file()]
    weights = model.weight.detach().numpy().tobytes()
    assert any(weights in path.read_bytes() for path in files)


def test_the_floor_of_saving_writes_what_the_state_was(tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    weights, bias = (part.detach().numpy().tobytes() for part in (model.weight, model.bias))
    saver = peers.open_saver(peers.FLOOR, {"model": model}, tmp_path, None)
    pending = saver.save()
    with torch.no_grad():
        model.weight.zero_()
    written = pending.wait().read_bytes()
    assert pending.done()
    saver.close()
    assert written.startswith(weights)
    assert bias in written


# Medians and bars


def saves(blocked: list[float], durable: float = 1.0, extra: int | None = 0) -> dict[str, Any]:
    rows = [
        {
            "blocked_seconds": seconds,
            "durable_seconds": durable,
            "write_seconds": 0.5,
            "memcpy_seconds": 2.0,
            "memcpy_again_seconds": 1.0,
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
        "lost": {},
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
    again = report.summary(results)["saves"][peers.PYSNAP]["blocked_over_memcpy_again"]
    assert (again["low"], again["median"], again["high"]) == (2.0, 2.0, 4.0)
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
        "without": [{"steps": 10, "seconds": seconds} for seconds in (5.0, 6.0, 5.0)],
        "with": [
            {"subject": peers.PYSNAP, "steps": 10, "seconds": 5.75},
            {"subject": peers.PYSNAP, "steps": 10, "seconds": 5.25},
        ],
    }
    assert report.lost_seconds(result) == [0.25, -0.25]
    results = made(training={"GIL-bound": {peers.PYSNAP: result}})
    assert bar_of(results, "pysnap: s of a GIL-bound loop lost by a save").passed
    assert bar_of(results, "pysnap: s of a compute-bound loop lost by a save").passed is None
    worse = copy.deepcopy(results)
    for row in worse["training"]["GIL-bound"][peers.PYSNAP]["with"]:
        row["seconds"] = 5.7
    assert bar_of(worse, "pysnap: s of a GIL-bound loop lost by a save").passed is False
    # Short segments, where they were run, say it alone.
    worse["lost"] = {"GIL-bound": result}
    assert bar_of(worse, "pysnap: s of a GIL-bound loop lost by a save").passed
    assert report.lost_by(worse, "GIL-bound", peers.PYSNAP) == [0.25, -0.25]


def test_saves_in_turn_are_told_apart_whatever_their_lengths() -> None:
    result = {
        "without": [{"steps": 5, "seconds": seconds} for seconds in (2.5, 3.0, 3.0)],
        "with": [
            {"subject": peers.PYSNAP, "steps": 10, "seconds": 5.75},
            {"subject": peers.FLOOR, "steps": 20, "seconds": 12.5},
        ],
    }
    results = made(lost={training.COMPUTE: result})
    assert report.lost_by(results, training.COMPUTE, peers.PYSNAP) == [0.25]
    assert report.lost_by(results, training.COMPUTE, peers.FLOOR) == [0.5]
    assert report.lost_by(results, training.COMPUTE, peers.PYSNAP_OVERLAP) == []
    assert report.summary(results)["floors"].keys() == {training.COMPUTE}


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


def coded(**seconds: list[float]) -> dict[str, Any]:
    """The results of coders of a gigabyte of each kind that take so long to encode, and twice as
    long to decode."""
    names = {"pysnap": coders.PYSNAP, "zstd": coders.ZSTD, "zipnn": coders.ZIPNN}
    stored = {"pysnap": 6 * 10**8, "zstd": 9 * 10**8, "zipnn": 7 * 10**8}
    rows = {
        names[name]: [
            {"encode_seconds": each, "decode_seconds": 2 * each, "stored_bytes": stored[name]}
            for each in repetitions
        ]
        for name, repetitions in seconds.items()
    }
    return {
        "trained": {"steps": 200, "loss": 2.0, "parameters": 1},
        "repeats": 3,
        "foreign_cpu": 0.0,
        "missing": {},
        "kinds": {
            kind: {"raw_bytes": 10**9, "coders": copy.deepcopy(rows)} for kind in coding.KINDS
        },
    }


def test_coders_are_judged_beside_zstd_in_their_repetition() -> None:
    # 1/6, 1/5 and 1/10 of zstd's time.
    results = made(coders=coded(pysnap=[1.0, 2.0, 1.0], zstd=[6.0, 10.0, 10.0]))
    encode = bar_of(results, "bf16 weights: encode / time of zstd-1")
    assert encode.values == pytest.approx([1 / 6, 1 / 5, 1 / 10])
    assert (encode.limit, encode.passed) == (1 / 5, True)
    # The median is 1/6, seven times the rate is asked.
    assert bar_of(results, "fp32 weights: encode / time of zstd-1").limit == 1 / 7
    assert bar_of(results, "fp32 weights: encode / time of zstd-1").passed is False
    for row in results["coders"]["kinds"]["fp32 weights"]["coders"][coders.PYSNAP]:
        row["decode_seconds"] *= 2
    decode = bar_of(results, "fp32 weights: decode / time of zstd-1")
    assert decode.values == pytest.approx([1 / 3, 2 / 5, 1 / 5])
    assert (decode.limit, decode.passed) == (1 / 3.5, False)
    assert bar_of(results, "bf16 weights: decode / time of zstd-1").limit == 1 / 2.5
    assert bar_of(results, "bf16 weights: decode / time of zstd-1").passed


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("bf16 weights", 0.67), ("fp32 weights", 0.84), ("exp_avg", 0.84), ("exp_avg_sq", 0.81)],
)
def test_what_is_stored_is_judged_beside_the_raw_bytes(kind: str, limit: float) -> None:
    results = made(coders=coded(pysnap=[1.0], zstd=[9.0]))
    (row,) = results["coders"]["kinds"][kind]["coders"][coders.PYSNAP]
    row["stored_bytes"] = int(limit * 10**9)
    bar = bar_of(results, f"{kind}: stored / raw")
    assert (bar.limit, bar.values, bar.passed) == (limit, [limit], True)
    row["stored_bytes"] += 10**6
    assert bar_of(results, f"{kind}: stored / raw").passed is False


def test_coders_without_zstd_beside_them_are_neither_met_nor_missed() -> None:
    bars = report.bars(made(coders=coded(pysnap=[1.0])))
    judged = {bar.what for bar in bars if bar.passed is not None}
    assert judged == {f"{kind}: stored / raw" for kind in coding.KINDS}
    bars = report.bars(made(coders=coded(zstd=[1.0])))
    assert {bar.passed for bar in bars} == {None}


@pytest.mark.parametrize("missing", [{}, {coders.ZIPNN: "zipnn is not installed"}])
def test_a_table_shows_the_coders_that_were_there(missing: dict[str, str]) -> None:
    others = {"zstd": [2.0]} if missing else {"zstd": [2.0], "zipnn": [0.5]}
    results = made(coders=coded(pysnap=[0.25], **others) | {"missing": missing})
    console = Console(record=True, width=120)
    report.show(results, console)
    shown = console.export_text()
    rows = [line.split() for line in shown.splitlines()]
    assert ["exp_avg,", "pysnap", "0.600", "4.00", "2.00"] in rows
    assert ["exp_avg,", "zstd-1", "0.900", "0.50", "0.25"] in rows
    assert (["exp_avg,", "ZipNN", "0.700", "2.00", "1.00"] in rows) == (not missing)
    assert ("ZipNN: zipnn is not installed" in shown) == bool(missing)
    summary = report.summary(results)["coders"]["exp_avg"]
    assert set(summary) == results["coders"]["kinds"]["exp_avg"]["coders"].keys()
    assert summary[coders.ZSTD]["encode_bytes_per_second"]["median"] == 5e8


def test_others_that_worked_beside_coders_are_told() -> None:
    console = Console(record=True, width=120)
    report.show(made(coders=coded(pysnap=[1.0]) | {"foreign_cpu": 0.5}), console)
    assert "used up to 50% of the machine" in " ".join(console.export_text().split())


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


def test_growth_is_measured_by_that_of_the_state() -> None:
    assert beside_linear([(1, 5), (10, 50), (1000, 50)]) == pytest.approx([1, 0.01])
    assert beside_linear([(1, 1), (100, 10_000), (200, 30_000)]) == pytest.approx([100, 1.5])
    assert exponent([(1, 3), (10, 30), (100, 300)]) == pytest.approx(1)
    assert exponent([(1, 3), (10, 3), (100, 3)]) == pytest.approx(0)
    assert math.isnan(exponent([(1, 3)]))


def point(**given: Any) -> dict[str, Any]:
    row = {
        "blocked_seconds": 1.0,
        "python_seconds": 0.5,
        "overlap_python_seconds": 0.6,
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
            point(tensors=100_000, python_seconds=0.051, overlap_python_seconds=0.049),
        ],
    }
    bars = {bar.what: bar for bar in bench_scaling.bars(axes)}
    assert bars["durable: growth / that of the bytes, at worst"].passed is False
    assert bars["blocked: growth / that of the bytes, at worst"].passed
    assert bars["Python: growth / that of the tensors, at worst"].passed
    python = bars["ms of Python in a warm save of 100000 tensors"]
    assert (python.values, python.passed) == ([51.0], False)
    overlap = bars["ms of Python in a warm save of 100000 tensors, with overlap"]
    assert (overlap.values, overlap.passed) == ([49.0], True)


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


def test_what_saves_cost_training_is_measured_in_turn(tmp_path: Path) -> None:
    subjects = [peers.PYSNAP_OVERLAP, peers.FLOOR]
    arguments = {"subjects": subjects, "loop": training.PYTHON, "parameters": 100_000}
    job = jobs.Job("lost", "", arguments | {"rounds": 2, "seconds": None})
    result = jobs.run(job, tmp_path, lambda _: None)
    # Another one begins each time.
    assert [row["subject"] for row in result["with"]] == subjects + subjects[::-1]
    assert len(result["without"]) == len(result["with"]) + 1
    steps = {row["subject"]: row["steps"] for row in result["with"]}
    assert {row["steps"] for row in result["without"]} == {min(steps.values())}
    assert min(steps.values()) >= 5
    for row in result["with"]:
        assert 0 < row["blocked_seconds"] < row["seconds"]
    assert list(tmp_path.rglob("*.raw")) == []


def test_coders_are_judged_on_a_trained_model(tmp_path: Path) -> None:
    told: list[str] = []
    result = jobs.run(jobs.Job("coders", "", {"steps": 1, "repeats": 1}), tmp_path, told.append)
    assert (result["trained"]["steps"], set(result["kinds"])) == (1, set(coding.KINDS))
    assert [told[0], told[-1]] == ["training, step 1 of 1", "repetition 1 of 1"]
    coding_bars = [bar for bar in report.bars(made(coders=result)) if bar.values]
    assert len(coding_bars) == 8
    for kind in result["kinds"].values():
        (row,) = kind["coders"][coders.ZSTD]
        # A result of its own for each chunk, in memory that was touched by the last.
        assert row["new_pages"] < coders.CHUNK_SIZE // mmap.PAGESIZE // 4


@pytest.fixture
def weights() -> Payload:
    """Two chunks, the second shorter."""
    values = torch.randn(2**21 + 2**15, generator=torch.Generator().manual_seed(1))
    return Payload("bfloat16", values.bfloat16().view(torch.uint8).numpy().data)


def test_coders_take_turns_on_every_kind(weights: Payload, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    opened = coders.open_coder

    def open_coder(name: str, payload: Payload) -> coders.Coder:
        coder = opened(name, payload)
        encode = coder.encode

        def noted(raw: bytearray) -> bytes | memoryview:
            turns.append((name, len(raw)))
            return encode(raw)

        monkeypatch.setattr(coder, "encode", noted)
        return coder

    monkeypatch.setattr(coders, "open_coder", open_coder)
    monkeypatch.setattr(coding, "COMPARED", (coders.PYSNAP, coders.ZSTD))
    told: list[str] = []
    result = coding.compare({"bf16 weights": weights}, 2, told.append)
    sizes = [2**22, 2**16]
    # Once for the time, once to have what is decoded.
    pysnap, zstd = ([(name, size) for size in sizes] * 2 for name in (coders.PYSNAP, coders.ZSTD))
    assert turns == pysnap + zstd + zstd + pysnap + pysnap + zstd
    kind = result["kinds"]["bf16 weights"]
    assert kind["raw_bytes"] == len(weights.bytes)
    stored = {name: {row["stored_bytes"] for row in rows} for name, rows in kind["coders"].items()}
    (ours,), (theirs,) = stored[coders.PYSNAP], stored[coders.ZSTD]
    assert ours < theirs < kind["raw_bytes"]
    for rows in kind["coders"].values():
        assert len(rows) == 2
        assert min(min(row["encode_seconds"], row["decode_seconds"]) for row in rows) > 0
    assert told == ["first repetition", "repetition 1 of 2", "repetition 2 of 2"]


class Wrong:
    """Decodes to other bytes than it was given; it changes what it is given, as ZipNN does."""

    def encode(self, raw: bytearray) -> bytes:
        stored = bytes(raw)
        raw[:] = bytes(len(raw))
        return stored

    def decode(self, stored: bytes, size: int) -> bytes:
        return stored if size == coders.CHUNK_SIZE else stored[:-1] + bytes([stored[-1] ^ 1])


def test_a_coder_that_gives_back_other_bytes_is_no_measurement(
    weights: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coders, "open_coder", lambda *_: Wrong())
    with pytest.raises(coding.WrongBytesError, match=r"^pysnap, bf16 weights: chunk 1 is"):
        coding.compare({"bf16 weights": weights}, 1, lambda _: None)


def test_a_coder_that_is_not_installed_is_left_out_with_the_reason(
    weights: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zipnn", None)
    result = coding.compare({"bf16 weights": weights}, 0, lambda _: None)
    assert result["missing"] == {coders.ZIPNN: "zipnn is not installed"}
    assert result["kinds"]["bf16 weights"]["coders"] == {coders.PYSNAP: [], coders.ZSTD: []}


@pytest.mark.parametrize("name", [coders.PYSNAP, coders.ZSTD, coders.MEMCPY])
def test_a_coder_gives_back_what_cannot_be_made_smaller(name: str) -> None:
    noise = torch.randint(256, (10_000,), generator=torch.Generator().manual_seed(1))
    data = noise.to(torch.uint8).numpy().data
    coder = coders.open_coder(name, Payload("uint8", data))
    stored = bytes(coder.encode(bytearray(data)))
    assert len(stored) >= len(data)
    assert bytes(coder.decode(stored, len(data))) == data


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
    assert 0 < row["overlap_python_seconds"] < row["overlap_seconds"]
    assert row["bytes"] > row["manifest_bytes"] > 0


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(jobs.JobError, match=r"saves: nobody ended with status 1:(.|\n)*KeyError"):
        arguments = {"subject": "nobody", "parameters": 1000, "repeats": 0, "host_memory": None}
        jobs.run(jobs.Job("saves", "nobody", arguments), tmp_path, lambda _: None)


def test_the_floor_of_copying_is_the_fastest_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    floor = MemcpyFloor([torch.arange(1000.0), torch.arange(7)])
    for way in (floor.fastest(), "memmove, 1 threads", "torch copy_"):
        floor.clear()
        assert not floor.is_copied()
        assert floor.measure(way) > 0
        assert floor.is_copied()
    monkeypatch.setattr(floor, "measure", lambda way: 1.0 if way == "torch copy_" else 2.0)
    assert floor.fastest() == "torch copy_"


def test_a_save_and_the_copy_beside_it_go_to_memory_that_rested_while_the_state_advanced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def noted(owner: type, name: str, word: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            calls.append(word)
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    noted(State, "advance", "advance")
    noted(WriteFloor, "measure", "write")
    noted(MemcpyFloor, "clear", "touch")
    noted(peers.Pysnap, "wait_ready", "touched")
    noted(peers.Pysnap, "save", "save")
    monkeypatch.setattr(MemcpyFloor, "fastest", lambda _: "memmove, 1 threads")
    noted(MemcpyFloor, "measure", "copy")
    measured = measure_saves(
        subject=peers.PYSNAP,
        parameters=100_000,
        repeats=2,
        host_memory=None,
        directory=str(tmp_path),
        tell=lambda _: None,
    )
    warm = ["write", "advance", "copy", "copy", "advance", "save"]
    first = ["write", "touch", "advance", "copy", "copy", "touched", "advance", "save"]
    assert calls == first + 2 * warm
    for row in measured["first"] + measured["warm"]:
        assert row["memcpy_floor"] == "memmove, 1 threads"
        assert min(row["memcpy_seconds"], row["memcpy_again_seconds"]) > 0


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
