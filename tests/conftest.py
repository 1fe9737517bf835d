"""What every test gets: reproducible properties, and no run of `cuda` tests without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no verdict that depends on how busy the machine is.
settings.register_profile("pysnap", derandomize=True, deadline=None)
settings.load_profile("pysnap")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
