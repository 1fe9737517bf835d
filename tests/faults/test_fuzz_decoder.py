"""P11: the decoder of chunks, in C++, with no digest around it, reads any bytes at all without a
fault of memory or arithmetic.

The target is built with ASan and UBSan, and driven by the fuzzer of this folder, which needs no
more than a C++ compiler. Seeds are what the product and the reference writer encode, so that the
target knows every encoding that there is.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference_writer as reference
from conftest import Count
from damage import Saved, state_of_all_encodings

import pysnap

HARNESS = "fuzzing: chunk decoder"

FUZZ = Path(__file__).with_name("fuzz")
CSRC = Path(__file__).parents[2] / "csrc"
ELEMENTS = ("u8", "i16", "i32", "i64", "f16", "f32", "f64")
FLAGS = [
    "-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all", f"-I{CSRC}",
]  # fmt: skip
COVERED = "-fsanitize-coverage=trace-pc"
PLANTED = "-DPYSNAP_FUZZ_PLANTED_BUG"


def decoder_sources() -> list[Path]:
    """The decoder and all that it includes."""
    found: dict[str, None] = {}
    names = ["codec"]
    while names:
        name = names.pop()
        for file in (CSRC / f"{name}.h", CSRC / f"{name}.cpp"):
            if file.exists() and file.name not in found:
                found[file.name] = None
                names += re.findall(r'#include "(\w+)\.h"', file.read_text())
    return [CSRC / name for name in found if name.endswith(".cpp")]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The fuzzer of the decoder, and of one with a planted overflow."""
    folder = tmp_path_factory.mktemp("fuzz")
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"

    def run(*arguments: str) -> None:
        subprocess.run([compiler, *FLAGS, *arguments], check=True, timeout=300)

    jobs = [([COVERED], path, path.stem) for path in decoder_sources()]
    jobs += [([COVERED], FUZZ / "decode_target.cpp", "target")]
    jobs += [([COVERED, PLANTED], FUZZ / "decode_target.cpp", "planted")]
    jobs += [([], FUZZ / "driver.cpp", "driver")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [
            pool.submit(run, *flags, "-c", str(source), "-o", str(folder / f"{name}.o"))
            for flags, source, name in jobs
        ]:
            done.result()
    shared = [folder / f"{name}.o" for _, _, name in jobs if name not in ("target", "planted")]
    for name in ("target", "planted"):
        objects = map(str, [*shared, folder / f"{name}.o"])
        run(*objects, "-ldl", "-lpthread", "-o", str(folder / name))
    return folder / "target", folder / "planted"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded chunks: of the product, and of the reference writer by every method; and what
    libFuzzer made of such ones and kept, for the code that it reaches."""
    folder = tmp_path_factory.mktemp("seeds")

    def add(element: str, raw: int, stored: bytes) -> None:
        header = bytes([ELEMENTS.index(element)]) + struct.pack("<I", raw)
        (folder / f"{len(list(folder.iterdir())):04}").write_bytes(header + stored)

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYSNAP_CODEC", "fast")
        environment.setenv("PYSNAP_CHUNK_SIZE", "8KiB")
        state = state_of_all_encodings()
        saved = Saved(pysnap.save(folder.with_name("snapshot"), state), state)
    encoded = [chunk for chunk in saved.manifest["chunks"] if chunk[5] != "raw"]
    for _, offset, stored, raw, element, _, _ in encoded[:: max(1, len(encoded) // 40)]:
        add(element, raw, saved.files["0.pack"][offset : offset + stored])
    random = np.random.default_rng(0)
    for element in ELEMENTS:
        data = random.integers(0, 4, 640, np.uint8).tobytes() + bytes(256)
        for method in (None, *reference.METHODS):
            for line_map in (False, True):
                stored = reference.planes(data, element, method=method, line_map=line_map)
                add(element, len(data), stored)
    with zipfile.ZipFile(FUZZ / "corpus.zip") as corpus:
        for name in corpus.namelist():
            (folder / f"kept-{name}").write_bytes(corpus.read(name))
    # Longer than a block.
    add("f32", 2**20 + 128, reference.planes(bytes(2**20 + 128), "f32"))
    return folder


def fuzz(
    target: Path, seeds: Path, crash: Path, *, seconds: float, seed: int
) -> subprocess.CompletedProcess[str]:
    command = [
        str(target),
        str(seeds),
        str(FUZZ / "decode.dict"),
        str(seconds),
        str(seed),
        str(crash),
    ]
    limits = "max_allocation_size_mb=64:hard_rss_limit_mb=1024:detect_leaks=1"
    return subprocess.run(
        command,
        env={**os.environ, "ASAN_OPTIONS": limits, "UBSAN_OPTIONS": "print_stacktrace=1"},
        capture_output=True,
        text=True,
        timeout=seconds + 120,
    )


def test_the_decoder_stands_any_bytes(
    targets: tuple[Path, Path], seeds: Path, tmp_path: Path, count: Count, full: bool
) -> None:
    crash = tmp_path / "crash"
    done = fuzz(targets[0], seeds, crash, seconds=60 if full else 12, seed=1)
    input_bytes = crash.read_bytes().hex() if crash.exists() else ""
    assert done.returncode == 0, f"{done.stderr[-4000:]}\ninput: {input_bytes[:4000]}"
    runs, corpus, edges = map(int, re.findall(r"\d+", done.stdout))
    # It got behind the headers; what the kept inputs reach may be all that there is.
    assert corpus >= len(list(seeds.iterdir())) and edges > 300 and runs > 1000, done.stdout
    count(runs)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_planted_overflow_is_found(
    targets: tuple[Path, Path], seeds: Path, tmp_path: Path, count: Count, seed: int
) -> None:
    crash = tmp_path / "crash"
    done = fuzz(targets[1], seeds, crash, seconds=60, seed=seed)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, (
        done.stdout + done.stderr[-2000:]
    )
    assert "planted" in done.stderr and crash.stat().st_size > 5
    count()
