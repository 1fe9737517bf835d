"""What the tests of the command line share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pysnap
from pysnap.cli import main

METRICS = {1: 0.9, 2: 0.5, 3: 0.7}


def make_repository(root: Path, **arguments: Any) -> Path:
    """Three snapshots, steps 1 to 3, with a loss that is best at step 2."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"keep": pysnap.Keep(last=None), "best": "min loss"} | arguments
    with pysnap.Snapshotter(root, model=model, optimizer=optimizer, **options) as snapshotter:
        for step, loss in METRICS.items():
            with snapshotter.step():
                optimizer.zero_grad()
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
            snapshotter.report(loss=loss)
            snapshotter.save().wait()
            assert snapshotter.progress.step == step
    return root


def newest_of_step(root: Path, step: int) -> Path:
    """The directory of the snapshot that stands for a step."""
    from pysnap.repository import list_snapshots

    return next(item.path for item in list_snapshots(root).snapshots if item.step == step)


class Commands:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.errors = ""

    def text(self, *words: object, status: int = 0) -> str:
        """What a command prints, which ends with `status`."""
        self._capsys.readouterr()
        found = main([str(word) for word in words])
        captured = self._capsys.readouterr()
        self.errors = captured.err
        assert found == status, captured
        return captured.out

    def json(self, *words: object, status: int = 0) -> Any:
        """The one object that a command prints with `--json`."""
        return json.loads(self.text(*words, "--json", status=status))


def process(*words: object, code: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; `code` runs before it."""
    program = f"import sys\n{code}\nfrom pysnap.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "40"},
        check=False,
        **options,
    )
