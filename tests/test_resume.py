"""A resumed run is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import Run, assert_same, flip

import pysnap
from pysnap import reader

STEPS = 18  # three epochs of six batches


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[tuple[int, str]], dict[str, object]]:
    run = Run()
    with pysnap.Snapshotter(
        tmp_path_factory.mktemp("reference"), **run.parts, every="off"
    ) as snapshotter:
        losses = list(run.train(snapshotter))
    assert len(losses) == STEPS
    return losses, run.state()


@pytest.mark.parametrize("cut", range(1, STEPS + 1))
def test_resume_after_every_step(
    tmp_path: Path, cut: int, uninterrupted: tuple[list[tuple[int, str]], dict[str, object]]
) -> None:
    losses, final = uninterrupted
    first = Run()
    with pysnap.Snapshotter(tmp_path, **first.parts, every=cut) as snapshotter:
        for step, _ in first.train(snapshotter):
            if step == cut:
                break

    second = Run(seed=99)
    with pysnap.Snapshotter(tmp_path, **second.parts) as snapshotter:
        assert snapshotter.resume() is not None
        assert snapshotter.progress.step == cut
        assert list(second.train(snapshotter)) == losses[cut:]
    assert_same(second.state(), final)


def test_snapshots_at_the_end_of_an_epoch(
    tmp_path: Path, uninterrupted: tuple[list[tuple[int, str]], dict[str, object]]
) -> None:
    losses, final = uninterrupted
    first = Run()
    with pysnap.Snapshotter(tmp_path, **first.parts, every="1 epoch") as snapshotter:
        for step, _ in first.train(snapshotter):
            if step == 8:
                break
    second = Run(seed=99)
    with pysnap.Snapshotter(tmp_path, **second.parts) as snapshotter:
        snapshotter.resume()
        progress = snapshotter.progress
        assert (progress.step, progress.epoch, progress.batch) == (6, 1, 0)
        assert list(second.train(snapshotter)) == losses[6:]
    assert_same(second.state(), final)


def test_a_snapshot_between_two_epochs_does_not_repeat_one(
    tmp_path: Path, uninterrupted: tuple[list[tuple[int, str]], dict[str, object]]
) -> None:
    losses, final = uninterrupted
    first = Run()
    with pysnap.Snapshotter(tmp_path, **first.parts) as snapshotter:
        epochs = snapshotter.epochs(3)
        next(epochs)
        for batch in first.loader:
            with snapshotter.step():
                loss = (first.model(batch) - batch).square().mean()
                first.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(first.model.parameters(), 1.0)
                first.optimizer.step()
                first.scheduler.step()
        # After the loop over the loader and before the next epoch: where validation stands.
        snapshotter.save().wait()
    second = Run(seed=99)
    with pysnap.Snapshotter(tmp_path, **second.parts) as snapshotter:
        snapshotter.resume()
        assert list(second.train(snapshotter)) == losses[6:]
    assert_same(second.state(), final)


def test_every_snapshot_is_readable_without_the_engine(tmp_path: Path) -> None:
    run = Run()
    with pysnap.Snapshotter(
        tmp_path, **run.parts, every=5, keep=pysnap.Keep(last=None)
    ) as snapshotter:
        list(run.train(snapshotter))
    paths = sorted(tmp_path.glob("step-*"))
    assert paths
    for path in paths:
        assert reader.verify(path) == []
    newest = reader.read_snapshot(paths[-1]).tensors()
    loaded = pysnap.load(tmp_path)
    for name, tensor in loaded["model"].items():
        assert newest[f"model/{name}"].tobytes() == tensor.numpy().tobytes()


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import pysnap
from support import Run

run = Run(seed=int(sys.argv[2]))
kill_at = int(sys.argv[3])
with pysnap.Snapshotter(sys.argv[1], **run.parts, every=2) as snapshotter:
    snapshotter.resume()
    for step, loss in run.train(snapshotter):
        if step == 4:
            snapshotter.save().wait()
        os.write(1, f"{{step}} {{loss}}\\n".encode())
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def child(path: Path, seed: int, kill_at: int) -> tuple[int, list[tuple[int, str]]]:
    code = CHILD.format(tests=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(seed), str(kill_at)],
        cwd=path.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    return done.returncode, [(int(step), loss) for step, loss in rows]


def test_sigkill_in_mid_epoch_and_a_fresh_process(
    tmp_path: Path, uninterrupted: tuple[list[tuple[int, str]], dict[str, object]]
) -> None:
    losses, _ = uninterrupted
    repository = tmp_path / "run"
    status, before = child(repository, seed=0, kill_at=9)
    assert status == -signal.SIGKILL and before == losses[:9]
    status, after = child(repository, seed=7, kill_at=0)
    assert status == 0
    assert 5 <= after[0][0] <= 9 and after == losses[after[0][0] - 1 :]
    assert not [name for name in os.listdir(repository) if name.startswith((".partial", ".trash"))]


def test_a_damaged_newest_snapshot_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    with pysnap.Snapshotter(tmp_path, **run.parts) as snapshotter:
        for step, _ in run.train(snapshotter):
            if step in (3, 5):
                snapshotter.save().wait()
    pack = tmp_path / "step-000000005" / "0.pack"
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    second = Run()
    with pysnap.Snapshotter(tmp_path, **second.parts) as snapshotter:
        snapshot = snapshotter.resume()
        assert snapshot is not None and snapshot.step == 3 and snapshotter.progress.step == 3
    assert any(
        "step-000000005" in record.message and record.levelname == "WARNING"
        for record in caplog.records
    )


def test_errors_after_a_damaged_snapshot_tell_that_objects_were_touched(tmp_path: Path) -> None:
    values, model = {"x": torch.arange(10.0)}, torch.nn.Linear(2, 2)
    with pysnap.Snapshotter(tmp_path, values=values, keep=pysnap.Keep(last=None)) as snapshotter:
        snapshotter.save().wait()
    with pysnap.Snapshotter(tmp_path, values=values, model=model) as snapshotter:
        snapshotter.progress.step = 5
        snapshotter.save().wait()
    flip(tmp_path / "step-000000005" / "0.pack", 3)
    # The newest is damaged, and the one before it was taken without the model.
    message = mismatch(tmp_path, values=values, model=model)
    assert "model" in message and "partly overwritten" in message

    flip(tmp_path / "step-000000000" / "0.pack", 3)
    with (
        pysnap.Snapshotter(tmp_path, values=values) as snapshotter,
        pytest.raises(pysnap.CorruptError, match="partly overwritten"),
    ):
        (tmp_path / "step-000000005").rename(tmp_path.parent / "elsewhere")
        snapshotter.resume()


def test_snapshots_that_exist_but_are_unusable_never_mean_a_fresh_start(tmp_path: Path) -> None:
    run = Run()
    with pysnap.Snapshotter(tmp_path, **run.parts) as snapshotter:
        next(run.train(snapshotter))
        snapshotter.save().wait()
    manifest = tmp_path / "step-000000001" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with (
        pysnap.Snapshotter(tmp_path, **Run().parts) as snapshotter,
        pytest.raises(pysnap.CorruptError, match="nothing was changed"),
    ):
        snapshotter.resume()


def test_a_step_that_is_taken_again_replaces_the_older_snapshot(tmp_path: Path) -> None:
    values = {"n": 1}
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        snapshotter.save().wait()
        values["n"] = 2
        info = snapshotter.save().wait()
    assert info.path.name == "step-000000000.1"
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000.1"]
    assert pysnap.load(tmp_path)["values"] == {"n": 2}


def test_newest_is_the_one_taken_last_not_the_one_with_the_largest_step(tmp_path: Path) -> None:
    run = Run()
    with pysnap.Snapshotter(tmp_path, **run.parts) as snapshotter:
        for step, _ in run.train(snapshotter):
            if step == 4:
                break
        snapshotter.save().wait()
        snapshotter.progress.step = 2
        snapshotter.save().wait()
    assert pysnap.load(tmp_path)["progress"]["step"] == 2


def test_restore_goes_into_the_live_tensors(tmp_path: Path) -> None:
    run = Run()
    with pysnap.Snapshotter(tmp_path, **run.parts) as snapshotter:
        next(run.train(snapshotter))
        snapshotter.save().wait()
        expected = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        addresses = {name: tensor.data_ptr() for name, tensor in run.model.state_dict().items()}
        for parameter in run.model.parameters():
            torch.nn.init.zeros_(parameter)
        snapshotter.resume()
        assert {
            name: tensor.data_ptr() for name, tensor in run.model.state_dict().items()
        } == addresses
        assert_same(dict(run.model.state_dict()), expected)


def test_plain_containers_are_filled_in_place(tmp_path: Path) -> None:
    values, history, tensor = {"lr": 0.1}, [1, 2], torch.arange(3)
    with pysnap.Snapshotter(tmp_path, values=values, history=history, tensor=tensor) as snapshotter:
        snapshotter.save().wait()
        values["lr"], values["new"] = 5.0, 1.0
        history.append(3)
        tensor.zero_()
        snapshotter.resume()
    assert values == {"lr": 0.1} and history == [1, 2] and tensor.tolist() == [0, 1, 2]


def test_a_generator_in_a_container_is_the_programs_own_again(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {"generator": generator, "nested": [{"n": 1}]}
    nested = values["nested"]
    with pysnap.Snapshotter(tmp_path, values=values, own=generator) as snapshotter:
        snapshotter.save().wait()
        expected = torch.rand(3, generator=generator)
        nested[0]["n"] = 2  # type: ignore[index]  # a list
        snapshotter.resume()
    assert torch.equal(torch.rand(3, generator=generator), expected)
    assert values["nested"] is nested and nested == [{"n": 1}]


def test_a_conjugated_tensor_is_filled_with_its_values(tmp_path: Path) -> None:
    tensor = torch.complex(torch.ones(3), torch.arange(3.0))
    values = {"x": tensor.conj()}
    expected = values["x"].resolve_conj().clone()
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        snapshotter.save().wait()
        tensor.zero_()
        snapshotter.resume()
    assert torch.equal(values["x"], expected)


def test_leaves_that_cannot_be_filled_are_replaced(tmp_path: Path) -> None:
    values = {"array": np.arange(8)[::2], "expanded": torch.tensor(3.0).expand(4)}
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        snapshotter.save().wait()
        snapshotter.resume()
    assert values["array"].tolist() == [0, 2, 4, 6] and values["expanded"].tolist() == [3.0] * 4


def test_the_default_device_of_the_program_does_not_matter(tmp_path: Path) -> None:
    """New tensors were made on the default device and read as host memory: a crash."""
    path = pysnap.save(tmp_path / "s", {"x": torch.arange(5), "y": torch.zeros(0, 2)})
    with torch.device("meta"):
        loaded = pysnap.load(path)
    assert loaded["x"].tolist() == [0, 1, 2, 3, 4]


def test_a_snapshot_that_is_no_run_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    values = {"x": torch.zeros(3)}
    with pysnap.Snapshotter(tmp_path, values=values) as snapshotter:
        pysnap.save(tmp_path / "step-000000005", {"values": {"x": torch.ones(3)}})
        with pytest.raises(pysnap.MismatchError, match="not taken by a Snapshotter"):
            snapshotter.resume()
    assert not values["x"].any()


def mismatch(tmp_path: Path, **parts: object) -> str:
    with (
        pysnap.Snapshotter(tmp_path, **parts) as snapshotter,
        pytest.raises(pysnap.MismatchError) as caught,
    ):
        snapshotter.resume()
    return str(caught.value)


def test_a_model_whose_shapes_changed_is_refused_untouched(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, model=torch.nn.Linear(3, 4)) as snapshotter:
        snapshotter.save().wait()
    model = torch.nn.Linear(3, 5)
    before = model.weight.detach().clone()
    message = mismatch(tmp_path, model=model)
    assert (
        "model/weight" in message
        and "float32[5, 3]" in message
        and "float32[4, 3]" in message
        and "nothing was changed" in message
    )
    assert torch.equal(model.weight, before)


def test_missing_and_unexpected_objects_are_named_together(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, model=torch.nn.Linear(3, 4), old={"a": 1}) as snapshotter:
        snapshotter.save().wait()
    message = mismatch(tmp_path, model=torch.nn.Linear(3, 4, bias=False), new={"b": 1})
    assert "old" in message and "new" in message and "model/bias" in message


def test_other_parameter_groups_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    with pysnap.Snapshotter(
        tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters())
    ) as snapshotter:
        snapshotter.save().wait()
    with torch.no_grad():
        model.weight.zero_()
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}])
    assert "[1, 1]" in mismatch(tmp_path, model=model, optimizer=optimizer)
    assert not model.weight.any()


def test_another_loader_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    def loader(length: int) -> object:
        return pysnap.resumable(torch.utils.data.DataLoader(range(length), batch_size=2))  # type: ignore[arg-type]  # a range is a dataset

    model = torch.nn.Linear(3, 4)
    with pysnap.Snapshotter(tmp_path, model=model, loader=loader(10)) as snapshotter:
        snapshotter.save().wait()
    with torch.no_grad():
        model.weight.zero_()
    assert "dataset length was 10, is 12" in mismatch(tmp_path, model=model, loader=loader(12))
    assert not model.weight.any()


def test_tensors_tied_live_but_not_in_the_snapshot_are_refused(tmp_path: Path) -> None:
    with pysnap.Snapshotter(
        tmp_path, values={"a": torch.ones(3), "b": torch.zeros(3)}
    ) as snapshotter:
        snapshotter.save().wait()
    shared = torch.full((3,), 7.0)
    assert "tied" in mismatch(tmp_path, values={"a": shared, "b": shared})
    assert shared.tolist() == [7.0] * 3


def test_a_snapshot_of_pysnap_save_is_no_run(tmp_path: Path) -> None:
    with pysnap.Snapshotter(tmp_path, values={"a": 1}) as snapshotter:
        snapshotter.save().wait()
    path = tmp_path / "step-000000000"
    manifest = json.loads((path / "manifest.json").read_bytes())["snapshot"]
    assert set(manifest["tree"]) == {"values", "progress", "rng"}
