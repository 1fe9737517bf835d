"""Who may read the files, and that no way leads to pickle (docs/security.md)."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_layers import LAYERS, PACKAGE

import pysnap

UMASKS = [0, 0o022, 0o077, 0o777]


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    """Modes of all that is at or under `root`; those of links say nothing."""
    found = {".": stat.S_IMODE(root.lstat().st_mode)}
    for path in root.rglob("*"):
        if not path.is_symlink():
            found[str(path.relative_to(root))] = stat.S_IMODE(path.lstat().st_mode)
    return found


def assert_private(root: Path, names: set[str]) -> None:
    found = modes(root)
    assert names <= set(found)
    for name, mode in found.items():
        assert mode == (0o700 if (root / name).is_dir() else 0o600), (name, oct(mode))


@pytest.mark.parametrize("direct", ["on", "off"])
def test_a_repository_is_its_owners_whatever_the_umask(
    tmp_path: Path, umask: int, direct: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSNAP_DIRECT_IO", direct)
    root = tmp_path / "run"
    with pysnap.Snapshotter(root, every="off", x=torch.arange(5000.0)) as snapshotter:
        with snapshotter.step():
            pass
        snapshotter.save(tag="a").wait()
        during = modes(root)
    name = "step-000000001"
    assert during[".writer"] == 0o600
    assert os.readlink(root / "latest") == name
    files = {f"{name}/{file}" for file in ("manifest.json", "0.pack", "notes.json")}
    assert_private(root, {".pysnap", ".writer", name} | files)


def test_a_saved_state_is_its_owners_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = pysnap.save(tmp_path / "s", {"x": torch.arange(5000.0)})
    assert_private(path, {"manifest.json", "0.pack"})


def test_a_lock_that_others_could_read_is_made_private(tmp_path: Path) -> None:
    root = tmp_path / "run"
    pysnap.Snapshotter(root, every="off", x=torch.zeros(1)).close()
    (root / ".writer").chmod(0o666)
    pysnap.Snapshotter(root, every="off", x=torch.zeros(1)).close()
    assert stat.S_IMODE((root / ".writer").stat().st_mode) == 0o600


# Code of others that reads or runs what a file says, and the calls that lead to it.
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg",
    "runpy", "code", "codeop", "imp",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "import_module", "execfile"}
FORBIDDEN_METHODS = {
    ("torch", "load"), ("torch", "save"), ("np", "load"), ("np", "save"), ("numpy", "load"),
    ("os", "system"), ("os", "popen"),
}  # fmt: skip
# The front doors load the modules of their own tables; an export for torch.load has its format.
ALLOWED = {
    "__init__.py": ["import_module"],
    "cli/__init__.py": ["import_module", "import_module"],
    "cli/export.py": ["torch.save"],
}
# The demo is a program of a user: it starts the trainings that it kills.
PROGRAMS = {"demo"}


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name not in PROGRAMS]


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                found.append(str(node.module))
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
                found.append(function.id)
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                is_call = function.attr in FORBIDDEN_CALLS and owner != "re"
                if is_call or (owner, function.attr) in FORBIDDEN_METHODS:
                    found.append(f"{owner}.{function.attr}")
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_leads_to_pickle_or_to_code_in_files(path: Path) -> None:
    assert findings(path.read_text()) == ALLOWED.get(str(path.relative_to(PACKAGE)), [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(x)", "eval(x)",
        "importlib.import_module(x)", "np.load(x)", "np.array(x, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert findings(source)


def test_every_module_of_the_package_is_searched() -> None:
    searched = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files()}
    assert searched | PROGRAMS == {name for layer in LAYERS for name in layer}


def test_reading_without_torch_loads_no_pickle(tmp_path: Path) -> None:
    """The whole import graph of verifying, NumPy aside, which brings pickle for its own arrays."""
    path = pysnap.save(tmp_path / "s", {"x": torch.arange(500.0)})
    code = (
        "import sys, numpy; before = set(sys.modules); sys.modules['torch'] = None; "
        "from pysnap.verify import verify_snapshot; "
        f"assert verify_snapshot({str(path)!r}).intact; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        f"bad = new & {FORBIDDEN_MODULES!r}; sys.exit(f'loaded {{bad}}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
