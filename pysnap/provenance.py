"""Where a snapshot comes from: versions, host, devices, command line, the user's configuration.
It stands in the manifest for people; nothing of it is needed to load."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pysnap._version import __version__
from pysnap.devices import cuda_in_use
from pysnap.errors import printable

_MOST_DEPTH = 64


def describe() -> dict[str, Any]:
    """What does not change while the process runs."""
    return {
        "versions": {
            "pysnap": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "host": platform.node(),
        "command": list(sys.orig_argv),
    }


def devices() -> list[str]:
    """Names of the CUDA devices; none before the program has used one."""
    if not cuda_in_use():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def differences(before: object, now: object) -> list[str]:
    """What differs between two configurations of plain JSON, a clause each, such as
    `optimizer.lr was 0.1, is 0.2`."""
    old, new = dict(_flat(before, "")), dict(_flat(now, ""))
    found = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            found.append(f"{printable(name)} was {_shown(old[name])}, is gone")
        elif name not in old:
            found.append(f"{printable(name)} is new: {_shown(new[name])}")
        elif old[name] != new[name] or type(old[name]) is not type(new[name]):
            found.append(f"{printable(name)} was {_shown(old[name])}, is {_shown(new[name])}")
    return found


def _shown(value: object) -> str:
    try:
        return printable(repr(value))
    except RecursionError:
        return "nested too deep to show"


def _flat(value: object, name: str, depth: int = 0) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value and depth < _MOST_DEPTH:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key), depth + 1)
    else:
        yield name, value
