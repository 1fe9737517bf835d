"""`pysnap doctor`: what pysnap finds on this machine, and what it would do here."""

from __future__ import annotations

import importlib.util
import mmap
import os
import platform
import time
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pysnap import _engine
from pysnap._version import __version__
from pysnap.cli import exits
from pysnap.cli.output import Output, size
from pysnap.config import SETTINGS, Config
from pysnap.errors import ConfigError, NotFoundError, StorageError
from pysnap.memory import advice_to_lock, available_memory
from pysnap.zstd import zstd_libraries

_MEASURED = 64 * 2**20
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "ceph", "9p", "afs", "gpfs")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fine` is False where it should be mended."""

    what: str
    found: str
    fine: bool = True


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", nargs="?", default=".", help="where snapshots will be (.)"
    )


def run(arguments: Namespace, output: Output) -> int:
    path = Path(arguments.path).absolute()
    if not path.is_dir():
        raise NotFoundError(f"{path} is no directory; name one, where snapshots will be written")
    findings = [*_software(), *_machine(), *_device(), *_place(path), *_settings()]
    if output.json:
        output.data({"path": str(path), "findings": [asdict(finding) for finding in findings]})
    else:
        output.table(
            ["", "what", "found"],
            [["" if item.fine else "!", item.what, item.found] for item in findings],
        )
    return exits.FINE if all(finding.fine for finding in findings) else exits.NO


def _software() -> Iterator[Finding]:
    yield Finding("pysnap", f"{__version__}, Python {platform.python_version()}")
    found = _torch()
    yield Finding("torch", found or "not installed: snapshots can be read, not taken", bool(found))
    names = zstd_libraries()
    has_zstd = _engine.has_zstd(names)
    yield Finding(
        "libzstd",
        "found" if has_zstd else "not found: chunks are stored raw; install zstandard",
        has_zstd,
    )


def _torch() -> str:
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"


def _machine() -> Iterator[Finding]:
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("cores", str(_engine.available_processors()))
    yield Finding("SIMD of checksums and planes", _engine.simd_path())
    yield Finding("free memory", size(available_memory()))
    source = np.ones(_MEASURED, np.uint8)
    target = np.ones_like(source)
    fastest = min(_time_of(lambda: np.copyto(target, source)) for _ in range(5))
    yield Finding("copying in memory, one thread", f"{size(_MEASURED / fastest)}/s")


def _device() -> Iterator[Finding]:
    why_not = _engine.cuda_unavailable()
    if why_not is not None:
        # No fault: pysnap takes snapshots on the host, too.
        yield Finding("CUDA", f"not used: {why_not}")
        return
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        yield Finding("driver", driver.read_text().splitlines()[0])
    yield from _torch_devices()
    yield _pinned()


def _torch_devices() -> Iterator[Finding]:
    if not _torch():
        return
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"device {index}", f"{name}, {size(free)} of {size(total)} free")


def _pinned() -> Finding:
    engine = _engine_of(Config.resolve(environment={}), slots=2)
    try:
        engine.reserve(2 * Config.resolve(environment={}).chunk_size, [0])
        engine.wait_reserved()
        why = engine.why_pageable()
    finally:
        engine.close()
    found = "can be had" if why is None else f"cannot be had: {why}; {advice_to_lock()}"
    return Finding("pinned memory", found, why is None)


def _place(path: Path) -> Iterator[Finding]:
    kind = _file_system(path)
    note = "; pysnap works there, but does not promise that durable is durable"
    local = kind not in _NETWORK
    yield Finding("file system", kind + ("" if local else note), local)
    status = os.statvfs(path)
    yield Finding("free space", size(status.f_bavail * status.f_frsize))
    try:
        yield Finding("O_DIRECT", _direct(path))
        yield Finding("writing, with fsync", f"{size(_write_rate(path))}/s")
    except OSError as error:
        raise StorageError.wrap(error, f"writing a file in {path}", path) from error


def _file_system(path: Path) -> str:
    """Its type in /proc/self/mountinfo: that of the mount with the longest path above `path`."""
    best, kind = "", "unknown"
    real = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        above = real == mount or real.startswith(mount.rstrip("/") + "/")
        if above and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


def _direct(path: Path) -> str:
    file = path / f".pysnap-doctor-{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(file, flags | os.O_DIRECT, 0o600)
    except OSError:
        if os.path.lexists(file):
            os.unlink(file)
        else:
            # It is the directory that takes no file.
            os.close(os.open(file, flags, 0o600))
            os.unlink(file)
        return "not here: writes go through the page cache"
    try:
        with mmap.mmap(-1, 4096) as page:
            os.write(descriptor, page)
    except OSError:
        return "not here: writes go through the page cache"
    finally:
        os.close(descriptor)
        os.unlink(file)
    return "works"


def _write_rate(path: Path) -> float:
    """Bytes a second, of one file that is removed again."""
    file = path / f".pysnap-doctor-{uuid.uuid4().hex}"
    data = np.random.default_rng(0).bytes(_MEASURED)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        start = time.perf_counter()
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        return _MEASURED / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
        os.unlink(file)


def _settings() -> Iterator[Finding]:
    try:
        config = Config.resolve()
    except ConfigError as error:
        yield Finding("settings", str(error), False)
        return
    cores = _engine.available_processors()
    staging = config.host_memory or available_memory() // 4
    workers = config.workers or min(8, max(2, cores // 2))
    copiers = config.copy_threads or min(8, cores)
    yield Finding(
        "what pysnap does here",
        f"stages at most {size(staging)} in chunks of {size(config.chunk_size)}, copies with "
        f"{copiers} threads, encodes and writes with {workers} (codec {config.codec})",
    )
    for setting in SETTINGS:
        value, source = getattr(config, setting.name), config.sources[setting.name]
        shown = setting.shown_default if source == "default" else str(value)
        yield Finding(setting.variable, shown + ("" if source == "default" else " (environment)"))


def _engine_of(config: Config, slots: int) -> _engine.Engine:
    return _engine.Engine(
        chunk_size=config.chunk_size,
        slots=slots,
        workers=1,
        copy_threads=1,
        nice=0,
        direct_io=False,
        zstd=[],
        codec="none",
        disk_seconds=60.0,
    )


def _time_of(call: object) -> float:
    assert callable(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
