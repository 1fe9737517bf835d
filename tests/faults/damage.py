"""What the harnesses of damaged and of hostile snapshots share: states, snapshots of them, files
that are damaged for one trial, and what every reader makes of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_writer import manifest_bytes
from support import assert_same

import pysnap
from pysnap import reader
from pysnap.reader import ReaderError
from pysnap.verify import verify_snapshot

State = dict[str, Any]


def state_of_all_encodings(seed: int = 0) -> State:
    """Values that the encoder stores in every way that it has: as they are, in planes that are raw,
    constant or compressed, and with lines left out; of every width, floats and integers."""
    random = np.random.default_rng(seed)
    sparse = np.where(random.random(3000) < 0.1, random.normal(size=3000), 0).repeat(16)
    return {
        "noise": torch.from_numpy(random.integers(0, 256, 70_000, np.uint8)),
        "float32": torch.from_numpy(random.normal(size=30_000).astype("f4")),
        "bfloat16": torch.from_numpy(random.normal(size=40_000).astype("f4")).bfloat16(),
        "float64": torch.from_numpy(random.normal(size=5_000)),
        "sparse": torch.from_numpy(sparse.astype("f4")),
        "zero": torch.zeros(50_000, dtype=torch.float16),
        "constant": torch.full((9_000,), 77, dtype=torch.int64),
        "small": torch.from_numpy(random.integers(-9, 9, 20_000, np.int32)),
        "steps": [torch.tensor(float(step)) for step in range(4)],
        "array": random.integers(0, 9, 5_000, np.int16),
        "text": "plain values stand in the manifest",
    }


def small_state(seed: int = 0) -> State:
    """One raw chunk and an encoded one: two pages of a pack."""
    random = np.random.default_rng(seed)
    return {
        "noise": torch.from_numpy(random.integers(0, 256, 1000, np.uint8)),
        "float": torch.from_numpy(random.normal(size=900).astype("f4")),
    }


@dataclass
class Saved:
    """A snapshot, and what is known of it without pysnap's own code for reading: the state that was
    saved, and which tensors stand where."""

    path: Path
    state: State

    def __post_init__(self) -> None:
        self.files = {file.name: file.read_bytes() for file in self.path.iterdir()}
        self.manifest = json.loads(self.files["manifest.json"])["snapshot"]
        plain = reader.read_snapshot(self.path)
        self.arrays = {name: array.copy() for name, array in plain.tensors().items()}
        self._extents = {
            name: (tensor.start, tensor.end)
            for name, index in plain._names.items()
            for tensor in [plain._tensors[index]]
        }

    def is_encoded(self, pack: str, place: int) -> bool:
        """Whether a byte of a pack belongs to the encoding of a chunk that is not stored raw."""
        return any(
            self.packs[number] == pack and offset <= place < offset + stored and encoding != "raw"
            for number, offset, stored, _, _, encoding, _ in self.manifest["chunks"]
        )

    @property
    def packs(self) -> list[str]:
        return [pack["name"] for pack in self.manifest["packs"]]

    def tensors_at(self, pack: str, start: int, end: int) -> list[str]:
        """Names of the tensors whose chunks, with their padding, have bytes there."""
        hit: list[tuple[int, int]] = []
        at = 0
        for number, offset, stored, raw, *_ in self.manifest["chunks"]:
            behind = offset + -(-stored // 4096) * 4096
            if self.packs[number] == pack and offset < end and start < behind:
                hit.append((at, at + raw))
            at += raw
        return [
            name
            for name, (first, last) in self._extents.items()
            if any(first < high and low < last for low, high in hit)
        ]


@contextlib.contextmanager
def changed(file: Path, data: bytes | None) -> Iterator[None]:
    """A file has other content, or is not there (None), for one trial."""
    before = file.read_bytes() if file.exists() else None
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    try:
        yield
    finally:
        if before is not None:
            file.write_bytes(before)
        else:
            file.unlink()


@contextlib.contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """Bit number `bit` of a file is the other one, for one trial."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, bit // 8)
        os.pwrite(descriptor, bytes([byte ^ 1 << bit % 8]), bit // 8)
        try:
            yield
        finally:
            os.pwrite(descriptor, bytes([byte]), bit // 8)
    finally:
        os.close(descriptor)


def refusal(read: Callable[[], object], kind: type[Exception] = pysnap.Error) -> str:
    """The message with which `read` is refused; fails where it returns, or raises another error."""
    try:
        value = read()
    except kind as error:
        return str(error)
    raise AssertionError(f"nothing was found: {value!r:.200}")


def assert_found(saved: Saved, file: str, names: list[str]) -> None:
    """Every way to read the damaged snapshot is refused, and names the file and a damaged tensor;
    verifying names them all."""
    shown = [
        refusal(lambda: pysnap.load(saved.path)),
        refusal(lambda: [entry[...] for entry in pysnap.open(saved.path).values()]),
        refusal(lambda: reader.read_snapshot(saved.path).tree(), ReaderError),
    ]
    verdict = verify_snapshot(saved.path)
    assert verdict.damaged == names and not verdict.intact
    shown += verdict.problems[:1] + reader.verify(saved.path)[:1]
    assert len(shown) == 5
    assert all(file in message for message in shown), (file, shown)
    if names:
        for message in (shown[0], shown[1], shown[3]):
            assert any(name in message for name in names), (names, message)


def assert_intact(saved: Saved) -> None:
    """Every way to read it gives what was saved."""
    assert_loads(saved)
    assert_reader_reads(saved)


def assert_loads(saved: Saved) -> None:
    assert_same(pysnap.load(saved.path), saved.state)
    assert verify_snapshot(saved.path).intact


def assert_reader_reads(saved: Saved) -> None:
    """The same of the independent reader. Raises ReaderError where it refuses something."""
    arrays = reader.read_snapshot(saved.path).tensors()
    assert list(arrays) == list(saved.arrays)
    for name, array in saved.arrays.items():
        assert arrays[name].tobytes() == array.tobytes(), name
    assert reader.verify(saved.path) == []


def rewritten(saved: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest of a snapshot after `change`, with the digest that belongs to it."""
    snapshot = json.loads((saved / "manifest.json").read_bytes())["snapshot"]
    change(snapshot)
    return manifest_bytes(snapshot)


def copy_of(saved: Path, path: Path) -> Path:
    """A copy of a snapshot's directory."""
    return Path(shutil.copytree(saved, path))
