"""The benchmark of CUDA devices, on the CPU: every line of it runs, whatever it measures there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

for _name in ("matplotlib", "psutil", "rich", "safetensors"):
    pytest.importorskip(_name)

BENCH = Path(__file__).parent.parent / "bench" / "bench_cuda.py"


def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--quick", "--device=cpu", "--state-gb=0.004"]
    # A folder that is not there yet: the measurements had been lost.
    out = tmp_path / "results"
    command += [f"--out={out}", f"--dir={tmp_path}"]
    subprocess.run(command, check=True, timeout=240)
    results = json.loads((out / "cuda.json").read_text())
    assert (out / "cuda.png").stat().st_size > 0
    assert all(results[name] for name in ("rates", "disk", "stall", "overlap", "restore"))
    for bar in results["bars"]:
        assert bar["values"], bar["what"]
        assert min(bar["values"]) > 0, bar["what"]
    peers = results["peers"]["subjects"]
    assert all(result.get("warm") or result.get("skipped") for result in peers.values())
    assert peers["torch.save"]["warm"]
