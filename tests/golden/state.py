"""The state in the golden snapshots, and the program that wrote them.

`python tests/golden/state.py NAME` writes `tests/golden/NAME`. A snapshot of a released format is
never written again: it proves that later versions read what this one wrote.
"""

from __future__ import annotations

import datetime
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pysnap


def state() -> dict[str, Any]:
    """Every tag of the tree, every element, raw and planes, tied and strided tensors."""
    weights = (torch.arange(6000, dtype=torch.float32) * 0.37).sin().reshape(60, 100)
    noise = (torch.arange(5000) * 2654435761 % 256).to(torch.uint8)
    return {
        "float32": weights,
        "tied": weights,
        "rows": weights[10:20],
        "transposed": weights.clone().t(),
        "float64": torch.linspace(0, 1, 50, dtype=torch.float64),
        "bfloat16": weights.flatten()[:3000].bfloat16(),
        "float16": weights.flatten()[:300].half(),
        "float8": torch.linspace(-2, 2, 64).to(torch.float8_e4m3fn),
        "complex64": torch.complex(torch.ones(3), torch.arange(3.0)),
        "int64": torch.arange(1000),
        "int32": torch.arange(-50, 50, dtype=torch.int32),
        "int16": torch.full((700,), -3, dtype=torch.int16),
        "bool": torch.arange(40) % 3 == 0,
        "bytes": noise,
        "zero rows": torch.zeros(400, 32).index_fill_(0, torch.arange(0, 400, 9), 1.5),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7.0),
        "array": np.arange(12, dtype="<u2").reshape(3, 4),
        "text array": np.array(["a", "bc"]),
        "plain": [None, True, -(2**70), 0.1, -0.0, "ünïcode", b"\x00\xff", (1, (2,))],
        "not finite": [float("inf"), float("-inf")],
        "keys": {0: "a", "0": "b", 1.5: "c", None: "d", (1, "x"): "e", b"k": "f"},
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter("aab"),
        "sets": [{1, 2}, frozenset({"x"})],
        "numpy scalar": np.float32(1.5),
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
        "time": [
            datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.timezone.utc),
            datetime.date(2026, 1, 2),
            datetime.time(3, 4),
            datetime.timedelta(days=1, microseconds=5),
        ],
        "path": Path("runs/a"),
        "$dollar": {"$tensor": 1},
    }


def moments() -> dict[str, Any]:
    """Planes that are coded by the methods huffman, with an escape and without, and seven bits."""
    steps = torch.arange(20_000, dtype=torch.float64)
    waves = ((steps * 0.37).sin() * (steps * 0.011).cos()).reshape(100, 200)
    return {
        "exp_avg": (waves * 1e-3).float(),
        "exp_avg_sq": (waves * waves * 1e-6).float(),
        "half": waves.bfloat16(),
        "double": waves[:20].clone(),
        "below 128": (torch.arange(5000) * 2654435761 >> 8).bitwise_and(127).to(torch.uint8),
    }


STATES = {"format-1": state, "format-1-moments": moments}

if __name__ == "__main__":
    name = sys.argv[1]
    print(pysnap.save(Path(__file__).parent / name, STATES[name]()))
