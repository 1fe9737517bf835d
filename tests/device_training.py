"""A training run on the driver of tests/cpp/fake_cuda, which refuses to register memory.

    python device_training.py FOLDER

torch computes on the host, for there may be no CUDA in it. Parameters and state of the optimizer
have a copy in the memory of a device, made at the end of each step: snapshots are taken of that.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from device_run import controls
from support import assert_same

import pysnap
from pysnap import capture, layout

OUT_OF_MEMORY = 2
WIDTH = 64


class Mirror:
    """Memory of device 0 with the bytes of tensors of the host; pysnap reads there."""

    def __init__(self, fake: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        self._fake = fake
        self._stream = fake["make_stream"](0)
        self._tensors = tensors
        self._addresses = {
            tensor.data_ptr(): fake["allocate"](0, tensor.nbytes) for tensor in tensors
        }
        self.update()
        self._source, self._make_plan = layout._source, layout.make_plan
        layout._source = self._on_device
        capture.make_plan = self._plan
        capture.current_streams = lambda devices: [(0, self._stream)] if 0 in devices else []

    def update(self) -> None:
        for tensor in self._tensors:
            self._fake["poke"](
                self._addresses[tensor.data_ptr()], tensor.detach().numpy().tobytes(), tensor.nbytes
            )

    def _on_device(self, path: str, leaf: layout.Leaf) -> layout._Source:
        source = self._source(path, leaf)
        if source.address not in self._addresses:
            return source
        return replace(source, address=self._addresses[source.address], device=0)

    def _plan(self, leaves: Any, *, chunk_size: int, lazy: Any) -> layout.Plan:
        moved = {self._addresses.get(address, address) for address in lazy}
        return self._make_plan(leaves, chunk_size=chunk_size, lazy=moved)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(8, WIDTH)).square().mean().backward()
    optimizer.step()


def main(folder: Path) -> None:
    fake = controls()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    train(net, optimizer)
    tensors = [*net.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
    mirror = Mirror(fake, tensors)
    warnings = Warnings()
    logging.getLogger("pysnap").addHandler(warnings)
    fake["fail_call"](b"cuMemHostRegister_v2", 1, OUT_OF_MEMORY)

    expected: list[dict[str, Any]] = []
    with pysnap.Snapshotter(
        folder, model=net, optimizer=optimizer, every=1, keep=pysnap.Keep(last=None)
    ) as snapshotter:
        snapshotter.wait_ready()
        for _ in range(5):
            with snapshotter.step():
                train(net, optimizer)
                mirror.update()
            expected.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
            newest = snapshotter._committer.newest
            assert newest is not None
            newest.wait(60)

    for step, state in enumerate(expected, 1):
        assert_same(dict(pysnap.load(folder / f"step-{step:09d}")["model"]), state)
    assert fake["pageable_copies"]() > 0
    assert fake["registered"]() == 0
    assert fake["violation"]() == b"", fake["violation"]()
    (warning,) = warnings.texts
    for words in ("registering staging memory failed", "step waits", "ulimit -l", "host_memory"):
        assert words in warning, warning


if __name__ == "__main__":
    main(Path(sys.argv[1]))
