"""Restoring into tensors that exist, page cache warm: pysnap beside safetensors, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from memory import ExtraMemory
from state import State
from torch import Tensor

import pysnap

SAFETENSORS = "safetensors load_file + copy_"
SAFETENSORS_ONE_THREAD = "safetensors, one torch thread"
_READ_BLOCK = 16 * 2**20
_STAGING = 64 * 2**20


def measure(
    *, parameters: int, repeats: int, directory: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of each restore, and its extra memory in bytes; every one is checked bit for bit.

    `pysnap.Snapshotter.resume()` restores model and optimizer; safetensors, which knows neither,
    gets the same tensors under flat names.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(directory)
    tell("building the state")
    state = State.build(parameters)
    live = state.tensors()
    expected = {name: tensor.clone() for name, tensor in live.items()}

    tell("saving")
    file = folder / "state.safetensors"
    save_file(live, file)
    snapshotters = {
        subject: pysnap.Snapshotter(
            folder / codec, codec=codec, host_memory=_STAGING, **state.parts()
        )
        for subject, codec in (
            (peers.PYSNAP, "auto"),
            (peers.PYSNAP_FAST, "fast"),
            (peers.PYSNAP_RAW, "none"),
        )
    }
    for snapshotter in snapshotters.values():
        snapshotter.save().wait()

    def load_safetensors() -> None:
        loaded = load_file(file)
        for name, tensor in live.items():
            tensor.copy_(loaded[name])

    def load_safetensors_in_one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        load_safetensors()
        torch.set_num_threads(threads)

    restores: dict[str, Callable[[], object]] = {
        SAFETENSORS: load_safetensors,
        # Where cores are not free, torch's threads wait for each other longer than they help.
        SAFETENSORS_ONE_THREAD: load_safetensors_in_one_thread,
        **{subject: snapshotter.resume for subject, snapshotter in snapshotters.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in restores}
    extra: dict[str, list[int]] = {name: [] for name in restores}
    for repetition in range(1 + repeats):
        tell(f"restore {repetition} of {repeats}" if repetition else "first restore")
        for name, restore in restores.items():
            for tensor in live.values():
                tensor.zero_()
            _read(folder)
            memory = ExtraMemory()
            start = time.perf_counter()
            restore()
            seconds[name].append(time.perf_counter() - start)
            peak = memory.peak()
            extra[name] += [] if peak is None else [peak]
            _check(name, state.tensors(), live, expected)
    for snapshotter in snapshotters.values():
        snapshotter.close()
    return {
        "times": {name: {"first": times[0], "warm": times[1:]} for name, times in seconds.items()},
        "extra_memory": extra,
    }


def _read(folder: Path) -> None:
    """Bring every file into the page cache."""
    block = memoryview(bytearray(_READ_BLOCK))
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def _check(
    name: str, restored: dict[str, Tensor], live: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    for key, tensor in restored.items():
        if tensor.data_ptr() != live[key].data_ptr():
            raise RuntimeError(f"{name} put {key} into a new tensor, not into the one that exists")
        if not torch.equal(tensor.view(torch.int32), expected[key].view(torch.int32)):
            raise RuntimeError(f"{name} restored {key} with other bits than were saved")
