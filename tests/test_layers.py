"""House rules: which module may import which, and what loads without torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pysnap"

# A module may import those of the layers below its own, and those it names beside it.
LAYERS: list[dict[str, set[str]]] = [
    {
        "errors": set(),
        "_version": set(),
        "memory": {"errors"},
        "devices": set(),
        "reader": set(),
        "measure": set(),
        "threads": set(),
    },
    {"dtypes": set(), "paths": set(), "zstd": set()},
    {"trace": set(), "storage": {"trace"}},
    {
        "config": set(),
        "cadence": set(),
        "tree": set(),
        "rng": set(),
        "loader": set(),
        "manifest": set(),
        "notes": set(),
        "events": set(),
        "gate": set(),
        "progress": set(),
        "provenance": set(),
        "retries": set(),
    },
    {
        "layout": set(),
        "repository": set(),
        "overlay": set(),
        "schedule": set(),
        "estimating": set(),
    },
    {"skeleton": set()},
    {"verify": set()},
    {"capture": set(), "best": set()},
    {"retention": set(), "which": set()},
    {"restore": set()},
    {"parts": set(), "view": set(), "files": {"view"}, "observers": set()},
    {"match": set(), "commit": set(), "preemption": {"commit"}, "preflight": set()},
    {"snapshotter": set()},
    {"auditing": set(), "demo": set()},
    {"cli": set()},
    {"__init__": set(), "__main__": set()},
]
# The engine knows only the names of errors; the package's front door knows everything, lazily.
NATIVE = "_engine"


def imports_of(name: str) -> set[str]:
    path = PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
    files = path.glob("*.py") if path.is_dir() else [path]
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "pysnap":
                found |= {alias.name for alias in node.names}
            elif (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("pysnap.")
            ):
                found.add(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                found |= {
                    alias.name.split(".")[1]
                    for alias in node.names
                    if alias.name.startswith("pysnap.")
                }
    return found - {name, NATIVE}


def test_every_module_has_a_layer() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("name", [name for layer in LAYERS for name in layer])
def test_modules_import_only_what_lies_below(name: str) -> None:
    below: set[str] = set()
    for layer in LAYERS:
        if name in layer:
            allowed = below | layer[name]
            break
        below |= set(layer)
    imported = imports_of(name)
    if name == "demo":
        # The demo is a program of a user: it takes what the front door offers.
        imported -= {"Snapshotter", "SnapshotInfo", "resumable", "load"}
    assert imported <= allowed, f"{name} must not import {sorted(imported - allowed)}"


@pytest.mark.parametrize(
    "module",
    [
        "pysnap",
        "pysnap._engine",
        "pysnap.reader",
        "pysnap.storage",
        "pysnap.repository",
        "pysnap.manifest",
        "pysnap.verify",
    ],
)
def test_loads_without_torch(module: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


def test_only_the_bindings_know_python() -> None:
    csrc = PACKAGE.parent / "csrc"
    users = {
        path.name
        for path in csrc.iterdir()
        if "pybind11" in path.read_text() or "Python.h" in path.read_text()
    }
    assert users == {"bindings.cpp", "bindings_objects.cpp", "bindings_objects.h"}


def test_the_extension_offers_nothing_but_its_entry() -> None:
    """Where a compiler links the C++ library into it, seen symbols mixed with those that torch
    uses, and the import crashed."""
    extension = importlib.import_module("pysnap._engine").__file__
    assert extension is not None
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", "--format=just-symbols", extension],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert symbols.stdout.split() == ["PyInit__engine"]


def test_what_is_dropped_in_turn_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`./dev waits` takes long, so a line of its table that fell behind would be found late."""
    monkeypatch.syspath_prepend(PACKAGE.parent / "tests" / "cpp")
    for drop in importlib.import_module("dropped_waits").DROPS:
        assert drop.apply((PACKAGE.parent / drop.file).read_text())
