"""Restoring into tensors that exist, page cache warm: pysnap beside others, in turn."""

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
TORCH_LOAD = "torch.load(mmap) + copy_"
DCP_LOAD = "DCP load"
OTHERS = {
    peers.SAFETENSORS: (SAFETENSORS, SAFETENSORS_ONE_THREAD),
    peers.TORCH_SAVE: (TORCH_LOAD,),
    peers.DCP: (DCP_LOAD,),
}
"""The restores of what a subject writes; the fastest counts."""
CODECS = {peers.PYSNAP: "auto", peers.PYSNAP_FAST: "fast", peers.PYSNAP_RAW: "none"}
_READ_BLOCK = 16 * 2**20
_STAGING = 64 * 2**20


def measure(
    *, parameters: int, repeats: int, directory: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of each restore, and its extra memory in bytes; every one is checked bit for bit.

    `pysnap.Snapshotter.resume()` restores model and optimizer; the others get the same tensors
    under flat names.
    """
    from safetensors.torch import load_file, save_file
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = Path(directory)
    tell("building the state")
    state = State.build(parameters)
    live = state.tensors()
    expected = {name: tensor.clone() for name, tensor in live.items()}

    tell("saving")
    file = folder / "state.safetensors"
    save_file(live, file)
    pickled, parts = folder / "state.pt", folder / "dcp"
    torch.save(live, pickled)
    save(live, checkpoint_id=parts, no_dist=True)
    snapshotters = {
        subject: pysnap.Snapshotter(
            folder / codec, codec=codec, host_memory=_STAGING, **state.parts()
        )
        for subject, codec in CODECS.items()
    }
    for snapshotter in snapshotters.values():
        snapshotter.save().wait()

    def copy_from(loaded: dict[str, Tensor]) -> None:
        for name, tensor in live.items():
            tensor.copy_(loaded[name])

    def load_safetensors() -> None:
        copy_from(load_file(file))

    def load_safetensors_in_one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        load_safetensors()
        torch.set_num_threads(threads)

    def ours(subject: str) -> tuple[Path, Callable[[], object]]:
        return folder / CODECS[subject], snapshotters[subject].resume

    # What is compared stands side by side. Where cores are not free, torch's threads wait for each
    # other longer than they help.
    restores: dict[str, tuple[Path, Callable[[], object]]] = {
        peers.PYSNAP: ours(peers.PYSNAP),
        SAFETENSORS: (file, load_safetensors),
        SAFETENSORS_ONE_THREAD: (file, load_safetensors_in_one_thread),
        peers.PYSNAP_RAW: ours(peers.PYSNAP_RAW),
        peers.PYSNAP_FAST: ours(peers.PYSNAP_FAST),
        TORCH_LOAD: (pickled, lambda: copy_from(torch.load(pickled, mmap=True))),
        DCP_LOAD: (parts, lambda: load(live, checkpoint_id=parts, no_dist=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in restores}
    extra: dict[str, list[int]] = {name: [] for name in restores}
    for repetition in range(1 + repeats):
        tell(f"restore {repetition} of {repeats}" if repetition else "first restore")
        for name in reversed(restores) if repetition % 2 else restores:
            place, restore = restores[name]
            for tensor in live.values():
                tensor.zero_()
            _read(place)
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


def _read(place: Path) -> None:
    """Bring a file, or every file in a folder, into the page cache."""
    block = memoryview(bytearray(_READ_BLOCK))
    for path in (place, *place.rglob("*")):
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
