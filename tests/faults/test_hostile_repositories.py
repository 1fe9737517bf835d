"""P11: a hostile repository executes nothing, touches nothing outside, costs what its files do, and
is refused with an error of pysnap.

The attacker works out every digest anew, so no digest is a defence.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from conftest import Count
from damage import rewritten
from reference_writer import Writer, manifest_bytes

import pysnap
from pysnap import reader
from pysnap.reader import ReaderError
from pysnap.verify import verify_snapshot

HARNESS = "hostile repositories"

CHILD = Path(__file__).with_name("hostile_child.py")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {
        "w": torch.arange(2000.0),
        "tied": torch.arange(6),
        "a": np.arange(9),
        "plain": [1, 2.5, None, True, "x", (1, 2), {3}, b"b", float("nan")],
    }
    state["again"] = state["tied"]
    return pysnap.save(tmp_path / "s", state, metadata={"config": {"lr": 0.1}})


# Every value of a manifest, replaced by every nasty one.

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 3, 4095, 4096, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**400, 0.5, -0.0, 1e308, "", "x", ".", "..", "../../etc/passwd", "/etc/passwd",
    "0.pack/../../1.pack", "0.pack\0", "0.pack\n", "\N{ARABIC-INDIC DIGIT ZERO}.pack",
    "\x1b[2J\r\n", "\u202e", "f" * 32, "F" * 32, "a" * 100_000, [], [0], [[]], {}, {"": 0},
    {"$tensor": 0}, {"$array": 0}, {"$tensor": -1}, {"$tensor": 10**9}, {"$x": 0}, {"$dict": [[1]]},
    {"$enum": ["os", "system", "id"]}, {"$path": "/etc/passwd"}, {"$device": "cuda:9"},
    {"$generator": {"device": "cpu", "state": "AAAA"}}, {"$scalar": ["|O", "AAAAAAAAAAA="]},
    {"$set": [[1]]}, {"$bytes": "A"}, {"$float": "7ff0000000000000"}, {"$size": [2**63]},
    {"$time": "0000000000000000"}, {"$date": "20200101"}, {"$datetime": "2020-01-01"},
    {"$timedelta": [0, 86400, 0]}, {"$timedelta": [0, 0, True]}, {"$timedelta": [10**9, 0, 0]},
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in it, containers among them."""
    yield path
    if isinstance(node, dict):
        for key in node:
            yield from places(node[key], (*path, key))
    elif isinstance(node, list):
        for index in range(len(node)):
            yield from places(node[index], (*path, index))


def replaced(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(node)
    target = changed
    for key in path[:-1]:
        target = target[key]
    if value is places:
        del target[path[-1]]
    else:
        target[path[-1]] = copy.deepcopy(value)
    return changed


def verdicts(path: Path) -> tuple[bool | None, bool]:
    """Whether pysnap and the independent reader accept a snapshot; any error of another kind fails.
    None where this process lacks what the form allows, an enum or a device: what is wrong behind
    that was not looked at."""
    accepted: list[bool | None] = []
    for reads, kind in (
        ((pysnap.load, lambda p: [entry[...] for entry in pysnap.open(p).values()]), pysnap.Error),
        ((lambda p: reader.read_snapshot(p).tree(),), ReaderError),
    ):
        ok: bool | None = True
        for read in reads:
            try:
                read(path)
            except pysnap.MismatchError:
                ok = ok and None
            except kind as error:
                ok = False
                message = str(error)
                assert message.isprintable() and len(message) < 2000, message
        accepted.append(ok)
    verify_snapshot(path)
    reader.verify(path)
    return accepted[0], bool(accepted[1])


def agree(path: Path) -> bool:
    ours, theirs = verdicts(path)
    return ours is None or ours == theirs


def test_every_value_of_a_manifest_replaced(saved: Path, count: Count, full: bool) -> None:
    """Nothing but errors of pysnap; both readers refuse the same manifests."""
    file = saved / "manifest.json"
    before = json.loads(file.read_bytes())["snapshot"]
    number = 0
    for path in places(before):
        if not path or (path[0] == "metadata" and len(path) > 2):
            continue
        for value in (*NASTY, places):
            number += 1
            if not full and number % 2:
                continue
            file.write_bytes(manifest_bytes(replaced(before, path, value)))
            # Only torch can tell a generator's state from another.
            assert agree(saved) or "$generator" in str(value), (path, value)
            count()


# JSON itself.

BODIES: dict[str, Callable[[bytes], bytes]] = {
    "duplicate key": lambda body: body.replace(b'{"format":1', b'{"format":1,"format":1', 1),
    "duplicate key with another escape": lambda b: b.replace(b'"w":', b'"\\u0077":0,"w":', 1),
    "deep lists": lambda body: body.replace(b'"tree":', b'"tree":' + b"[" * 100_000, 1),
    "deep objects": lambda body: body.replace(b'"tree":', b'"tree":' + b'{"a":' * 100_000, 1),
    "deep and closed": lambda b: b.replace(
        b'"tree":', b'"t":' + b"[" * 50_000 + b"]" * 50_000 + b',"tree":', 1
    ),
    "65 lists": lambda b: b.replace(
        b'"tree":{', b'"tree":{"d":' + b"[" * 65 + b"]" * 65 + b",", 1
    ),
    "an int of a million digits": lambda b: b.replace(b'"step":0', b'"step":' + b"9" * 10**6, 1),
    "a float that is infinite": lambda body: body.replace(b'"tree":{', b'"tree":{"f":1e999,', 1),
    "NaN": lambda body: body.replace(b'"step":0', b'"step":NaN', 1),
    "Infinity in the metadata": lambda b: b.replace(b'"lr":0.1', b'"lr":-Infinity', 1),
    "bytes that are no UTF-8": lambda body: body.replace(b'"w":', b'"\xff\xfe":', 1),
    "an overlong UTF-8": lambda body: body.replace(b'"w":', b'"\xc0\x80":', 1),
    "half a surrogate pair": lambda body: body.replace(b'"w":', b'"\\ud800":', 1),
    "UTF-16": lambda body: body.decode().encode("utf-16"),
    "a byte order mark": lambda body: b"\xef\xbb\xbf" + body,
    "white space before": lambda body: b" " + body,
    "a raw control character": lambda body: body.replace(b'"w":', b'"w\n":', 1),
    "a comment": lambda body: body.replace(b'{"format"', b'{/**/"format"', 1),
    "two documents": lambda body: body + body,
    "a list": lambda body: b"[" + body + b"]",
    "nothing": lambda body: b"",
    "a number": lambda body: b"1",
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_json_that_is_none(saved: Path, count: Count, name: str) -> None:
    file = saved / "manifest.json"
    data = file.read_bytes()
    body = data[data.index(b'"snapshot":') + 11 : -1]
    hostile = BODIES[name](body)
    assert hostile != body
    file.write_bytes(manifest_bytes(hostile))
    assert verdicts(saved) == (False, False)
    for read in (pysnap.load, pysnap.open):
        try:
            read(saved)
        except pysnap.Error as error:
            assert str(saved) in str(error)
    count()


@pytest.mark.parametrize(
    "key", ["\0", "\x1b[2J", "a/b", "..", "/", "\u202e", "x" * 10_000, "$", ""]
)
def test_names_with_odd_characters_are_only_names(saved: Path, count: Count, key: str) -> None:
    def rename(snapshot: dict[str, Any]) -> None:
        form = {"$dict": [[key, {"$tensor": 1}]]} if key.startswith("$") else {key: {"$tensor": 1}}
        snapshot["tree"] = form

    (saved / "manifest.json").write_bytes(rewritten(saved, rename))
    assert verdicts(saved) == (True, True)
    with (saved / "0.pack").open("r+b") as pack:
        pack.write(bytes(1) * os.path.getsize(saved / "0.pack"))
    assert all(problem.isprintable() for problem in verify_snapshot(saved).problems)
    assert verdicts(saved) == (False, False)
    count()


# Chunks.


def snapshot_of(path: Path, chunks: list[tuple[bytes, int, str, str]], **members: Any) -> Path:
    """A snapshot of chunks that are given as they are stored: bytes, raw length, element,
    encoding."""
    pack, table, at = b"", [], 0
    for stored, raw, element, encoding in chunks:
        row = [0, len(pack), len(stored), raw, element, encoding, "0" * 32]
        if encoding == "raw":
            row[-1] = xxhash.xxh3_128_hexdigest(stored)
        table.append(row)
        pack += stored + bytes(-len(stored) % 4096)
        at += raw
    Writer().write(
        path,
        {"x": {"$tensor": 0}},
        **{
            "tensors": [{"dtype": "uint8", "shape": [at], "at": 0}],
            "stream": at,
            "chunk_size": 2**26,
            "chunks": table,
            "packs": [{"name": "0.pack", "size": len(pack)}],
            **members,
        },
    )
    (path / "0.pack").write_bytes(pack)
    return path


def block(
    planes: list[tuple[int, bytes]], kept: int, *, flags: int = 0, line_map: bytes = b""
) -> bytes:
    header = struct.pack("<BBHI", flags, len(planes), 0, kept)
    entries = [struct.pack("<BBBBI", method, 0, 0, 0, len(data)) for method, data in planes]
    return b"".join([header, line_map, *entries, *(data for _, data in planes)])


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


MAGIC = b"\x28\xb5\x2f\xfd"


def claiming(size: int, *, window: int | None = None) -> bytes:
    """A zstd frame header that claims a content of `size` bytes, before one empty last block."""
    if window is not None:
        return (
            b"\x28\xb5\x2f\xfd" + bytes([0b11000000, window]) + struct.pack("<Q", size) + b"\1\0\0"
        )
    return b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", size) + b"\1\0\0"


def runs(size: int, raw_byte: bytes = b"\0") -> bytes:
    """A zstd frame without a content size that is `size` bytes of one value, in RLE blocks."""
    body, left = b"", size
    while left:
        length = min(left, 2**17)
        left -= length
        body += struct.pack("<I", length << 3 | 1 << 1 | (left == 0))[:3] + raw_byte
    return b"\x28\xb5\x2f\xfd" + bytes([0, 13 << 3]) + body


N = 2**20


def chunk_attacks() -> dict[str, list[tuple[bytes, int, str, str]]]:
    good = frame(bytes(N))
    one = {
        "a frame that claims an exabyte": (2, claiming(2**60)),
        "a frame with a window of 3 TiB": (2, claiming(N, window=0xFF)),
        "a frame that decodes to a gibibyte": (2, frame(bytes(2**30), level=1)),
        "a frame of unknown size that decodes to a gibibyte": (2, runs(2**30)),
        "a frame that decodes to a byte less": (2, frame(bytes(N - 1))),
        "a frame that decodes to a byte more": (2, frame(bytes(N + 1))),
        "a frame of nothing": (2, frame(b"")),
        "two frames": (2, frame(bytes(N // 2)) * 2),
        "a skippable frame before it": (2, b"\x50\x2a\x4d\x18\4\0\0\0abcd" + good),
        "a skippable frame alone": (2, b"\x50\x2a\x4d\x18\4\0\0\0abcd"),
        "a frame that is cut": (2, good[:-1]),
        "bytes behind a frame": (2, good + b"\0"),
        "a frame of an old format": (2, b"\x27\xb5\x2f\xfd" + good[4:]),
        "a frame with a dictionary": (2, MAGIC + b"\xa1\7" + struct.pack("<I", N) + b"\1\0\0"),
        "a raw plane that is short": (0, bytes(99)),
        "a constant of two bytes": (1, b"ab"),
        "a constant of none": (1, b""),
        "an unknown method": (250, b"a"),
    }  # fmt: skip
    attacks = {name: [(block([plane], N), N, "u8", "planes")] for name, plane in one.items()}
    constant = block([(1, b"\0")], N)
    attacks |= {
        "64 MiB in 1 KiB, sixteen times": [(constant * 64, 64 * N, "u8", "planes")] * 16,
        "a plane longer than the chunk": [
            (constant[:12] + b"\xff\xff\xff\xff\0", N, "u8", "planes")
        ],
        "a block that keeps more than it has": [
            (block([(1, b"\0")], 2**32 - 1), N, "u8", "planes")
        ],
        "a map that is longer": [
            (block([(1, b"\0")], 64, flags=1, line_map=b"\xff"), 64, "u8", "planes")
        ],
        "unknown flags": [(block([(1, b"\0")], N, flags=2), N, "u8", "planes")],
        "planes of another element": [(block([(1, b"\0")] * 2, N), N, "f32", "planes")],
        "a block too many": [(constant * 2, N, "u8", "planes")],
        "a block too few": [(constant, 2 * N, "u8", "planes")],
        "an empty plane that is constant": [
            (block([(1, b"a")], 0, flags=1, line_map=bytes(N // 512)), N, "u8", "planes")
        ],
        "raw with another digest": [(bytes(4096), 4096, "u8", "raw")],
    }  # fmt: skip
    return attacks


def build_chunk_attacks(folder: Path) -> None:
    def change(snapshot: dict[str, Any]) -> None:
        snapshot["chunks"][0][6] = "0" * 32

    for name, chunks in chunk_attacks().items():
        path = snapshot_of(folder / name, chunks)
        (path / "manifest.json").write_bytes(rewritten(path, change))


def build_manifest_attacks(folder: Path, saved: Path) -> None:
    def make(name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = Path(shutil.copytree(saved, folder / name))
        (path / "manifest.json").write_bytes(rewritten(saved, change))

    big = 2**62
    make(
        "many packs",
        lambda s: s.update(packs=[{"name": f"{n}.pack", "size": 4096} for n in range(10**5)]),
    )
    make("many packs of one name", lambda s: s.update(packs=[s["packs"][0]] * 10**5))
    make("many chunks at one place", lambda s: s.update(chunks=[s["chunks"][0]] * 10**5))
    make("a shape that overflows", lambda s: s["tensors"][0].update(shape=[2**32, 2**32]))
    make("a shape that overflows to 8", lambda s: s["tensors"][0].update(shape=[2**61 + 1, 8]))
    make("many dimensions", lambda s: s["tensors"][0].update(shape=[1] * 10**5))
    make(
        "strides out of the stream",
        lambda s: s["tensors"][0].update(shape=[2, 2], strides=[big, 1]),
    )
    make("negative strides", lambda s: s["tensors"][0].update(shape=[2, 2], strides=[-1, 1]))
    make("a tensor behind the stream", lambda s: s["tensors"][0].update(at=s["stream"]))
    make("a tensor far behind the stream", lambda s: s["tensors"][0].update(at=2**63 - 8))
    make("an exabyte of packs", lambda s: s["packs"][0].update(size=2**60))
    make("a stream that lies", lambda s: s.update(stream=s["stream"] * 2))
    make("no chunks", lambda s: s.update(chunks=[], stream=0))
    make("a dtype that is larger", lambda s: s["tensors"][0].update(dtype="complex128"))
    make("overlapping chunks", lambda s: s["chunks"].insert(1, s["chunks"][0]))
    make("a pack that is a path", lambda s: s["packs"][0].update(name="../s/0.pack"))
    make("a pack that is absolute", lambda s: s["packs"][0].update(name="/etc/hostname"))
    make("an enum of a module", lambda s: s.update(tree={"$enum": ["antigravity", "A", "b"]}))
    make("an enum that is a function", lambda s: s.update(tree={"$enum": ["os", "system", "id"]}))


# Names in place of files.

OUTSIDE = "outside"


def link(path: Path, aside: Path) -> None:
    path.symlink_to(aside)


def loop(path: Path, aside: Path) -> None:
    path.symlink_to(path.name)


def pipe(path: Path, aside: Path) -> None:
    os.mkfifo(path)


def device(path: Path, aside: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))


def listening(path: Path, aside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def directory(path: Path, aside: Path) -> None:
    path.mkdir()
    (path / "x").write_bytes(b"x")


KINDS = [link, loop, pipe, device, listening, directory]


def build_file_attacks(folder: Path, saved: Path, aside: Path) -> None:
    """Snapshots with something else in place of a file; a link leads to the true file, outside."""
    aside.mkdir()
    for name in ("manifest.json", "0.pack", "notes.json"):
        for kind in KINDS:
            path = Path(shutil.copytree(saved, folder / f"{name} is a {kind.__name__}"))
            true = aside / f"{name}-{kind.__name__}"
            if (path / name).exists():
                (path / name).rename(true)
            else:
                true.write_bytes(b'{"tags": ["a"]}')
            try:
                kind(path / name, true)
            except PermissionError:
                shutil.rmtree(path)  # only root makes devices


def read_by_child(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(CHILD), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = sorted(path.name for path in folder.iterdir())
    assert [row["case"] for row in rows] == wanted, done.stderr[-3000:]
    return rows


def check(row: dict[str, Any], folder: Path) -> None:
    """Only errors of pysnap, nothing that was watched for, memory within bounds."""
    assert row["events"] == [], row
    for how, (ended, message) in row["results"].items():
        assert ended in ("ok", "refused"), (row["case"], how, ended, message)
        assert message.isprintable() and len(message) < 2000, message
        if ended == "refused" and not how.startswith("reader"):
            assert str(folder) in message, message
    files = sum(
        path.lstat().st_size for path in (folder / row["case"]).rglob("*") if path.is_file()
    )
    # Parsed JSON takes many times its text; chunks are at most 64 MiB, and a few are in memory.
    assert row["memory"] < 30 * files + 512 * 2**20, row


def test_hostile_snapshots_in_a_process_that_is_watched(
    saved: Path, tmp_path: Path, count: Count
) -> None:
    folder = tmp_path / "cases"
    folder.mkdir()
    build_chunk_attacks(folder)
    build_manifest_attacks(folder, saved)
    build_file_attacks(folder, saved, tmp_path / OUTSIDE)
    rows = read_by_child(folder)
    for row in rows:
        check(row, folder)
        results = {how: ended for how, (ended, _) in row["results"].items()}
        # Notes are no part of the data.
        accepted = "ok" if row["case"].startswith("notes.json") else "refused"
        if row["case"].startswith("an enum"):
            # For a reader that has no classes it is three texts.
            assert results["load"] == "refused"
        else:
            assert results["load"] == results["reader"] == accepted, row
        count()
    assert len(rows) > 50


def test_hostile_repositories_in_a_process_that_is_watched(
    saved: Path, tmp_path: Path, count: Count
) -> None:
    """A repository with one intact snapshot, and something else in place of another name."""
    folder, aside = tmp_path / "cases", tmp_path / OUTSIDE
    folder.mkdir()
    aside.mkdir()
    pysnap.Snapshotter(tmp_path / "empty", every="off", x=torch.zeros(1)).close()
    expected = {}
    for name in (".pysnap", ".writer", "step-000000009", "latest", ".partial-x", ".trash-x"):
        for kind in KINDS:
            root = Path(
                shutil.copytree(tmp_path / "empty", folder / f"{name} is a {kind.__name__}")
            )
            shutil.copytree(saved, root / "step-000000001")
            true = aside / f"{name}-{kind.__name__}"
            if (root / name).exists():
                (root / name).rename(true)
            else:
                shutil.copytree(saved, true)
            try:
                kind(root / name, true)
            except PermissionError:
                shutil.rmtree(root)
                continue
            expected[root.name] = "refused" if name == ".pysnap" else "ok"
    for row in read_by_child(folder):
        check(row, folder)
        assert row["results"]["load"][0] == expected[row["case"]], row
        count()


def outside(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What must not change: content, size and times of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (
            data,
            status.st_mode,
            status.st_size,
            status.st_mtime_ns,
            status.st_nlink,
        )
    return found


def hard_link(path: Path, aside: Path) -> None:
    if aside.is_dir():
        path.mkdir()
        for file in aside.iterdir():
            os.link(file, path / file.name)
    else:
        os.link(aside, path)


@pytest.mark.parametrize("kind", [link, hard_link], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "name",
    [".pysnap", ".writer", "step-000000001", "latest", ".partial-x", ".trash-x", ".latest-1"],
)
def test_a_writer_and_its_retention_touch_nothing_outside(
    tmp_path: Path, count: Count, name: str, kind: Callable[[Path, Path], None]
) -> None:
    root, aside = tmp_path / "run", tmp_path / OUTSIDE
    aside.mkdir()
    values = torch.zeros(100)
    with pysnap.Snapshotter(root, every="off", x=values) as snapshotter:
        with snapshotter.step():
            pass
        snapshotter.save().wait()
    place, true = root / name, aside / "true"
    if place.is_symlink():
        place.unlink()
    if place.exists():
        place.rename(true)
    elif name == "latest":
        true.write_bytes(b"precious")
    else:
        shutil.copytree(root / "step-000000001", true)
    kind(place, true)
    before = outside(aside)
    try:
        with pysnap.Snapshotter(
            root, every="off", keep=pysnap.Keep(last=1), x=values
        ) as snapshotter:
            for _ in range(3):
                with snapshotter.step():
                    pass
                snapshotter.save().wait()
    except pysnap.Error as error:
        assert str(root) in str(error)
    after = outside(aside)
    assert {path: row[:4] for path, row in after.items()} == {
        path: row[:4] for path, row in before.items()
    }
    count()


# While it is read.


def test_a_manifest_that_changes_while_it_is_read(saved: Path, count: Count, full: bool) -> None:
    """What was checked is what is parsed: one of the two manifests, or an error."""
    file, other = saved / "manifest.json", saved / "other"
    contents = [file.read_bytes(), rewritten(saved, lambda s: s.update(step=7))]
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            if number % 2:
                file.write_bytes(contents[number // 2 % 2])
            else:
                other.write_bytes(contents[number // 2 % 2])
                other.replace(file)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000 if full else 200):
            try:
                assert pysnap.open(saved).step in (0, 7)
            except (pysnap.CorruptError, pysnap.StorageError) as error:
                assert str(saved) in str(error)
            count()
    finally:
        stop.set()
        writer.join()


def test_packs_that_shrink_while_they_are_mapped(tmp_path: Path, count: Count, full: bool) -> None:
    """No SIGBUS, and never zeros in place of what was there."""
    state = {f"t{n}": torch.full((2**16,), n + 1.0) for n in range(16)}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYSNAP_CODEC", "none")
        environment.setenv("PYSNAP_CHUNK_SIZE", "64KiB")
        path = pysnap.save(tmp_path / "s", state)
    pack = path / "0.pack"
    data = pack.read_bytes()
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            os.truncate(pack, (number * 7919 * 4096) % len(data))
            pack.write_bytes(data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(1000 if full else 100):
            try:
                loaded = pysnap.load(path)
            except (pysnap.CorruptError, pysnap.StorageError) as error:
                assert str(pack) in str(error)
            else:
                assert all(torch.equal(loaded[name], state[name]) for name in state)
            verify_snapshot(path)
            count()
    finally:
        stop.set()
        writer.join()
