"""CUDA devices: the engine on a driver of ours, without a GPU, and whole runs on a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same

import pysnap
from pysnap import _engine

ROOT = Path(__file__).parent.parent


# On a driver of ours


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a `libcuda.so.1` that tests/cpp/fake_cuda describes."""
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(
        [
            *os.environ.get("CXX", "c++").split(),
            *("-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"),
            str(ROOT / "tests" / "cpp" / "fake_cuda" / "fake_cuda.cpp"),
            *("-o", str(folder / "libcuda.so.1"), "-lpthread"),
        ],
        check=True,
        timeout=120,
    )
    return folder


@pytest.mark.parametrize("eager", [-1, 0, 3], ids=["all at once", "all later", "some later"])
def test_devices_are_captured_and_put_back(tmp_path: Path, driver: Path, eager: int) -> None:
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "device_run.py"), str(tmp_path), str(eager)],
        env=environment,
        check=True,
        timeout=120,
    )


def run_on(driver: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"LD_LIBRARY_PATH": str(driver)},
        cwd=ROOT / "tests",
        check=False,
        timeout=120,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_memory_that_cannot_be_locked_is_told_once_and_the_snapshot_is_exact(
    tmp_path: Path, driver: Path
) -> None:
    done = run_on(driver, "device_training.py", str(tmp_path))
    assert done.returncode == 0, done.stdout


REFUSED = """
import sys
from device_run import controls
from pysnap.cli import main
if sys.argv[2] == "refused":
    controls()["fail_call"](b"cuMemHostRegister_v2", 1, 2)
sys.exit(main(["doctor", sys.argv[1]]))
"""


@pytest.mark.parametrize("answer", ["refused", "granted"])
def test_the_doctor_says_whether_memory_can_be_locked(
    tmp_path: Path, driver: Path, answer: str
) -> None:
    done = run_on(driver, "-c", REFUSED, str(tmp_path), answer)
    text = " ".join(done.stdout.split())
    if answer == "refused":
        assert done.returncode == 1, done.stdout
        assert "pinned memory cannot be had: registering staging memory failed" in text
        assert "ulimit -l" in text
    else:
        assert done.returncode == 0, done.stdout
        assert "pinned memory can be had" in text


def test_why_cuda_cannot_be_used_is_a_sentence(driver: Path) -> None:
    code = "from pysnap import _engine; print(_engine.cuda_unavailable())"
    broken = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LD_LIBRARY_PATH": ""},
        check=True,
        timeout=60,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()
    if torch.cuda.is_available():
        assert broken == "None"
    else:
        assert broken.startswith("CUDA devices cannot be used: ")


# On a GPU


def program(device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(512, 512), torch.nn.BatchNorm1d(512), torch.nn.Linear(512, 8)
    ).to(device)
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    device = next(net.parameters()).device
    optimizer.zero_grad()
    net(torch.randn(64, 512, device=device)).square().mean().backward()
    optimizer.step()


def values(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {f"model/{name}": t.cpu().clone() for name, t in net.state_dict().items()}
    for index, held in optimizer.state_dict()["state"].items():
        state |= {f"{index}/{name}": t.cpu().clone() for name, t in held.items()}
    return state


def stored(path: Path) -> dict[str, Any]:
    loaded = pysnap.load(path)
    state = {f"model/{name}": t for name, t in loaded["model"].items()}
    for index, held in loaded["optimizer"]["state"].items():
        state |= {f"{index}/{name}": t for name, t in held.items()}
    return state


@pytest.mark.cuda
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("host_memory", ["64MiB", "8MiB"])
def test_a_snapshot_is_the_state_of_one_moment(
    tmp_path: Path, overlap: bool, host_memory: str
) -> None:
    net, optimizer = program("cuda")
    keep = pysnap.Keep(last=None)
    with pysnap.Snapshotter(
        tmp_path,
        model=net,
        optimizer=optimizer,
        every=1,
        keep=keep,
        overlap=overlap,
        host_memory=host_memory,
    ) as snapshotter:
        expected = []
        for _ in range(20):
            with snapshotter.step():
                train(net, optimizer)
            expected.append(values(net, optimizer))
    paths = sorted(tmp_path.glob("step-*"))
    assert len(paths) > 2
    for path in paths:
        assert_same(stored(path), expected[int(path.name.removeprefix("step-")) - 1])


@pytest.mark.cuda
@pytest.mark.parametrize(("before", "after"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_snapshot_is_put_back_on_any_device(tmp_path: Path, before: str, after: str) -> None:
    net, optimizer = program(before)
    train(net, optimizer)
    with pysnap.Snapshotter(tmp_path, model=net, optimizer=optimizer) as snapshotter:
        snapshotter.save().wait()
    expected = values(net, optimizer)
    net, optimizer = program(after)
    train(net, optimizer)
    addresses = [parameter.data_ptr() for parameter in net.parameters()]
    with pysnap.Snapshotter(tmp_path, model=net, optimizer=optimizer) as snapshotter:
        snapshotter.resume()
    assert_same(values(net, optimizer), expected)
    assert [parameter.data_ptr() for parameter in net.parameters()] == addresses


def snapshots_of(
    folder: Path, steps: int, parts: dict[str, Any], step: Callable[[], None]
) -> list[dict[str, Any]]:
    """Takes one at every step; the state at each of their moments. Checks them."""
    expected = []
    with pysnap.Snapshotter(folder, every=1, keep=pysnap.Keep(last=None), **parts) as snapshotter:
        for _ in range(steps):
            with snapshotter.step():
                step()
            expected.append(values(parts["model"], parts["optimizer"]))
    paths = sorted(folder.glob("step-*"))
    assert len(paths) > 1
    for path in paths:
        assert_same(stored(path), expected[int(path.name.removeprefix("step-")) - 1])
    return expected


@pytest.mark.cuda
def test_a_scaler_that_skips_a_step_and_accumulated_gradients(tmp_path: Path) -> None:
    net, optimizer = program("cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**120, growth_interval=2)
    train(net, optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(2):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = net(torch.randn(64, 512, device="cuda")).square().mean()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    snapshots_of(tmp_path, 12, {"model": net, "optimizer": optimizer, "scaler": scaler}, step)
    scale = scaler.get_scale()
    assert scale < 2.0**120  # steps were skipped
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1.0})
    with pysnap.Snapshotter(tmp_path, model=net, optimizer=optimizer, scaler=scaler) as snapshotter:
        snapshotter.resume()
    assert scaler.get_scale() == scale


@pytest.mark.cuda
def test_a_second_optimizer_that_steps_at_other_times(tmp_path: Path) -> None:
    net, optimizer = program("cuda")
    other = torch.nn.Linear(512, 512, device="cuda")
    second = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    count = 0

    def step() -> None:
        nonlocal count
        train(net, optimizer)
        if count % 3 == 0:
            train(other, second)
        count += 1

    parts = {"model": net, "optimizer": optimizer, "other": other, "second": second}
    snapshots_of(tmp_path, 9, parts, step)
    assert torch.equal(pysnap.load(tmp_path)["other"]["weight"], other.state_dict()["weight"].cpu())


@pytest.mark.cuda
def test_a_compiled_step(tmp_path: Path) -> None:
    net, optimizer = program("cuda")
    compiled = torch.compile(net, backend="eager")

    def step() -> None:
        optimizer.zero_grad()
        compiled(torch.randn(64, 512, device="cuda")).square().mean().backward()
        optimizer.step()

    step()
    snapshots_of(tmp_path, 6, {"model": net, "optimizer": optimizer}, step)


@pytest.mark.cuda
@pytest.mark.parametrize("captured", ["before", "beside snapshots"])
def test_a_step_that_is_replayed_as_a_graph(tmp_path: Path, captured: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 8)).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, capturable=True)
    batch = torch.randn(64, 512, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def plain() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(batch).square().mean().backward()
        optimizer.step()

    def capture() -> None:
        with torch.cuda.graph(graph):
            plain()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own gap
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            plain()
    torch.cuda.current_stream().wait_stream(side)
    done = 0

    def step() -> None:
        nonlocal done
        if captured == "beside snapshots" and done == 3:
            capture()
        if captured == "before" or done >= 3:
            graph.replay()
        else:
            plain()
        done += 1

    if captured == "before":
        capture()
    snapshots_of(tmp_path, 9, {"model": net, "optimizer": optimizer}, step)


@pytest.mark.cuda
def test_thousands_of_tiny_tensors(tmp_path: Path) -> None:
    tensors = [torch.full((), float(i), device="cuda") for i in range(5000)]
    with pysnap.Snapshotter(tmp_path, state=tensors) as snapshotter:
        snapshotter.save().wait()
        for tensor in tensors:
            tensor.zero_()
        snapshotter.resume()
    assert torch.stack(tensors).tolist() == [float(i) for i in range(5000)]


@pytest.mark.cuda
def test_tensors_of_two_devices_come_back_where_they_were(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    before = {"a": torch.randn(10_000, device="cuda:0"), "b": torch.randn(10_000, device="cuda:1")}
    with pysnap.Snapshotter(tmp_path, state=before) as snapshotter:
        snapshotter.save().wait()
    # The other way round, too.
    after = {"a": torch.zeros(10_000, device="cuda:1"), "b": torch.zeros(10_000, device="cuda:0")}
    with pysnap.Snapshotter(tmp_path, state=after) as snapshotter:
        snapshotter.resume()
    for name, tensor in after.items():
        assert torch.equal(tensor.cpu(), before[name].cpu())


@pytest.mark.cuda
def test_random_numbers_of_a_device_go_on(tmp_path: Path) -> None:
    torch.rand(10, device="cuda")
    with pysnap.Snapshotter(tmp_path, state={}) as snapshotter:
        snapshotter.save().wait()
        expected = torch.rand(10, device="cuda")
        torch.rand(1000, device="cuda")
        snapshotter.resume()
        assert torch.equal(torch.rand(10, device="cuda"), expected)


@pytest.mark.cuda
def test_the_demo_is_exact_on_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pysnap", "demo", "--quick", "--steps=20", "--every=3 steps"]
    subprocess.run(
        [*command, "--device=cuda", f"--out={tmp_path / 'out'}"], check=True, timeout=120
    )


def test_the_engine_gets_the_current_stream_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from pysnap.layout import HOST, current_streams

    class Stream:
        def __init__(self, device: int) -> None:
            self.cuda_stream = 1000 + device

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert current_streams([1, HOST, 0, 1]) == [(0, 1000), (1, 1001)]


def test_the_engine_knows_the_places_of_tensors() -> None:
    from pysnap.layout import HOST, current_streams, device_index

    assert device_index(torch.zeros(1)) == HOST
    assert device_index(torch.zeros(1, device="meta")) is None
    assert current_streams([HOST]) == []
    assert (_engine.cuda_unavailable() is None) == torch.cuda.is_available()
