"""The independent reader, against a writer that was written from the same page of documentation."""

from __future__ import annotations

import copy
import datetime
import enum
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import reference_writer as reference
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pysnap import reader, tree
from pysnap.reader import ReaderError, read_snapshot, verify

ROOT = Path(reader.__file__).parents[1]


class Color(enum.Enum):
    RED = 1


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


# The digest.


def test_digest_of_every_short_length() -> None:
    data = noise(1101)
    for size in range(len(data)):
        assert reader.digest(data[:size]) == xxhash.xxh3_128_hexdigest(data[:size]), size


@pytest.mark.parametrize("size", [4095, 2**20, 2**20 + 1, 2**21 + 1024, 3 * 2**20 + 777])
def test_digest_of_long_data(size: int) -> None:
    data = noise(size)
    assert reader.digest(data) == xxhash.xxh3_128_hexdigest(data)


def test_digest_of_other_buffers() -> None:
    data = noise(1000)
    for size in (0, 5, 100, 1000):
        expected = xxhash.xxh3_128_hexdigest(data[:size])
        assert reader.digest(memoryview(data)[:size]) == expected
        assert reader.digest(np.frombuffer(data, np.uint8)[:size]) == expected


# Chunks.

METHODS = (
    None,
    reference.RAW,
    reference.CONSTANT,
    reference.ZSTD,
    reference.HUFFMAN,
    reference.SEVEN_BITS,
)

PATTERNS: dict[str, Callable[[int], bytes]] = {
    "random": noise,
    "zero": bytes,
    "constant": lambda size: (b"\x01\x02\x03\x04\x05\x06\x07\x08" * (size // 8 + 1))[:size],
    "small numbers": lambda size: bytes(b & 1 for b in noise(size)),
    "zero lines": lambda size: b"".join(
        noise(64, line) if line % 3 else bytes(64) for line in range(size // 64 + 1)
    )[:size],
    "floats": lambda size: (
        np.random.default_rng(1).normal(size=size // 4 + 1).astype("<f4").tobytes()[:size]
    ),
}


def check_bytes(path: Path, element: str, raw: bytes, **options: Any) -> list[str]:
    """Write `raw` as one array, read it back; returns the encodings of its chunks."""
    writer = reference.Writer(**options)
    writer.add(raw, "|u1", [len(raw)], element=element)
    written = writer.write(path, {"a": {"$array": 0}})
    snapshot = read_snapshot(path)
    assert snapshot.tensors()["a"].tobytes() == raw
    assert verify(path) == []
    return [chunk[5] for chunk in written["chunks"]]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("element", reference.WIDTHS)
def test_every_element_method_and_map(tmp_path: Path, element: str, pattern: str) -> None:
    raw = PATTERNS[pattern](8 * 3 * 1000 + 8)
    used = set()
    for method in METHODS:
        for line_map in (None, False, True):
            path = tmp_path / f"{method}-{line_map}"
            used.update(check_bytes(path, element, raw, method=method, line_map=line_map))
    assert used == {"raw"} if pattern == "random" else "planes" in used


@pytest.mark.parametrize("element", reference.WIDTHS)
def test_blocks_of_a_mebibyte_and_a_short_last_one(tmp_path: Path, element: str) -> None:
    raw = PATTERNS["small numbers"](2**21 + 72)
    assert check_bytes(tmp_path / "a", element, raw, chunk_size=2**22) == ["planes"]


def test_a_block_shorter_than_a_line(tmp_path: Path) -> None:
    raw = PATTERNS["small numbers"](2**20) + b"\1\0\1\0\0\0\0\0"
    assert check_bytes(tmp_path / "a", "f32", raw, line_map=True, chunk_size=2**21) == ["planes"]


def test_chunks_in_several_packs_in_any_order(tmp_path: Path) -> None:
    raw = PATTERNS["zero lines"](100_000)
    encodings = check_bytes(tmp_path / "a", "f32", raw, chunk_size=4096, packs=3)
    assert len(encodings) == 25


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    element=st.sampled_from(sorted(reference.WIDTHS)),
    lines=st.lists(st.just(bytes(64)) | st.binary(min_size=64, max_size=64), max_size=20),
    tail=st.binary(max_size=8),
    method=st.sampled_from(METHODS),
    line_map=st.sampled_from([None, False, True]),
)
def test_planes_of_any_bytes(
    element: str, lines: list[bytes], tail: bytes, method: int | None, line_map: bool | None
) -> None:
    width, is_float = reader.ELEMENTS[element]
    raw = b"".join(lines) + tail[: len(tail) // width * width]
    stored = reference.planes(raw, element, method=method, line_map=line_map)
    assert reader._decode_planes(stored, len(raw), width, is_float).tobytes() == raw


# Tensors.


def state() -> dict[str, Any]:
    weight = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "model": OrderedDict(
            weight=weight,
            tied=weight,
            row=weight[0],
            transposed=weight.T,
            half=torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            eighth=torch.tensor([0.5, -1.0]).to(torch.float8_e4m3fn),
            mask=torch.tensor([True, False]),
            scalar=torch.tensor(7),
            none=torch.empty(0, 3),
            complex=torch.tensor([1 + 2j], dtype=torch.complex64),
        ),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": 1e-3},
        "arrays": [np.arange(3, dtype=">i2"), np.array(["a", "bc"]), np.float32(2.5)],
        "odd": {(1, "a"): {2}, None: (1, frozenset({3}))},
    }


def test_tensors_of_a_state(tmp_path: Path) -> None:
    written = state()
    reference.save(tmp_path / "a", written, chunk_size=64)
    snapshot = read_snapshot(tmp_path / "a")
    tensors = snapshot.tensors()
    assert list(tensors) == [
        *(f"model/{name}" for name in written["model"]),
        *("optimizer/state/0/step", "arrays/0", "arrays/1"),
    ]
    assert len(tensors) == 13
    for name, tensor in written["model"].items():
        array = tensors[f"model/{name}"]
        assert array.shape == tuple(tensor.shape)
        assert snapshot.dtype_of(f"model/{name}") == str(tensor.dtype).removeprefix("torch.")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert array.tobytes() == data, name
    assert tensors["model/weight"].dtype == np.float32
    assert tensors["model/half"].dtype == np.uint16
    assert tensors["model/eighth"].dtype == np.uint8
    assert tensors["model/scalar"][()] == 7
    assert snapshot.dtype_of("arrays/0") == ">i2"
    assert tensors["arrays/0"].tolist() == [0, 1, 2]
    assert tensors["arrays/1"].tolist() == ["a", "bc"]


def test_tied_tensors_share_memory(tmp_path: Path) -> None:
    reference.save(tmp_path / "a", state())
    tensors = read_snapshot(tmp_path / "a").tensors()
    weight, row = tensors["model/weight"], tensors["model/row"]
    assert np.shares_memory(weight, tensors["model/transposed"])
    row[0] = 99
    assert tensors["model/tied"][0, 0] == 99
    assert not np.shares_memory(weight, tensors["model/half"])


def test_views_that_overlap_in_part_share_memory(tmp_path: Path) -> None:
    writer = reference.Writer(chunk_size=16)
    writer.add(np.arange(10, dtype="<i4").tobytes(), "int32", [10])
    for at in (0, 8, 24):
        writer.alias(at, "int32", [4])
    nodes = [{"$tensor": index} for index in (3, 1, 2)]
    writer.write(tmp_path / "a", nodes)
    last, first, middle = read_snapshot(tmp_path / "a").tree()
    assert (first.tolist(), middle.tolist(), last.tolist()) == (
        [0, 1, 2, 3],
        [2, 3, 4, 5],
        [6, 7, 8, 9],
    )
    middle[0] = 99
    assert first.tolist() == [0, 1, 99, 3]
    last[0] = 99
    assert middle.tolist() == [99, 3, 4, 5]


@pytest.mark.parametrize("dtype", sorted(reader.DTYPES))
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    width = getattr(torch, dtype).itemsize if hasattr(torch, dtype) else 1
    raw = bytes(b & 1 for b in noise(6 * width))
    writer = reference.Writer()
    writer.add(raw, dtype, [2, 3])
    writer.write(tmp_path / "a", {"$tensor": 0})
    snapshot = read_snapshot(tmp_path / "a")
    array = snapshot.tensors()[""]
    assert (array.itemsize, array.shape, array.tobytes()) == (width, (2, 3), raw)
    assert snapshot.dtype_of("") == dtype


@pytest.mark.parametrize(
    ("shape", "strides", "at", "expected"),
    [
        ([2, 3], None, 0, [[0, 1, 2], [3, 4, 5]]),
        ([3, 2], [1, 3], 0, [[0, 3], [1, 4], [2, 5]]),
        ([2, 2], [3, 2], 4, [[1, 3], [4, 6]]),
        ([2, 3], [0, 1], 8, [[2, 3, 4], [2, 3, 4]]),
        ([], None, 36, 9),
        ([], [], 36, 9),
        ([1, 2], [2**62, 1], 0, [[0, 1]]),
        ([2, 0], None, 40, [[], []]),
        ([0, 5], [2**62, 2**62], 40, []),
    ],
)
def test_strides(
    tmp_path: Path, shape: list[int], strides: list[int] | None, at: int, expected: object
) -> None:
    writer = reference.Writer()
    writer.add(np.arange(10, dtype="<i4").tobytes(), "int32", [10])
    writer.alias(at, "int32", shape, strides=strides)
    writer.write(tmp_path / "a", [{"$tensor": 0}, {"$tensor": 1}])
    assert verify(tmp_path / "a") == []
    assert read_snapshot(tmp_path / "a").tensors()["1"].tolist() == expected


def test_a_tensor_may_begin_anywhere(tmp_path: Path) -> None:
    writer = reference.Writer()
    writer.add(b"\1\2\3", "uint8", [3])
    writer.add(struct.pack("<2d", 1.5, -2.5), "float64", [2])
    writer.write(tmp_path / "a", [{"$tensor": 0}, {"$tensor": 1}])
    assert read_snapshot(tmp_path / "a").tensors()["1"].tolist() == [1.5, -2.5]


def test_a_snapshot_without_tensors(tmp_path: Path) -> None:
    reference.save(tmp_path / "a", {"lr": 0.1})
    assert verify(tmp_path / "a") == []
    assert read_snapshot(tmp_path / "a").tree() == {"lr": 0.1}


def test_names_are_those_of_the_tree_codec(tmp_path: Path) -> None:
    one = torch.ones(1)
    keys: list[Any] = [0, "0", None, 1.5, math.nan, b"\0", (1, ("a", Color.RED)), Color.RED, "a/b"]
    nested = {
        "": {key: one for key in keys},
        "0#2": one,
        "a": {"b": one},
        "deep": [(one, {2: one})],
    }
    manifest = reference.save(tmp_path / "a", nested)
    names = [name for name, _ in tree.leaves(manifest["tree"])]
    assert list(read_snapshot(tmp_path / "a").tensors()) == names
    assert len(names) == 13


# The tree.


def test_tree_as_plain_python(tmp_path: Path) -> None:
    generator = torch.Generator()
    moment = datetime.datetime(2025, 1, 2, 3, 4, 5, 6, datetime.timezone.utc)
    plain: dict[str, Any] = {
        "values": [None, True, -(2**70), 0.1, -0.0, "é", b"\0a", (1, [2])],
        "infinity": -math.inf,
        "sets": [{1, "a"}, frozenset({(1, 2)})],
        "$dollar": {1: "a", None: 2, (b"", 1.5): 3, True if False else "x": 4},
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter("aab"),
        "times": [moment, moment.date(), moment.time(), datetime.timedelta(-1, 5, 6)],
        "": {},
    }
    written = {
        **plain,
        "torch": [torch.float16, torch.device("cuda:1"), torch.Size([2, 3])],
        "scalars": [np.float32(2.5), np.str_("aé"), np.bytes_(b"a\0"), np.datetime64(5, "ms")],
        "generator": generator,
        "path": Path("runs/a"),
        "enum": {Color.RED: Color.RED},
        "tensor": torch.tensor([1, 2]),
    }
    reference.save(tmp_path / "a", written)
    read = read_snapshot(tmp_path / "a").tree()
    assert list(read) == list(written)
    assert {key: read[key] for key in plain} == plain
    assert [type(read[key]) for key in plain] == [type(plain[key]) for key in plain]
    assert math.copysign(1, read["values"][4]) == -1
    assert read["torch"] == ["float16", "cuda:1", (2, 3)]
    assert read["scalars"] == written["scalars"]
    assert [type(scalar) for scalar in read["scalars"]] == [
        type(scalar) for scalar in written["scalars"]
    ]
    assert read["generator"] == {"device": "cpu", "state": generator.get_state().numpy().tobytes()}
    assert read["path"] == PurePosixPath("runs/a")
    assert read["enum"] == {f"{__name__}.Color.RED": f"{__name__}.Color.RED"}
    assert read["tensor"].tolist() == [1, 2]


def test_nan_keeps_its_bits(tmp_path: Path) -> None:
    value = struct.unpack(">d", bytes.fromhex("fff8deadbeef0001"))[0]
    reference.save(tmp_path / "a", value)
    read = read_snapshot(tmp_path / "a").tree()
    assert struct.pack(">d", read).hex() == "fff8deadbeef0001"


# Damage: nothing wrong is returned, and what is wrong is named.


NOT_A_MANIFEST = r"form of a manifest|not match its digest"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A snapshot of one pack with two chunks: `model/a` raw, `model/b` in planes."""
    writer = reference.Writer(chunk_size=4096)
    writer.add(noise(3000), "uint8", [3000])
    writer.add(PATTERNS["zero lines"](4000), "float32", [1000])
    model = {"a": {"$tensor": 0}, "b": {"$tensor": 1}}
    written = writer.write(tmp_path / "small", {"model": model, "lr": 0.1})
    assert [chunk[5] for chunk in written["chunks"]] == ["raw", "planes"]
    return tmp_path / "small"


def test_every_flipped_byte_of_a_manifest_is_found(small: Path) -> None:
    data = (small / "manifest.json").read_bytes()
    flips = [(at, 1 << at % 8) for at in range(len(data))]
    capitals = [(at, 0x20) for at in range(60)]
    for at, flip in flips + capitals:
        damaged = bytearray(data)
        damaged[at] ^= flip
        (small / "manifest.json").write_bytes(damaged)
        with pytest.raises(ReaderError):
            read_snapshot(small)


def test_every_cut_of_a_manifest_is_found(small: Path) -> None:
    data = (small / "manifest.json").read_bytes()
    for size in (*range(60), *range(60, len(data) - 3, 7), *range(len(data) - 3, len(data))):
        (small / "manifest.json").write_bytes(data[:size])
        with pytest.raises(ReaderError, match=NOT_A_MANIFEST):
            read_snapshot(small)


@pytest.mark.parametrize("frame", [b" %b", b"%b ", b"%b\n", b"%b\0", b"\xef\xbb\xbf%b", b"[%b]"])
def test_bytes_around_a_manifest_are_refused(small: Path, frame: bytes) -> None:
    data = (small / "manifest.json").read_bytes()
    (small / "manifest.json").write_bytes(frame % data)
    with pytest.raises(ReaderError, match=NOT_A_MANIFEST):
        read_snapshot(small)


def test_a_flipped_byte_of_a_pack_is_found(small: Path) -> None:
    data = (small / "0.pack").read_bytes()
    assert len(data) == 8192
    for at in range(0, len(data), 17):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        (small / "0.pack").write_bytes(damaged)
        (finding,) = verify(small)
        chunk, name = (0, "b") if at < 4096 else (4096, "a")
        assert finding.startswith(f"the chunk at {chunk} of 0.pack: ")
        assert finding.endswith(f'; it holds "model/{name}"')


def test_damage_is_found_when_the_tensor_is_read(small: Path) -> None:
    with open(small / "0.pack", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    snapshot = read_snapshot(small)
    tensors = snapshot.tensors()
    assert tensors["model/b"].tobytes() == PATTERNS["zero lines"](4000)
    with pytest.raises(ReaderError, match=r"the chunk at 4096 of 0\.pack: .* digest"):
        tensors["model/a"]
    with pytest.raises(ReaderError, match=r"the chunk at 4096 of 0\.pack: .* digest"):
        snapshot.tree()


def cut(path: Path) -> None:
    os.truncate(path, 8191)


def grow(path: Path) -> None:
    os.truncate(path, 8193)


def link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


PACK_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "0.pack has 8191 bytes instead of 8192"),
    "grown": (grow, "0.pack has 8193 bytes instead of 8192"),
    "missing": (Path.unlink, "cannot open 0.pack: No such file"),
    "symbolic link": (link, "cannot open 0.pack: "),
    "pipe": (replace_by_pipe, "0.pack is not an ordinary file"),
    "directory": (replace_by_directory, "0.pack is not an ordinary file|cannot open"),
}


@pytest.mark.parametrize("name", PACK_DAMAGE)
def test_a_pack_that_is_not_as_it_was(small: Path, name: str) -> None:
    damage, message = PACK_DAMAGE[name]
    damage(small / "0.pack")
    with pytest.raises(ReaderError, match=message):
        read_snapshot(small)
    (finding,) = verify(small)
    assert finding.endswith('; it holds "model/a", "model/b"')


def test_a_pack_that_changes_after_opening(small: Path) -> None:
    snapshot = read_snapshot(small)
    cut(small / "0.pack")
    with pytest.raises(ReaderError, match=r"0\.pack has 8191 bytes"):
        snapshot.tree()


def test_a_hard_linked_pack_is_read(small: Path, tmp_path: Path) -> None:
    os.link(small / "0.pack", tmp_path / "other")
    assert verify(small) == []


def test_a_linked_manifest_is_refused(small: Path) -> None:
    link(small / "manifest.json")
    with pytest.raises(ReaderError, match=r"cannot open manifest\.json"):
        read_snapshot(small)


def test_no_snapshot_at_all(tmp_path: Path) -> None:
    with pytest.raises(ReaderError, match=r"cannot open manifest\.json: No such file"):
        read_snapshot(tmp_path)
    assert len(verify(tmp_path / "nowhere")) == 1


def test_findings_name_three_tensors(tmp_path: Path) -> None:
    writer = reference.Writer()
    for number in range(5):
        writer.add(bytes([number]), "uint8", [1])
    writer.write(tmp_path / "a", [{"$tensor": number} for number in range(5)])
    (tmp_path / "a" / "0.pack").write_bytes(bytes(4096))
    (finding,) = verify(tmp_path / "a")
    assert finding.endswith('; it holds "0", "1", "2" and 2 more')


# A manifest with the right digest that lies.

Change = Callable[[dict[str, Any]], object]


def set_in(*path: Any) -> Change:
    """A change that puts the last argument at the path of the others."""
    *keys, last, value = path

    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for key in keys:
            target = target[key]
        target[last] = value

    return change


def remove(name: str) -> Change:
    return lambda manifest: manifest.pop(name)


PACK, OFFSET, STORED, RAW, ELEMENT, ENCODING, DIGEST = range(7)
MEMBERS = ["format", "id", "step", "sequence", "created", "tree", "tensors", "stream"]
MEMBERS += ["chunk_size", "packs", "chunks", "metadata"]

LIES: dict[str, tuple[Change, str]] = {
    **{f"no {name}": (remove(name), f"no '{name}'") for name in MEMBERS},
    "format 2": (set_in("format", 2), "format 2 is unknown"),
    "format true": (set_in("format", True), "format True is unknown"),
    "format 1.0": (set_in("format", 1.0), "format 1.0 is unknown"),
    "id a number": (set_in("id", 1), "id .* not of type str"),
    "created a number": (set_in("created", 1), "created .* not of type str"),
    "metadata a list": (set_in("metadata", []), "metadata .* not of type dict"),
    "step negative": (set_in("step", -1), "step in"),
    "step a float": (set_in("step", 1.0), "step in"),
    "step a bool": (set_in("step", True), "step in"),
    "sequence negative": (set_in("sequence", -1), "sequence in"),
    "stream negative": (set_in("stream", -1), "stream in"),
    "stream longer": (set_in("stream", 7001), "do not add up"),
    "stream shorter": (set_in("stream", 6999), "do not add up|offset of a tensor"),
    "chunk_size 0": (set_in("chunk_size", 0), "chunk_size in"),
    "chunk_size too large": (set_in("chunk_size", 2**26 + 1), "chunk_size in"),
    "chunk_size smaller": (set_in("chunk_size", 3999), "raw length of a chunk"),
    "packs an object": (set_in("packs", {}), "where a list belongs"),
    "pack a list": (set_in("packs", 0, []), "malformed"),
    "pack without a name": (set_in("packs", 0, {"size": 8192}), "no 'name'"),
    "pack elsewhere": (set_in("packs", 0, "name", "../0.pack"), "digits and .pack"),
    "pack at the root": (set_in("packs", 0, "name", "/0.pack"), "digits and .pack"),
    "pack in a folder": (set_in("packs", 0, "name", "a/0.pack"), "digits and .pack"),
    "pack with a null": (set_in("packs", 0, "name", "0.pack\0"), "digits and .pack"),
    "pack with a line end": (set_in("packs", 0, "name", "0.pack\n"), "digits and .pack"),
    "pack of other digits": (set_in("packs", 0, "name", "\u0660.pack"), "digits and .pack"),
    "pack of many digits": (set_in("packs", 0, "name", "0" * 10 + ".pack"), "digits and .pack"),
    "pack without digits": (set_in("packs", 0, "name", ".pack"), "digits and .pack"),
    "pack a manifest": (set_in("packs", 0, "name", "manifest.json"), "digits and .pack"),
    "pack a number": (set_in("packs", 0, "name", 0), "digits and .pack"),
    "pack of another size": (set_in("packs", 0, "size", 8193), "8192 bytes instead of 8193"),
    "pack of negative size": (set_in("packs", 0, "size", -1), "size of a pack"),
    "pack of huge size": (set_in("packs", 0, "size", 2**63), "size of a pack"),
    "pack twice": (lambda m: m["packs"].append(dict(m["packs"][0])), "named twice"),
    "pack missing": (lambda m: m["packs"].append({"name": "1.pack", "size": 0}), "1.pack: No such"),
    "chunks an object": (set_in("chunks", {}), "where a list belongs"),
    "chunk an object": (set_in("chunks", 0, {}), "where a list belongs"),
    "chunk too short": (lambda m: m["chunks"][0].pop(), "malformed"),
    "chunk too long": (lambda m: m["chunks"][0].append(0), "malformed"),
    "chunk in no pack": (set_in("chunks", 0, PACK, 1), "pack of a chunk"),
    "chunk in pack -1": (set_in("chunks", 0, PACK, -1), "pack of a chunk"),
    "chunk in pack false": (set_in("chunks", 0, PACK, False), "pack of a chunk"),
    "chunk not aligned": (set_in("chunks", 1, OFFSET, 1), "not aligned"),
    "chunk behind the pack": (set_in("chunks", 0, OFFSET, 8192), "offset of a chunk"),
    "chunk before the pack": (set_in("chunks", 0, OFFSET, -4096), "offset of a chunk"),
    "chunk far behind": (set_in("chunks", 0, OFFSET, 2**64), "offset of a chunk"),
    "chunks overlap": (set_in("chunks", 0, OFFSET, 0), "overlap"),
    "stored 0": (set_in("chunks", 1, STORED, 0), "stored length"),
    "stored longer than raw": (set_in("chunks", 1, STORED, 4001), "stored length"),
    "stored negative": (set_in("chunks", 1, STORED, -1), "stored length"),
    "raw 0": (set_in("chunks", 0, RAW, 0), "raw length"),
    "raw longer than a chunk": (set_in("chunks", 0, RAW, 4097), "raw length"),
    "raw encoding of other length": (set_in("chunks", 1, ENCODING, "raw"), "encoding"),
    "planes of the whole length": (set_in("chunks", 0, ENCODING, "planes"), "encoding"),
    "unknown encoding": (set_in("chunks", 1, ENCODING, "zip"), "encoding"),
    "unknown element": (set_in("chunks", 1, ELEMENT, "f8"), "unknown element"),
    "element a list": (set_in("chunks", 1, ELEMENT, []), "malformed"),
    "digest too short": (set_in("chunks", 1, DIGEST, "0" * 31), "no digest"),
    "digest in capitals": (set_in("chunks", 1, DIGEST, "A" * 32), "no digest"),
    "digest a number": (set_in("chunks", 1, DIGEST, 0), "no digest"),
    "tensors an object": (set_in("tensors", {}), "where a list belongs"),
    "tensor without a dtype": (lambda m: m["tensors"][0].pop("dtype"), "no 'dtype'"),
    "unknown dtype": (set_in("tensors", 0, "dtype", "float33"), "unknown dtype"),
    "dtype of objects": (set_in("tensors", 0, "dtype", "|O"), "unknown dtype"),
    "dtype with fields": (set_in("tensors", 0, "dtype", "<f4,<f4"), "unknown dtype"),
    "dtype by another name": (set_in("tensors", 0, "dtype", "<i1"), "unknown dtype"),
    "dtype of no bytes": (set_in("tensors", 0, "dtype", "|V0"), "element size"),
    "dtype a list": (set_in("tensors", 0, "dtype", []), "malformed"),
    "dtype of an array": (
        set_in("tensors", 0, "dtype", "|u1"),
        r"\$tensor at .*model/a.*has dtype",
    ),
    "shape longer": (set_in("tensors", 1, "shape", [1001]), "offset of a tensor"),
    "shape negative": (set_in("tensors", 0, "shape", [-1, -3000]), "size of a tensor"),
    "shape of floats": (set_in("tensors", 0, "shape", [3000.0]), "size of a tensor"),
    "shape that overflows": (set_in("tensors", 0, "shape", [2**32, 2**32]), "too large"),
    "shape of many zeros": (set_in("tensors", 0, "shape", [0, 2**62, 2**62]), "too large"),
    "shape of many axes": (set_in("tensors", 0, "shape", [1] * 65), "too many dimensions"),
    "shape without end": (
        lambda m: m["tensors"][0].update(shape=[2**40, 2**40], strides=[0, 0]),
        "too large",
    ),
    "strides of another number": (set_in("tensors", 0, "strides", [1, 1]), "other strides"),
    "strides negative": (set_in("tensors", 0, "strides", [-1]), "a stride"),
    "strides too large": (set_in("tensors", 0, "strides", [3]), "offset of a tensor"),
    "strides that overflow": (set_in("tensors", 0, "strides", [2**62]), "offset of a tensor"),
    "at negative": (set_in("tensors", 0, "at", -1), "offset of a tensor"),
    "at behind the stream": (set_in("tensors", 0, "at", 4001), "offset of a tensor"),
    "at far behind": (set_in("tensors", 0, "at", 2**64), "offset of a tensor"),
    "tensor -1": (set_in("tree", {"$tensor": -1}), r"\$tensor in"),
    "tensor 2": (set_in("tree", {"$tensor": 2}), r"\$tensor in"),
    "tensor true": (set_in("tree", {"$tensor": True}), r"\$tensor in"),
    "tensor as an array": (set_in("tree", {"$array": 0}), r"\$array at .*has dtype uint8"),
    "tensor in a set": (set_in("tree", {"$set": [{"$tuple": [{"$tensor": 0}]}]}), "is in a set"),
    "unknown tag": (set_in("tree", {"$pickle": "gASVAA=="}), r"unknown or malformed \$pickle"),
    "key beside a tag": (set_in("tree", {"a": 1, "$tuple": []}), "other keys beside"),
    "key twice": (set_in("tree", {"$dict": [[1, 0], [True, 0]]}), "a key twice"),
    "element twice": (set_in("tree", {"$set": ["a", "a"]}), "an element"),
    "element not hashable": (set_in("tree", {"$set": [[]]}), "malformed"),
    "key not hashable": (set_in("tree", {"$dict": [[[], 0]]}), "a list as a key"),
    "pair of three": (set_in("tree", {"$dict": [[1, 2, 3]]}), "malformed"),
    "pair of text": (set_in("tree", {"$dict": ["ab"]}), "where a list belongs"),
    "tuple of text": (set_in("tree", {"$tuple": "ab"}), "where a list belongs"),
    "float too large": (set_in("tree", {"$float": "f" * 17}), r"malformed \$float"),
    "bytes not base64": (set_in("tree", {"$bytes": "*"}), "malformed"),
    "dtype not text": (set_in("tree", {"$dtype": 1}), "where text belongs"),
    "enum of numbers": (set_in("tree", {"$enum": [1, 2, 3]}), "malformed"),
    "scalar of objects": (set_in("tree", {"$scalar": ["|O", "AAAAAAAAAAA="]}), "unknown dtype"),
    "scalar of two": (set_in("tree", {"$scalar": ["<f4", "AAAAAAAAAAA="]}), "malformed"),
    "scalar of none": (set_in("tree", {"$scalar": ["<f4", ""]}), "malformed"),
    "time that is none": (set_in("tree", {"$time": "noon"}), "malformed"),
    "nested too deep": (
        lambda m: m.update(tree=json.loads("[" * 65 + "]" * 65)),
        "nested too deep",
    ),
}


def rewrite(path: Path, change: Change) -> None:
    """Changes the manifest, with a digest that is right again."""
    manifest = json.loads((path / "manifest.json").read_bytes())["snapshot"]
    change(manifest)
    (path / "manifest.json").write_bytes(reference.manifest_bytes(manifest))


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_lies(small: Path, name: str) -> None:
    change, message = LIES[name]
    rewrite(small, change)
    with pytest.raises(ReaderError, match=message):
        read_snapshot(small)
    assert verify(small) != []


def test_members_that_a_reader_does_not_know_are_ignored(small: Path) -> None:
    rewrite(small, lambda manifest: manifest.update(new={"a": [1, None]}))
    assert verify(small) == []


TEXTS = {
    "a key twice": (b'{"format":1,"format":1}', "a key twice"),
    "a key twice inside": (b'{"format":1,"metadata":{"a":1,"a":1}}', "a key twice"),
    "NaN": (b'{"format":1,"metadata":{"a":NaN}}', "number NaN"),
    "infinity": (b'{"format":1,"metadata":{"a":-Infinity}}', "number -Infinity"),
    "a list": (b"[]", "form of a manifest"),
    "not UTF-8": (b'{"format":1,"a":"\xff"}', "malformed"),
    "UTF-16": ('{"format":1}'.encode("utf-16-le"), "malformed|form of a manifest"),
    "a comment": (b'{"format":1}/**/{}', "malformed"),
    "two objects": (b'{"format":1}{}', "malformed"),
    "nesting": (b'{"format":1,"tree":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed"),
    "many digits": (b'{"format":1,"step":' + b"1" * 10_000 + b"}", "malformed"),
    "empty": (b"{}", "no 'format'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_manifest_of_other_text(small: Path, name: str) -> None:
    body, message = TEXTS[name]
    (small / "manifest.json").write_bytes(reference.manifest_bytes(body))
    with pytest.raises(ReaderError, match=message):
        read_snapshot(small)


def test_a_number_that_reads_as_infinity_is_refused(small: Path) -> None:
    data = (small / "manifest.json").read_bytes()
    body = data[data.index(b'"snapshot":') + 11 : -1].replace(b'"lr":0.1', b'"lr":1e999')
    (small / "manifest.json").write_bytes(reference.manifest_bytes(body))
    with pytest.raises(ReaderError, match="number that is too large"):
        read_snapshot(small)


def test_a_manifest_of_more_than_a_gibibyte_is_refused(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reader._MAX_MANIFEST == 2**30
    monkeypatch.setattr(reader, "_MAX_MANIFEST", 100)
    with pytest.raises(ReaderError, match="too large"):
        read_snapshot(small)


# An encoding that lies, under a digest that is right.


def write_chunk(path: Path, stored: bytes, raw: bytes, element: str) -> Path:
    """A snapshot of one chunk with `stored` as its encoding of `raw`."""
    writer = reference.Writer(encoding="raw")
    writer.add(raw, "|u1", [len(raw)], element=element)
    chunk = [0, 0, len(stored), len(raw), element, "planes", xxhash.xxh3_128_hexdigest(raw)]
    size = -(-len(stored) // 4096) * 4096
    pack = {"name": "0.pack", "size": size}
    writer.write(path, {"a": {"$array": 0}}, chunks=[chunk], packs=[pack])
    (path / "0.pack").write_bytes(stored + bytes(size - len(stored)))
    return path


def huffman(
    streams: Sequence[bytes],
    *,
    lengths: Mapping[str, int] = MappingProxyType({"a": 1, "b": 2, "c": 2}),
    escape: str | None = None,
    literals: bytes = b"",
    number: int | None = None,
) -> bytes:
    """A payload of the method huffman with codes of these lengths."""
    nibbles = [lengths.get(chr(symbol), 0) for symbol in range(256)]
    number = len(literals) if number is None else number
    return b"".join(
        [
            struct.pack("<BBHI", escape is not None, ord(escape or "\0"), 0, number),
            bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)),
            struct.pack("<8I", *map(len, streams)),
            *streams,
            literals,
        ]
    )


def frame(data: bytes, *, with_size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=with_size).compress(data)


def block(kept: int, *payloads: tuple[int, bytes], flags: int = 0, line_map: bytes = b"") -> bytes:
    entries = [struct.pack("<BBBBI", method, 0, 0, 0, len(data)) for method, data in payloads]
    header = struct.pack("<BBHI", flags, len(payloads), 0, kept)
    return b"".join([header, line_map, *entries, *(data for _, data in payloads)])


LINES = b"ab" * 64
GOOD = block(128, (2, frame(LINES)))

ENCODINGS: dict[str, tuple[bytes, str]] = {
    "cut header": (GOOD[:7], "cut short"),
    "cut entry": (GOOD[:12], "cut short"),
    "cut payload": (GOOD[:-1], "cut short"),
    "bytes behind": (GOOD + b"\0", "bytes follow"),
    "a second block": (GOOD + GOOD, "bytes follow"),
    "unknown flag": (b"\2" + GOOD[1:], "unknown header"),
    "another width": (b"\0\2" + GOOD[2:], "unknown header"),
    "reserved bytes": (b"\0\1\1\0" + GOOD[4:], "unknown header"),
    "reserved bytes of a plane": (GOOD[:9] + b"\1" + GOOD[10:], "unknown header"),
    "kept too small": (block(127, (1, b"a")), "keeps another number"),
    "kept too large": (block(2**32 - 1, (1, b"a")), "keeps another number"),
    "kept without a map": (block(64, (1, b"a")), "keeps another number"),
    "map cut short": (struct.pack("<BBHI", 1, 1, 0, 128), "cut short"),
    "map of other lines": (block(128, (1, b"a"), flags=1, line_map=b"\1"), "keeps another"),
    "map too long": (block(128, (1, b"a"), flags=1, line_map=b"\7"), "longer than its block"),
    "unknown method": (block(128, (5, b"a")), "unknown method"),
    "seven bits of less": (block(128, (4, bytes(111))), "another length"),
    "raw too short": (block(128, (0, b"a")), "another length"),
    "constant of two": (block(128, (1, b"aa")), "unknown method or another length"),
    "constant of none": (block(128, (1, b"")), "unknown method or another length"),
    "size too large": (GOOD[:12] + b"\xff\xff\xff\xff" + GOOD[16:], "cut short"),
    "no frame": (block(128, (2, b"not a frame")), "zstd frame is damaged"),
    "empty frame": (block(128, (2, b"")), "zstd frame is damaged"),
    "frame of less": (block(128, (2, frame(LINES[:-1]))), "another length"),
    "frame of more": (block(128, (2, frame(LINES + b"a"))), "another length"),
    "frame of less, unsized": (block(128, (2, frame(b"a", with_size=False))), "another length"),
    "frame of more, unsized": (
        block(128, (2, frame(bytes(2**20), with_size=False))),
        "zstd frame is damaged",
    ),
    "frame that says a lot": (
        block(128, (2, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**50) + b"\1\0\0")),
        "another length",
    ),
    "frame cut short": (block(128, (2, frame(LINES)[:-1])), "zstd frame is damaged"),
    "two frames": (block(128, (2, frame(LINES) + frame(LINES))), "zstd frame is damaged"),
    "bytes behind a frame": (block(128, (2, frame(LINES) + b"\0")), "zstd frame is damaged"),
    "skippable frame": (block(128, (2, b"\x50\x2a\x4d\x18\0\0\0\0")), "another length"),
    "other bytes": (block(128, (1, b"a")), "digest"),
}


def test_the_good_encoding_is_read(tmp_path: Path) -> None:
    path = write_chunk(tmp_path / "a", GOOD, LINES, "u8")
    assert read_snapshot(path).tensors()["a"].tobytes() == LINES


PAIRS = b"ab" * 512
# In each of eight streams 128 symbols, in turn 0 and 10, the first bit lowest.
AB = bytes([0b10010010, 0b00100100, 0b01001001]) * 8

HUFFMAN_ENCODINGS: dict[str, tuple[bytes, str]] = {
    "huffman cut short": (block(1024, (3, huffman([AB] * 8)[:-1])), "cut short"),
    "huffman without a header": (block(1024, (3, bytes(167))), "cut short"),
    "huffman without codes": (block(1024, (3, bytes(168))), "not complete"),
    "huffman of one code": (block(1024, (3, huffman([AB] * 8, lengths={"a": 1}))), "not complete"),
    "huffman of too many codes": (
        block(1024, (3, huffman([AB] * 8, lengths={"a": 1, "b": 1, "c": 1}))),
        "not complete",
    ),
    "huffman of long codes": (
        block(1024, (3, huffman([AB] * 8, lengths={chr(i): min(i, 12) for i in range(1, 14)}))),
        "not complete",
    ),
    "huffman with unknown flags": (block(1024, (3, b"\2" + huffman([AB] * 8)[1:])), "not complete"),
    "huffman with reserved bytes": (
        block(1024, (3, b"\0\0\1" + huffman([AB] * 8)[3:])),
        "not complete",
    ),
    "huffman stream of less": (block(1024, (3, huffman([AB[:-1]] * 8))), "another length"),
    "huffman stream of more": (block(1024, (3, huffman([AB + b"\0"] * 8))), "another length"),
    "huffman stream of none": (block(1024, (3, huffman([b""] * 8))), "another length"),
    "huffman bits behind": (block(1024, (3, huffman([AB[:-1] + b"\xff"] * 8))), "another length"),
    "huffman bytes behind": (block(1024, (3, huffman([AB] * 8) + b"\0")), "another number"),
    "huffman literals without an escape": (
        block(1024, (3, huffman([AB] * 8, literals=b"a"))),
        "no code for its escape",
    ),
    "huffman escape without a code": (
        block(1024, (3, huffman([AB] * 8, escape="z"))),
        "no code for its escape",
    ),
    "huffman literals of less": (
        block(1024, (3, huffman([AB] * 8, escape="b", literals=b"b" * 511))),
        "literals than escapes",
    ),
    "huffman literals of more": (
        block(1024, (3, huffman([AB] * 8, escape="b", literals=b"b" * 513))),
        "literals than escapes",
    ),
    "huffman literals cut short": (
        block(1024, (3, huffman([AB] * 8, escape="b", literals=b"b" * 512, number=513))),
        "literals than it says",
    ),
}


@pytest.mark.parametrize("name", HUFFMAN_ENCODINGS)
def test_a_huffman_code_that_lies(tmp_path: Path, name: str) -> None:
    stored, message = HUFFMAN_ENCODINGS[name]
    path = write_chunk(tmp_path / "a", stored, PAIRS, "u8")
    with pytest.raises(ReaderError, match=rf"the chunk at 0 of 0\.pack: .*({message})"):
        read_snapshot(path).tree()


@pytest.mark.parametrize(
    "payload",
    [
        huffman([AB] * 8),
        huffman([AB] * 8, escape="b", literals=b"b" * 512),
        huffman([bytes(16)] * 8, escape="a", literals=PAIRS[:1024]),
    ],
    ids=["plain", "escaped", "all escaped"],
)
def test_a_huffman_code_is_read(payload: bytes) -> None:
    stored = block(1024, (3, payload))
    assert reader._decode_planes(stored, 1024, 1, False).tobytes() == PAIRS


def test_no_bits_follow_those_of_seven(tmp_path: Path) -> None:
    raw = bytes(byte % 128 for byte in noise(70))
    stored = reference.planes(raw, "u8", method=reference.SEVEN_BITS, line_map=False)
    assert len(stored) == 8 + 8 + 62
    assert reader._decode_planes(stored, 70, 1, False).tobytes() == raw
    with pytest.raises(ReaderError, match="bits follow"):
        reader._decode_planes(stored[:-1] + bytes([stored[-1] | 4]), 70, 1, False)


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_that_lies(tmp_path: Path, name: str) -> None:
    stored, message = ENCODINGS[name]
    path = write_chunk(tmp_path / "a", stored, LINES, "u8")
    with pytest.raises(ReaderError, match=rf"the chunk at 0 of 0\.pack: .*({message})"):
        read_snapshot(path).tree()
    (finding,) = verify(path)
    assert finding.endswith('; it holds "a"')


def test_a_frame_with_a_large_window_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=24, write_content_size=0)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj()
    data = stream.compress(LINES) + stream.flush()
    path = write_chunk(tmp_path / "a", block(128, (2, data)), LINES, "u8")
    with pytest.raises(ReaderError, match="too much memory"):
        read_snapshot(path).tree()


def test_elements_that_do_not_divide_what_is_kept(tmp_path: Path) -> None:
    path = write_chunk(tmp_path / "a", block(127, *[(1, b"a")] * 2), LINES[:126], "i16")
    with pytest.raises(ReaderError, match="keeps another number"):
        read_snapshot(path).tree()
    path = write_chunk(tmp_path / "b", block(127, *[(1, b"a")] * 2), LINES[:127], "i16")
    with pytest.raises(ReaderError, match="whole elements"):
        read_snapshot(path).tree()


def test_a_block_that_keeps_nothing(tmp_path: Path) -> None:
    stored = block(0, (0, b""), flags=1, line_map=b"\0")
    path = write_chunk(tmp_path / "raw", stored, bytes(128), "u8")
    assert read_snapshot(path).tensors()["a"].tobytes() == bytes(128)
    stored = block(0, (1, b"x"), flags=1, line_map=b"\0")
    path = write_chunk(tmp_path / "constant", stored, bytes(128), "u8")
    with pytest.raises(ReaderError, match="another length"):
        read_snapshot(path).tensors()["a"]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    at=st.integers(0, 200),
    value=st.integers(0, 255),
    element=st.sampled_from(sorted(reference.WIDTHS)),
)
def test_a_changed_byte_of_an_encoding_decodes_or_is_refused(
    at: int, value: int, element: str
) -> None:
    raw = PATTERNS["zero lines"](640)
    stored = bytearray(reference.planes(raw, element))
    stored[at % len(stored)] = value
    try:
        decoded = reader._decode_planes(bytes(stored), len(raw), *reader.ELEMENTS[element])
    except ReaderError:
        return
    assert len(decoded) == len(raw)


# The module by itself.


def test_the_command_prints_a_table(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reader.main([str(small)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "name     dtype    shape  bytes    at",
        "model/a  uint8    3000    3000     0",
        "model/b  float32  1000    4000  3000",
        "step 200: 2 tensors, 7000 bytes",
    ]


def test_the_command_tells_of_damage(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(small / "0.pack")
    assert reader.main([str(small)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "0.pack has 8191 bytes instead of 8192" in output.err


def test_names_are_printed_safely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = reference.Writer()
    writer.add(b"a", "uint8", [1])
    path = tmp_path / "a"
    manifest = writer.write(path, {"\x1b[2J\n\u202e\x00é": {"$tensor": 0}})
    assert reader.main([str(path)]) == 0
    assert r"\x1b[2J\n\u202e\x00é" in capsys.readouterr().out
    hostile = copy.deepcopy(manifest)
    hostile["tree"] = {"\ud800": {"$tensor": 0}}
    body = json.dumps(hostile, separators=(",", ":")).encode()
    (path / "manifest.json").write_bytes(reference.manifest_bytes(body))
    assert reader.main([str(path)]) == 1
    assert "half a surrogate pair" in capsys.readouterr().err


def test_a_copy_of_the_file_works_alone(small: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.py"
    shutil.copy(reader.__file__, alone)
    command = [sys.executable, "-I", str(alone), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step 200: 2 tensors, 7000 bytes" in done.stdout


def test_reading_needs_no_torch_and_no_engine(small: Path) -> None:
    script = (
        "import sys; from pysnap import reader; reader.read_snapshot(sys.argv[1]).tree(); "
        "assert not {'torch', 'pysnap._engine', 'pysnap.tree', 'xxhash'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, str(small)], check=True, env=environment)
