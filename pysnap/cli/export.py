"""`pysnap export`: tensors for programs that do not know pysnap."""

from __future__ import annotations

import contextlib
import os
import uuid
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from pysnap import paths, storage
from pysnap.cli import choose, exits, safetensors
from pysnap.cli.output import Output, size
from pysnap.errors import ConfigError, Error, NotFoundError, StorageError
from pysnap.repository import Snapshot
from pysnap.restore import load_state
from pysnap.view import View


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("snapshot", metavar="SNAPSHOT")
    parser.add_argument("target", metavar="FILE", help="`.safetensors`, `.pt` or `.pth`")
    parser.add_argument("--only", metavar="PART", help="only this part, such as `model`")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.description = (
        "Write the tensors of a snapshot as one file: by name for .safetensors, one in memory at a "
        "time; for .pt and .pth the nested state, for torch.load, which is in memory as a whole. "
        "With --only PART, names begin behind PART."
    )


def run(arguments: Namespace, output: Output) -> int:
    target = Path(arguments.target)
    if target.suffix not in (".safetensors", ".pt", ".pth"):
        raise ConfigError(f"{target} must end in .safetensors, .pt or .pth")
    if storage.exists(target) and not arguments.force:
        raise ConfigError(f"{target} exists; choose another name, or replace it by --force")
    snapshot = choose.snapshot(arguments.snapshot)
    if target.suffix == ".safetensors":
        count = _safetensors(snapshot, arguments.only, target)
    else:
        count = _torch(snapshot, arguments.only, target)
    written = storage.file_size(target)
    if output.json:
        output.data(
            {
                "snapshot": str(snapshot.path),
                "target": str(target),
                "tensors": count,
                "bytes": written,
            }
        )
    else:
        output.line(f"{target}: {count} tensors of {snapshot.path}, {size(written)}")
    return exits.FINE


def _safetensors(snapshot: Snapshot, part: str | None, target: Path) -> int:
    entries = {
        _behind(part, name): entry
        for name, entry in View(snapshot).items()
        if part is None or paths.covers(part, name)
    }
    if not entries:
        raise NotFoundError(f'{snapshot.path} holds no tensor under "{part}"')
    about = {"step": str(snapshot.step), "pysnap": snapshot.manifest.id}
    _replace(target, lambda path: safetensors.write(path, entries, about))
    return len(entries)


def _torch(snapshot: Snapshot, part: str | None, target: Path) -> int:
    state: Any = load_state(snapshot, None if part is None else [part])
    count = sum(part is None or paths.covers(part, name) for name in View(snapshot))
    if part is not None:
        for key in part.split("/"):
            if not isinstance(state, dict) or key not in state:
                raise ConfigError(f'"{part}" is not a dict of its own; export what holds it')
            state = state[key]
    _replace(target, lambda path: torch.save(state, path))
    return count


def _behind(part: str | None, name: str) -> str:
    """`name` without the part that was asked for."""
    if part is None or name == part:
        return name
    return name[len(part) + 1 :]


def _replace(target: Path, write: Any) -> None:
    """Whole or not at all: written beside the target, durable, then renamed."""
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        write(temporary)
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
        storage.sync_directory(target.absolute().parent)
    except Error:
        raise
    except OSError as error:
        raise StorageError.wrap(error, f"writing {target}", target) from error
    except Exception as error:
        # torch has errors of its own.
        raise StorageError(5, f"writing {target} failed: {error}", str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
