"""The pieces of `python -m pysnap demo`, each alone and on made-up runs."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pysnap.demo import overhead, run
from pysnap.errors import ConfigError, Error, NotFoundError

torch = pytest.importorskip("torch", reason="the model of the demo needs torch")

from pysnap.demo import data, model, train  # noqa: E402  # all import torch

STEPS, KILL_AT, RESUMED_FROM = 20, 13, 10


@pytest.fixture(autouse=True)
def no_cadence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYSNAP_EVERY", raising=False)


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Puts back the random states, the threads and the determinism that a test may set."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def step(number: int) -> run.Step:
    return run.Step(
        number, (5.0 / number).hex(), (0.1 / number).hex(), f"batch {number}", 0.05, number * 0.1
    )


def snapshot(number: int) -> run.Snapshot:
    return run.Snapshot(
        number, 0.002, 0.3, 10_000_000, 8_000_000, f"step-{number:09d}", number * 0.1 + 0.03
    )


def attempt(first: int, last: int) -> run.Attempt:
    start = {"step": first - 1, "resume_seconds": 0.02, "parameters": 7, "torch": "2.0"}
    return run.Attempt(
        start_step=first - 1,
        start=start,
        steps=[step(number) for number in range(first, last + 1)],
        snapshots=[snapshot(number) for number in range(first, last + 1) if number % 5 == 0],
    )


def end() -> dict[str, Any]:
    return {
        "tensors": {"model.weight": "float32 (2,) ab", "optimizer.0": "float32 () cd"},
        "values": {"scheduler.last_epoch": "20"},
        "rngs": {"python": "1", "numpy": "2", "torch": "3"},
        "next_batch": "ef",
    }


def story() -> run.Story:
    return run.Story(
        plan=run.Plan(steps=STEPS, every="5 steps", layers=1, width=32),
        kill_at=KILL_AT,
        uninterrupted=attempt(1, STEPS),
        killed=attempt(1, KILL_AT),
        resumed=attempt(RESUMED_FROM + 1, STEPS),
        uninterrupted_end=end(),
        resumed_end=end(),
    )


def differences(told: run.Story) -> list[str]:
    return [difference for row in told.compare() for difference in row.differences]


# Comparison


def test_equal_runs_have_no_difference_and_everything_is_counted() -> None:
    compared = {row.what: row.compared for row in story().compare()}
    assert differences(story()) == []
    assert compared == {
        "processes with every step in order": 3,
        "losses, per step": KILL_AT + STEPS - RESUMED_FROM,
        "learning rates, per step": KILL_AT + STEPS - RESUMED_FROM,
        "batches, per step": KILL_AT + STEPS - RESUMED_FROM,
        "tensors of model and optimizer": 2,
        "other values of the state": 1,
        "random number generators": 3,
        "first batch of the next epoch": 1,
    }


@pytest.mark.parametrize("column", ["loss", "learning_rate", "batch"])
@pytest.mark.parametrize("name", ["killed", "resumed"])
def test_one_different_step_is_named(column: str, name: str) -> None:
    told = story()
    steps = getattr(told, name).steps
    steps[-1] = replace(steps[-1], **{column: "0x1.0p+1"})
    expected = getattr(step(steps[-1].step), column)
    assert differences(told) == [f"step {steps[-1].step} ({name}): 0x1.0p+1 instead of {expected}"]


@pytest.mark.parametrize("section", ["tensors", "values", "rngs"])
def test_a_different_or_missing_or_extra_entry_of_the_end_state_is_named(section: str) -> None:
    told = story()
    entries = told.resumed_end[section]
    key = next(iter(entries))
    entries[key] = "other"
    assert [text.split(":")[0] for text in differences(told)] == [key]
    del entries[key]
    entries["more"] = "x"
    assert sorted(text.split(":")[0] for text in differences(told)) == sorted([key, "more"])


def test_another_next_batch_is_a_difference() -> None:
    told = story()
    told.resumed_end["next_batch"] = "00"
    assert differences(told) == ["next batch: 00 instead of ef"]


def test_a_missing_step_is_a_difference() -> None:
    told = story()
    del told.resumed.steps[3]
    assert "step 14 (resumed): nothing instead of " + step(14).loss in differences(told)
    assert "the resumed run did not log each step from 11 to 20 once, in order" in differences(told)


def test_a_step_that_ran_twice_in_one_process_is_a_difference() -> None:
    told = story()
    told.resumed.steps.insert(1, told.resumed.steps[1])
    assert differences(told) == [
        "the resumed run did not log each step from 11 to 20 once, in order"
    ]


def test_a_resume_behind_a_durable_snapshot_is_a_difference() -> None:
    told = replace(story(), resumed=attempt(6, STEPS))
    assert differences(told) == [
        "the resumed run went on from step 5, although the snapshot of step 10 had been reported "
        "durable"
    ]


@pytest.mark.parametrize("first", [1, KILL_AT + 2])
def test_a_resume_from_no_snapshot_is_a_difference(first: int) -> None:
    told = replace(story(), resumed=attempt(first, STEPS))
    assert differences(told) == [
        f"the resumed run went on from step {first - 1}, which is no snapshot of the run that was "
        f"killed after step 13"
    ]


# The kill


def test_the_kill_follows_two_snapshots_in_mid_epoch_and_depends_on_the_seed() -> None:
    def chosen(seed: int) -> int:
        return run.choose_kill(
            random.Random(seed), steps=40, steps_per_epoch=20, snapshots=[5, 10, 15, 35]
        )

    kills = {chosen(seed) for seed in range(500)}
    assert kills == set(range(11, 40)) - {20}
    assert chosen(7) == chosen(7)


def test_the_kill_follows_the_only_early_snapshot() -> None:
    for snapshots in ([10], [10, 20]):
        kill = run.choose_kill(random.Random(0), steps=20, steps_per_epoch=10, snapshots=snapshots)
        assert 10 < kill < 20


@pytest.mark.parametrize("snapshots", [[], [20], [19]])
def test_no_early_snapshot_is_refused(snapshots: list[int]) -> None:
    with pytest.raises(ConfigError, match="choose a shorter --every"):
        run.choose_kill(random.Random(0), steps=20, steps_per_epoch=10, snapshots=snapshots)


# The child process and its log


def test_the_log_is_read_as_it_grows_and_a_torn_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "log"
    reader = run.LogReader(path)
    assert list(reader.lines()) == []
    path.write_bytes(b"one\ntw")
    assert list(reader.lines()) == [b"one\n"]
    assert list(reader.lines()) == []
    path.write_bytes(b"one\ntwo\nthree\n")
    assert list(reader.lines()) == [b"two\n", b"three\n"]


def child(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_a_killed_child_leaves_every_line_that_it_wrote(tmp_path: Path) -> None:
    line = {
        "event": "step",
        "loss": "0x1p+1",
        "learning_rate": "0x1p-1",
        "batch": "b",
        "seconds": 1,
        "at": 2.5,
    }
    script = (
        "import json, os, signal\n"
        f"file = os.open({str(tmp_path / 'a.jsonl')!r}, os.O_WRONLY | os.O_CREAT)\n"
        "for step in range(1, 51):\n"
        f"    os.write(file, json.dumps({line!r} | {{'step': step}}).encode() + b'\\n')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    seen: list[int] = []
    result, status = run.run_attempt(
        child(script), folder=tmp_path, name="a", on_change=lambda a: seen.append(a.last_step)
    )
    assert status == -signal.SIGKILL
    assert [each.step for each in result.steps] == list(range(1, 51))
    assert result.losses == [2.0] * 50
    assert seen[-1] == 50


def test_a_failing_child_is_reported_with_its_output(tmp_path: Path) -> None:
    _, status = run.run_attempt(
        child("raise SystemExit('no luck')"), folder=tmp_path, name="a", on_change=lambda a: None
    )
    with pytest.raises(Error, match=r"(?s)killed run ended with status 1 instead of -9.*no luck"):
        run.check_status(status, -signal.SIGKILL, what="killed", output=tmp_path / "a.txt")


def test_the_child_dies_with_the_one_who_watches_it(tmp_path: Path) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupt(_: run.Attempt) -> None:
        raise KeyboardInterrupt

    def remembered(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(popen(*args, **options))
        return processes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", remembered)
        with pytest.raises(KeyboardInterrupt):
            run.run_attempt(
                child("import signal; signal.pause()"),
                folder=tmp_path,
                name="a",
                on_change=interrupt,
            )
    assert processes[0].returncode == -signal.SIGKILL


def test_the_child_gets_the_cadence_of_the_user_and_no_rule_of_resuming(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYSNAP_EVERY", "1%")
    monkeypatch.setenv("PYSNAP_RESUME", "off")
    environment = run.child_environment()
    assert environment["PYSNAP_EVERY"] == "1%"
    assert "PYSNAP_RESUME" not in environment


def test_the_child_sees_a_gpu_only_where_it_trains_on_one() -> None:
    assert run.child_environment()["CUDA_VISIBLE_DEVICES"] == ""
    on_gpu = run.child_environment("cuda:1")
    assert on_gpu.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert on_gpu["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_device_that_cannot_be_used_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device=cuda:99", "--quick"]) == 2
    assert "--device is 'cuda:99', which cannot be used: " in capsys.readouterr().err
    assert make_plan_device("--device=cuda:1") == "cuda:1"


def make_plan_device(*argv: str) -> str:
    return run.make_plan(run.parse_arguments(list(argv))).device


# Overhead


def ends_of(periods: list[float]) -> list[float]:
    return list(itertools.accumulate(periods, initial=1000.0))[1:]


def test_overhead_is_the_stall_and_how_much_longer_steps_beside_a_snapshot_take() -> None:
    # Steps of 0.1 s; the one behind which a snapshot is taken has its stall, three more are slow.
    periods = [0.1] * 100
    for taken in (20, 60):
        periods[taken - 1] = 0.13
        periods[taken : taken + 3] = [0.11] * 3
    ends = ends_of(periods)
    flights = [overhead.Flight(taken, 0.03, ends[taken + 2] - 0.01) for taken in (20, 60)]
    found = overhead.measure(ends, flights)
    assert found is not None
    assert found.seconds == pytest.approx(95 * 0.1 + 2 * 0.06)
    assert found.snapshots == 2
    assert found.stall_share == pytest.approx(0.06 / found.seconds)
    assert found.inflation_share == pytest.approx(0.06 / found.seconds)
    assert found.share == pytest.approx(0.12 / found.seconds)
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_a_machine_that_becomes_slower_is_no_overhead() -> None:
    periods = [0.1] * 100 + [0.2] * 100
    ends = ends_of(periods)
    flights = [overhead.Flight(taken, 0.0, ends[taken] - 0.01) for taken in (30, 50, 150, 170)]
    found = overhead.measure(ends, flights)
    assert found is not None and found.share == pytest.approx(0.0, abs=1e-9)


def test_the_first_steps_do_not_count_and_the_error_is_that_of_the_sum() -> None:
    periods = [5.0] * 5 + [0.1] * 95
    periods[29], periods[69] = 0.2, 0.4
    ends = ends_of(periods)
    flights = [overhead.Flight(taken, 0.05, ends[taken - 1] + 0.01) for taken in (3, 30, 70)]
    found = overhead.measure(ends, flights)
    assert found is not None
    assert (found.seconds, found.snapshots) == (pytest.approx(93 * 0.1 + 0.6), 2)
    assert found.share == pytest.approx(0.4 / found.seconds)
    # The costs are 0.1 and 0.3.
    assert found.error == pytest.approx(0.2 / found.seconds)


@pytest.mark.parametrize("taken", [[], list(range(1, 21))])
def test_without_anything_to_compare_the_overhead_is_unknown(taken: list[int]) -> None:
    ends = ends_of([0.1] * 20)
    assert overhead.measure(ends, [overhead.Flight(step, 0.0, ends[-1]) for step in taken]) is None


# The folder


def test_an_earlier_demo_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    run.prepare_folder(out)
    (out / run.INTERRUPTED / "old").touch()
    (out / run.PLOT).touch()
    (out / "mine.txt").touch()
    run.prepare_folder(out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [run.MARKER, run.INTERRUPTED, run.UNINTERRUPTED, "mine.txt"]
    )
    assert list((out / run.INTERRUPTED).iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").write_text("mine")
    assert run.main(["--out", str(tmp_path)]) == 2
    assert (
        f"{tmp_path} is not empty and not the folder of an earlier demo" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    assert run.main(["--out", str(tmp_path / "thesis")]) == 2
    assert (tmp_path / "thesis").read_text() == "mine"


# The command line


def plan_of(*argv: str) -> run.Plan:
    return run.make_plan(run.parse_arguments(argv))


def test_the_options_make_the_plan() -> None:
    assert plan_of() == run.FULL
    assert plan_of("--quick") == run.QUICK
    given = {"steps": 42, "every": "10m", "source": "--every"}
    assert plan_of("--steps", "41", "--every", "10m") == replace(run.FULL, **given)


def test_the_variable_wins_over_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSNAP_EVERY", "1%")
    expected = replace(run.FULL, every="1%", source="PYSNAP_EVERY")
    assert plan_of() == plan_of("--every", "10m") == expected


@pytest.mark.parametrize("source", ["--every", "PYSNAP_EVERY"])
def test_what_is_no_cadence_is_refused_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    pytest.importorskip("matplotlib", reason="the demo asks for it before it starts")
    pytest.importorskip("rich", reason="the demo asks for it before it starts")
    argv = ["--out", str(tmp_path / "out")]
    if source == "--every":
        argv += ["--every", "often"]
    else:
        monkeypatch.setenv("PYSNAP_EVERY", "often")
    assert run.main(argv) == 2
    assert f"{source} is 'often'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--steps", "9"], ["--steps", "many"], ["--fast"]])
def test_senseless_options_exit_with_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(argv)
    assert caught.value.code == 2


def test_a_missing_extra_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name)
    )
    assert run.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "The demo needs rich: pip install 'pysnap[demo]'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("break_it", "status", "verdict"),
    [(False, 0, "THE SAME"), (True, 1, "numpy: 0 instead of 2")],
)
def test_the_exit_status_follows_the_comparison(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    break_it: bool,
    status: int,
    verdict: str,
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    pytest.importorskip("rich", reason="the report needs rich")
    told = story()
    if break_it:
        told.resumed_end["rngs"]["numpy"] = "0"
    monkeypatch.setattr(run, "tell_story", lambda plan, **options: told)
    assert run.main(["--out", str(tmp_path), "--seed", "5"]) == status
    assert verdict in capsys.readouterr().out
    assert (tmp_path / run.PLOT).read_bytes().startswith(b"\x89PNG\r\n")
    report = json.loads((tmp_path / run.REPORT).read_bytes())
    assert report["same"] is not break_it
    assert report["overhead"]["snapshots"] == 3
    assert report["overhead"]["share"] == pytest.approx(0.0)
    assert (report["seed"], report["kill_at"], report["resumed_from"]) == (5, KILL_AT, RESUMED_FROM)


def test_a_failed_run_exits_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the demo asks for it before it starts")
    pytest.importorskip("rich", reason="the progress bars need rich")

    def fail(plan: run.Plan, **options: object) -> run.Story:
        raise Error("the killed run ended with status 1")

    monkeypatch.setattr(run, "tell_story", fail)
    assert run.main(["--out", str(tmp_path)]) == 1
    assert "the killed run ended with status 1" in capsys.readouterr().err


# Data and model


def test_the_text_is_the_standard_library_up_to_the_limit() -> None:
    text = data.standard_library(100_000)
    assert len(text) == 100_000
    assert b"import" in text
    assert data.standard_library(1000) == text[:1000]


def test_the_text_is_in_the_order_of_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "hcagfbed":
        (tmp_path / f"{name}.py").write_text(name)
    (tmp_path / "b.txt").write_text("not a module")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert data.standard_library(7) == b"abcdefg"


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(NotFoundError, match=r"holds no \.py files"):
        data.standard_library(1000)


def test_windows_cover_the_text_evenly() -> None:
    windows = data.Windows(bytes(range(100)), count=4, length=10)
    assert [window.tolist() for window in (windows[0], windows[3])] == [
        list(range(10)),
        list(range(90, 100)),
    ]
    assert [int(windows[index][0]) for index in range(len(windows))] == [0, 30, 60, 90]
    assert windows[0].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[4]
    with pytest.raises(ValueError, match="9 bytes has no window of 10"):
        data.Windows(bytes(9), count=1, length=10)


SMALL = model.Shape(context=16, layers=2, width=32, head_width=16)


def test_the_model_looks_only_back() -> None:
    torch.manual_seed(0)
    gpt = model.GPT(SMALL).eval()
    tokens = torch.randint(0, 256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = gpt(tokens), gpt(changed)
    assert before.shape == (2, 16, 256)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_the_full_model_has_millions_of_parameters_and_tied_weights() -> None:
    gpt = model.GPT(model.Shape(layers=run.FULL.layers, width=run.FULL.width))
    assert 2_000_000 < sum(parameter.numel() for parameter in gpt.parameters()) < 10_000_000
    assert gpt.head.weight is gpt.embedding.weight


# The training program (its loop runs in the end-to-end test of the demo)


def updates(seed: int, disturb: Callable[[], object]) -> list[float]:
    """The losses of three updates from `seed`; `disturb` runs before the last."""
    train.make_deterministic(seed)
    gpt = model.GPT(SMALL)
    optimizer = train.make_optimizer(gpt)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, train.warmup_cosine(10))
    batch = torch.arange(64 * 17).reshape(64, 17) % 256
    losses = [train.train_step(gpt, optimizer, scheduler, batch) for _ in range(2)]
    disturb()
    return [*losses, train.train_step(gpt, optimizer, scheduler, batch)]


def test_the_loss_repeats_and_depends_on_every_random_number_generator() -> None:
    reference = updates(3, lambda: None)
    assert updates(3, lambda: None) == reference
    disturbances: list[Callable[[], object]] = [
        lambda: random.seed(999),
        lambda: np.random.seed(999),
        lambda: torch.manual_seed(999),
    ]
    for disturb in disturbances:
        losses = updates(3, disturb)
        assert losses[:2] == reference[:2]
        assert losses[2] != reference[2]


def test_each_digest_of_a_random_state_follows_its_generator() -> None:
    draws: dict[str, Callable[[], object]] = {
        "python": random.random,
        "numpy": np.random.random_sample,
        "torch": lambda: torch.rand(1),
    }
    for name, draw in draws.items():
        draw()  # the next draw moves only the position in a block of numbers
        before = train.rng_digests()
        assert train.rng_digests() == before
        draw()
        after = train.rng_digests()
        assert {key for key in before if before[key] != after[key]} == {name}


def test_fingerprints_tell_bits_dtypes_shapes_and_paths_apart() -> None:
    def of(value: object) -> tuple[dict[str, str], dict[str, str]]:
        found = train.Fingerprints()
        found.add("root", value)
        return found.tensors, found.values

    zero = torch.zeros(4)
    variants = [
        zero,
        -zero,
        zero.reshape(2, 2),
        zero.to(torch.int32),
        torch.tensor(0.0, dtype=torch.bfloat16),
    ]
    assert len({of(variant)[0]["root"] for variant in variants}) == len(variants)
    assert of(torch.arange(4).reshape(2, 2).T) == of(torch.tensor([[0, 2], [1, 3]]))
    assert of({"a": [1, (0.5, None)], "b": {0: True, "c": "x"}})[1] == {
        "root.a.0": "1",
        "root.a.1.0": "0x1.0000000000000p-1",
        "root.a.1.1": "None",
        "root.b.0": "True",
        "root.b.c": "'x'",
    }
    assert of(0.0) != of(-0.0)
    with pytest.raises(TypeError, match=r"root\.x is a object, which has no fingerprint"):
        of({"x": object()})


def test_the_learning_rate_warms_up_and_decays() -> None:
    factor = train.warmup_cosine(100)
    factors = [factor(number) for number in range(100)]
    assert factors[:10] == pytest.approx([number / 10 for number in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 < factors[-1] < 0.11


def test_the_training_program_takes_the_plan_as_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(train, "train", seen.append)
    assert train.main(["--dir=x", "--attempt=a", "--kill-at=7", *run.QUICK.arguments()]) == 0
    assert seen == [
        argparse.Namespace(
            dir=Path("x"),
            attempt="a",
            epochs=run.EPOCHS,
            steps_per_epoch=run.QUICK.steps_per_epoch,
            batch_size=run.QUICK.batch_size,
            layers=run.QUICK.layers,
            width=run.QUICK.width,
            every=run.QUICK.every,
            device=run.QUICK.device,
            seed=0,
            kill_at=7,
        )
    ]
    assert train.THREADS == run.THREADS
