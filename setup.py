"""Builds the extension `pysnap._engine` with CMake; pyproject.toml declares everything else.

The objects stay in build/cmake-<python>-<type> of the source tree, so that a second build compiles
only what changed. Environment: CMAKE_ARGS (more arguments for CMake), CMAKE_BUILD_PARALLEL_LEVEL,
and the compiler variables that CMake itself reads (CXX, CXXFLAGS, LDFLAGS).
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
COMPILER_VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS")


def tool(name: str, folder_constant: str) -> str | None:
    """The program `name`: the one of its wheel if that is importable, else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_constant)
    except ImportError:
        return shutil.which(name)
    return shutil.which(name, path=folder)


class CMakeBuild(build_ext):
    """Lets CMake build the one extension, then copies it to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise CompileError("there is no cmake: install it with `pip install cmake`")
        build_type = "Debug" if self.debug else "Release"
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}-{build_type.lower()}"
        module = Path(self.get_ext_fullpath(ext.name))

        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{folder}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        ninja = tool("ninja", "BIN_DIR")
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))

        self.discard_if_changed(folder, configure)
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(folder), "--target", "_engine"], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(
                f"CMake ended with status {error.returncode}; its messages stand above"
            ) from error
        module.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / module.name), str(module))

    def discard_if_changed(self, folder: Path, configure: list[str]) -> None:
        """Removes a build folder that other tools or settings made.

        CMake keeps the paths of its tools, which pip's isolated builds put into a temporary folder
        that is gone at the next build. It also keeps settings that are no longer given.
        """
        variables = {name: os.environ.get(name) for name in COMPILER_VARIABLES}
        now = json.dumps({"configure": configure, **variables}, indent=1)
        stamp = folder / "configured-by.json"
        if stamp.is_file() and stamp.read_text() == now:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(now)


# What CMake reads. As `depends`, these files also get into the source distribution.
inputs = [ROOT / "CMakeLists.txt", *ROOT.glob("csrc/*"), *ROOT.glob("tests/cpp/*")]

setup(
    ext_modules=[
        Extension(
            "pysnap._engine",
            sources=[],
            depends=sorted(str(path.relative_to(ROOT)) for path in inputs),
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
