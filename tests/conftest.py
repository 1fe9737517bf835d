"""What every test gets: reproducible properties, and no run of `cuda` tests without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_support import Commands, make_repository
from hypothesis import settings

# The same examples in every run, and no verdict that depends on how busy the machine is.
settings.register_profile("pysnap", derandomize=True, deadline=None)
settings.load_profile("pysnap")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


# For the tests of the command line.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as a run leaves it; not to be changed."""
    return make_repository(tmp_path_factory.mktemp("made") / "gpt")


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "gpt", symlinks=True))


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)
