"""CUDA devices: the engine on a driver of ours, without a GPU, and whole runs on a real one."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_the_engine_knows_the_places_of_tensors() -> None:
    from pysnap.layout import HOST, current_streams, device_index

    assert device_index(torch.zeros(1)) == HOST
    assert device_index(torch.zeros(1, device="meta")) is None
    assert current_streams([HOST]) == []
    assert (_engine.cuda_unavailable() is None) == torch.cuda.is_available()
