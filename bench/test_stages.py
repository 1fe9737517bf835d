"""Each stage of a save and of a restore beside the least that any implementation must do.

    python -m pytest bench --benchmark-enable

A group is one stage; compare within it. Every result is checked after it was timed.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from coders import (
    CHUNK_SIZE,
    CODERS,
    MEMCPY,
    PYSNAP,
    Coder,
    UnavailableCoderError,
    chunk_copies,
    encode_all,
    open_coder,
)
from floors import Buffer, MemcpyFloor, read_floor, write_and_sync
from payloads import KINDS, SMALLER, Payload, payloads
from pytest_benchmark.fixture import BenchmarkFixture
from state import State
from trained import train

from pysnap import _engine, tree
from pysnap.capture import Stager
from pysnap.config import Config
from pysnap.layout import Leaf, Plan, make_plan
from pysnap.manifest import Manifest
from pysnap.zstd import zstd_libraries

PARAMETERS = 8_000_000
CODECS = ("fast", "none")
ZSTD = zstd_libraries()
THREADS = _engine.available_processors()
ROUNDS = 5
TRAINED_STEPS = 200


def rounds(
    benchmark: BenchmarkFixture,
    call: Callable[..., object],
    *,
    setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]] | None] | None = None,
) -> None:
    """Time `call` ROUNDS times after one warm-up; `setup` runs before each and gives arguments."""
    pedantic: Callable[..., object] = benchmark.pedantic
    pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=1)


@pytest.fixture(scope="module")
def state() -> State:
    return State.build(PARAMETERS)


@pytest.fixture(scope="module")
def leaves(state: State) -> list[tuple[str, Leaf]]:
    return list(state.tensors().items())


@pytest.fixture(scope="module")
def plan(leaves: list[tuple[str, Leaf]]) -> Plan:
    return make_plan(leaves, chunk_size=CHUNK_SIZE)


@pytest.fixture(scope="module")
def floor(state: State) -> MemcpyFloor:
    return MemcpyFloor(list(state.tensors().values()))


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in memory, so that no disk is part of what is timed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def disk_folder() -> Iterator[Path]:
    """A folder on the disk that holds this file; that of pytest may be in memory."""
    with tempfile.TemporaryDirectory(prefix=".stages-", dir=Path(__file__).parent) as folder:
        yield Path(folder)


class Engine:
    """An engine with room for the whole state; `staged` begins a job and captures it."""

    def __init__(self, plan: Plan, codec: str) -> None:
        self.plan = plan
        self.engine = _engine.Engine(
            chunk_size=CHUNK_SIZE,
            slots=len(plan.spans) + 1,
            workers=max(2, THREADS // 2),
            copy_threads=THREADS,
            nice=0,
            direct_io=True,
            codec=codec,
            zstd=ZSTD,
        )
        self.engine.reserve(plan.stream)
        self.engine.wait_reserved()
        self.job: _engine.Job | None = None

    def begin(self) -> _engine.Job:
        """A new job, in place of the last one."""
        if self.job is not None:
            self.job.abort()
        self.job = self.engine.begin(self.plan.extents, self.plan.spans, self.plan.eager)
        return self.job

    def staged(self) -> _engine.Job:
        """A new job whose bytes are all in staging memory."""
        job = self.begin()
        job.capture()
        return job


@pytest.fixture
def make_engine(plan: Plan) -> Iterator[Callable[[str], Engine]]:
    made: list[Engine] = []

    def make(codec: str) -> Engine:
        made.append(Engine(plan, codec))
        return made[-1]

    yield make
    for engine in made:
        engine.engine.close()


def write_pack(job: _engine.Job, path: Path) -> tuple[Any, int]:
    """From staged to durable: the chunk table and the size of the pack."""
    job.open_pack(str(path))
    job.wait_written()
    return job.finish()


def fresh(path: Path) -> None:
    path.unlink(missing_ok=True)


# Copy: the bytes of the tensors into memory that was touched before.


@pytest.mark.benchmark(group="copy")
def test_copy_capture(
    benchmark: BenchmarkFixture, make_engine: Callable[[str], Engine], plan: Plan, tmp_path: Path
) -> None:
    engine = make_engine("none")
    rounds(benchmark, lambda job: job.capture(), setup=lambda: ((engine.begin(),), {}))
    chunks, _ = write_pack(engine.staged(), tmp_path / "0.pack")
    assert int(chunks["raw"].sum(dtype=np.uint64)) == plan.stream


@pytest.mark.benchmark(group="copy")
@pytest.mark.parametrize("implementation", ["memmove", "torch"])
def test_copy_floor(benchmark: BenchmarkFixture, floor: MemcpyFloor, implementation: str) -> None:
    copies = {"memmove": floor.copy_in_threads, "torch": floor.copy_with_torch}
    floor.clear()
    rounds(benchmark, copies[implementation])
    assert floor.is_copied()


# Encode: from staged chunks to a pack in memory; the floor writes the same bytes as they are.


@pytest.mark.benchmark(group="encode")
@pytest.mark.parametrize("codec", CODECS)
def test_encode(
    benchmark: BenchmarkFixture,
    make_engine: Callable[[str], Engine],
    plan: Plan,
    memory_folder: Path,
    codec: str,
) -> None:
    engine = make_engine(codec)
    path = memory_folder / "0.pack"

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        fresh(path)
        return (engine.staged(), path), {}

    rounds(benchmark, write_pack, setup=setup)
    fresh(path)
    chunks, size = write_pack(engine.staged(), path)
    assert _verify(path, size, chunks) == []
    smaller = int(chunks["stored"].sum(dtype=np.uint64)) < plan.stream
    assert smaller == (codec == "fast")


@pytest.mark.benchmark(group="encode")
def test_encode_floor_plain_file(
    benchmark: BenchmarkFixture, floor: MemcpyFloor, memory_folder: Path
) -> None:
    _time_plain_file(benchmark, floor.buffer, memory_folder / "plain", direct=False)


# Write: from staged chunks to a durable pack on disk, without encoding.


@pytest.mark.benchmark(group="write")
def test_write_pack(
    benchmark: BenchmarkFixture, make_engine: Callable[[str], Engine], plan: Plan, disk_folder: Path
) -> None:
    engine = make_engine("none")
    path = disk_folder / "0.pack"

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        fresh(path)
        return (engine.staged(), path), {}

    rounds(benchmark, write_pack, setup=setup)
    assert path.stat().st_size >= plan.stream


@pytest.mark.benchmark(group="write")
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_write_floor_plain_file(
    benchmark: BenchmarkFixture, floor: MemcpyFloor, disk_folder: Path, direct: bool, threads: int
) -> None:
    path = disk_folder / "plain"
    _time_plain_file(benchmark, floor.buffer, path, direct=direct, threads=threads)


def _time_plain_file(
    benchmark: BenchmarkFixture, data: Buffer, path: Path, *, direct: bool, threads: int = 1
) -> None:
    rounds(
        benchmark,
        lambda: write_and_sync(path, data.view, direct=direct, threads=threads),
        setup=lambda: fresh(path),
    )
    assert path.read_bytes() == data.view


# Restore: read, check, decode and copy into tensors; packs in memory, so the disk is no part of it.


class Restoring:
    """A pack, and tensors that are filled from it: all, or the first `share` of the stream."""

    def __init__(self, engine: Engine, state: State, path: Path, share: float = 1) -> None:
        self.path = path
        self.chunks, self.size = write_pack(engine.staged(), path)
        places = sorted((record.at, number) for number, record in enumerate(engine.plan.records))
        wanted = places[: max(1, round(share * len(places)))]
        tensors = list(state.tensors().values())
        self._expected = [tensors[number] for _, number in wanted]
        self._restored = [torch.zeros_like(tensor) for tensor in self._expected]
        self._targets = np.array(
            [
                (at, tensor.data_ptr(), tensor.nbytes, -1)
                for (at, _), tensor in zip(wanted, self._restored, strict=True)
            ],
            dtype=_engine.TARGET,
        )
        end = wanted[-1][0] + self._restored[-1].nbytes
        starts = np.cumsum(self.chunks["raw"], dtype=np.uint64) - self.chunks["raw"]
        self.needed = int(self.chunks["stored"][starts < end].sum(dtype=np.uint64))
        """Bytes of the chunks that hold them."""

    def restore(self) -> None:
        _engine.restore(
            packs=[(str(self.path), self.size)],
            chunks=self.chunks,
            targets=self._targets,
            threads=THREADS,
            zstd=ZSTD,
        )

    def check(self) -> None:
        for tensor, expected in zip(self._restored, self._expected, strict=True):
            assert torch.equal(tensor.view(torch.int32), expected.view(torch.int32))


@pytest.mark.benchmark(group="restore")
@pytest.mark.parametrize("codec", CODECS)
def test_restore(
    benchmark: BenchmarkFixture,
    make_engine: Callable[[str], Engine],
    state: State,
    memory_folder: Path,
    codec: str,
) -> None:
    restoring = Restoring(make_engine(codec), state, memory_folder / "0.pack")
    rounds(benchmark, restoring.restore)
    restoring.check()


@pytest.mark.benchmark(group="restore")
def test_restore_floor_plain_file(
    benchmark: BenchmarkFixture, floor: MemcpyFloor, memory_folder: Path
) -> None:
    path = memory_folder / "plain"
    path.write_bytes(floor.buffer.view)
    target = Buffer(floor.buffer.size)

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            at = 0
            while count := file.readinto(target.view[at:]):
                at += count

    rounds(benchmark, read)
    assert target.view == floor.buffer.view


# Restore, cold: from a disk, nothing in the page cache; the floor reads the same file in as many
# threads. A tenth of the tensors reads its chunks alone.


def forget(path: Path) -> None:
    """Have nothing of a file in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def bytes_read() -> int:
    """What this process has asked the kernel for so far; the kernel may read ahead of it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


@pytest.mark.benchmark(group="restore, cold")
@pytest.mark.parametrize("share", [1, 0.1], ids=["all", "a tenth"])
@pytest.mark.parametrize("codec", CODECS)
def test_restore_cold(
    benchmark: BenchmarkFixture,
    make_engine: Callable[[str], Engine],
    state: State,
    disk_folder: Path,
    codec: str,
    share: float,
) -> None:
    restoring = Restoring(make_engine(codec), state, disk_folder / "0.pack", share)
    rounds(benchmark, restoring.restore, setup=lambda: forget(restoring.path))
    restoring.check()
    forget(restoring.path)
    before = bytes_read()
    restoring.restore()
    assert bytes_read() - before <= restoring.needed + CHUNK_SIZE // 4
    benchmark.extra_info["bytes"] = restoring.needed


@pytest.mark.benchmark(group="restore, cold")
def test_restore_cold_floor_plain_file(
    benchmark: BenchmarkFixture, floor: MemcpyFloor, disk_folder: Path
) -> None:
    path = disk_folder / "plain"
    path.write_bytes(floor.buffer.view)
    rounds(benchmark, lambda: read_floor(path), setup=lambda: forget(path))


# Chunk: one core encodes and decodes chunks of a model that was trained, and of other kinds; the
# floors are memcpy, and zstd at level 1 and, where it is installed, ZipNN on the same bytes.


@pytest.fixture(scope="module")
def payload(request: pytest.FixtureRequest) -> dict[str, Payload]:
    return payloads(train(TRAINED_STEPS if request.config.getoption("--benchmark-enable") else 1))


def _coder(name: str, data: Payload) -> Coder:
    """Skips, with the reason, a coder that is in no extra (ZipNN) and not installed, and a type
    that it does not know."""
    try:
        return open_coder(name, data)
    except UnavailableCoderError as error:
        pytest.skip(str(error))


@pytest.mark.benchmark(group="chunk encode")
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_encode(
    benchmark: BenchmarkFixture, payload: dict[str, Payload], kind: str, coder: str
) -> None:
    data = payload[kind]
    opened = _coder(coder, data)
    benchmark.group = f"encode {kind}"
    rounds(
        benchmark,
        encode_all,
        setup=lambda: ((opened, chunk_copies(data.bytes)), {}),
    )
    stored = sum(len(opened.encode(chunk)) for chunk in chunk_copies(data.bytes))
    benchmark.extra_info["stored / raw"] = stored / len(data.bytes)
    assert (stored < len(data.bytes)) == (coder != MEMCPY and kind in SMALLER)
    if coder == PYSNAP:
        assert stored <= len(data.bytes)


@pytest.mark.benchmark(group="chunk decode")
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_decode(
    benchmark: BenchmarkFixture, payload: dict[str, Payload], kind: str, coder: str
) -> None:
    data = payload[kind]
    opened = _coder(coder, data)
    encoded = [(bytes(opened.encode(chunk)), len(chunk)) for chunk in chunk_copies(data.bytes)]
    benchmark.group = f"decode {kind}"

    def decode_all() -> None:
        # Kept no longer than in encode_all.
        for stored, size in encoded:
            opened.decode(stored, size)

    rounds(benchmark, decode_all)
    for (stored, raw), chunk in zip(encoded, chunk_copies(data.bytes), strict=True):
        assert bytes(opened.decode(stored, raw)) == chunk


# Digest: of one chunk, as the workers take it; the floors read it, and check it as torch.save does.


@pytest.fixture(scope="module")
def chunk() -> memoryview:
    return np.random.default_rng(1).integers(2**63, size=CHUNK_SIZE // 8).data


@pytest.mark.benchmark(group="digest")
def test_digest(benchmark: BenchmarkFixture, chunk: memoryview) -> None:
    assert benchmark(_engine.digest, chunk) == xxhash.xxh3_128_hexdigest(chunk)


@pytest.mark.benchmark(group="digest")
@pytest.mark.parametrize(
    "read",
    [np.bitwise_xor.reduce, xxhash.xxh3_128_digest, zlib.crc32],
    ids=["read", "xxhash", "crc32"],
)
def test_digest_floor(
    benchmark: BenchmarkFixture,
    chunk: memoryview,
    read: Callable[[memoryview], object],
) -> None:
    assert benchmark(read, chunk) == read(chunk)


# Plan: from a state to the tables of the engine; the floor only looks at every tensor.


@pytest.mark.benchmark(group="plan")
def test_plan(benchmark: BenchmarkFixture, leaves: list[tuple[str, Leaf]], plan: Plan) -> None:
    made = benchmark(lambda: make_plan(leaves, chunk_size=CHUNK_SIZE))
    assert made.records == plan.records


@pytest.mark.benchmark(group="plan")
def test_begin_again(benchmark: BenchmarkFixture, state: State) -> None:
    """A state that differs from the one before in plain values alone."""
    stager = Stager(Config.resolve())
    value = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    benchmark(lambda: stager.begin(value).abort())
    stager.close()


@pytest.mark.benchmark(group="plan")
def test_plan_tree(benchmark: BenchmarkFixture, state: State) -> None:
    encoded, found = benchmark(lambda: _encode(state))
    assert len(found) == len(state.tensors())
    assert set(encoded) == {"model", "optimizer"}


@pytest.mark.benchmark(group="plan")
def test_plan_floor_look_at_tensors(benchmark: BenchmarkFixture, state: State) -> None:
    tensors = list(state.tensors().values())
    seen = benchmark(lambda: [(t.data_ptr(), t.nbytes, t.dtype, t.shape) for t in tensors])
    assert sum(size for _, size, _, _ in seen) == state.nbytes


def _encode(state: State) -> tuple[Any, list[Leaf]]:
    found: list[Leaf] = []

    def put(_path: str, leaf: Leaf) -> int:
        found.append(leaf)
        return len(found) - 1

    parts = {name: part.state_dict() for name, part in state.parts().items()}
    return tree.encode(parts, put), found


# Manifest: to and from its bytes; the floors are JSON alone.


@pytest.fixture(scope="module")
def manifest(state: State, plan: Plan) -> Manifest:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        engine = Engine(plan, "fast")
        chunks, size = write_pack(engine.staged(), Path(folder) / "0.pack")
        engine.engine.close()
    return Manifest(
        id="0" * 32,
        step=1,
        sequence=1,
        created="2026-01-01T00:00:00+00:00",
        tree=_encode(state)[0],
        tensors=plan.records,
        chunk_size=CHUNK_SIZE,
        packs=[("0.pack", size)],
        chunks=chunks,
    )


@pytest.mark.benchmark(group="manifest")
def test_manifest_to_bytes(benchmark: BenchmarkFixture, manifest: Manifest) -> None:
    assert benchmark(manifest.to_bytes).endswith(b"}")


@pytest.mark.benchmark(group="manifest")
def test_manifest_from_bytes(benchmark: BenchmarkFixture, manifest: Manifest) -> None:
    data = manifest.to_bytes()
    read = benchmark(lambda: Manifest.from_bytes(data, "here"))
    assert read.to_bytes() == data


@pytest.mark.benchmark(group="manifest")
@pytest.mark.parametrize("way", ["to", "from"])
def test_manifest_floor_json(benchmark: BenchmarkFixture, manifest: Manifest, way: str) -> None:
    data = manifest.to_bytes()
    content = json.loads(data)
    if way == "to":
        assert json.loads(benchmark(lambda: json.dumps(content))) == content
    else:
        assert benchmark(lambda: json.loads(data)) == content


def _verify(path: Path, size: int, chunks: Any) -> list[tuple[int, str, int]]:
    assert os.path.getsize(path) == size
    return _engine.verify(packs=[(str(path), size)], chunks=chunks, threads=THREADS, zstd=ZSTD)
