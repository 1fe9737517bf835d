"""Random states of Python, NumPy, torch and every CUDA device, as plain values of the tree."""

from __future__ import annotations

import logging
import random
import struct
from typing import Any

import numpy as np
import torch

from pysnap.devices import cuda_in_use
from pysnap.errors import CorruptError

_log = logging.getLogger("pysnap")


def capture() -> dict[str, Any]:
    """The state of every generator that code uses without naming one."""
    version, words, gauss = random.getstate()
    # 625 words as bytes: a list of them would be the largest thing in a manifest.
    python = {"version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}
    state = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if cuda_in_use() else []
    return {
        "python": python,
        "numpy": _pack(state),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": [device.numpy().tobytes() for device in cuda],
    }


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned; the last step of a resume, for others may draw. Raises
    CorruptError for anything else.

    States of CUDA devices that this machine does not have are named in a warning.
    """
    try:
        python, numpy, cuda = state["python"], state["numpy"], state["cuda"]
        words = tuple(np.frombuffer(python["words"], dtype="<u4").tolist())
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(_unpack(numpy))
        torch.set_rng_state(_tensor(state["torch"]))
        devices = [_tensor(device) for device in cuda]
        present = torch.cuda.device_count() if devices else 0
        for index, device_state in enumerate(devices[:present]):
            torch.cuda.set_rng_state(device_state, index)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptError(f"the random states of the snapshot are not valid: {error}") from error
    if len(devices) > present:
        missing = ", ".join(f"cuda:{index}" for index in range(present, len(devices)))
        _log.warning(
            "the snapshot holds the random state of %s, which this machine does not have; "
            "it is not restored",
            missing,
        )


def _pack(value: Any) -> Any:
    """Arrays as bytes: in the tree they would be tensors, at a new address in every snapshot."""
    if isinstance(value, dict):
        return {name: _pack(item) for name, item in value.items()}
    return (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unpack(item) for name, item in value.items()}
    return np.frombuffer(value[1], dtype=value[0]) if isinstance(value, tuple) else value


def _tensor(state: object) -> torch.Tensor:
    if type(state) is not bytes:
        raise TypeError(f"a state is {state!r:.80}")
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
