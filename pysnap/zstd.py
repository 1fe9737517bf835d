"""Where libzstd is found."""

from __future__ import annotations

import functools
import glob
import importlib.util
import os


@functools.cache
def zstd_libraries() -> tuple[str, ...]:
    """Where libzstd may be: the system's, else the copy inside the zstandard package."""
    names = ["libzstd.so.1"]
    package = importlib.util.find_spec("zstandard")
    if package is not None and package.origin is not None:
        names += glob.glob(os.path.join(os.path.dirname(package.origin), "_cffi*.so"))
    return tuple(names)
