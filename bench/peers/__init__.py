"""The ways to save a state that are compared, behind one interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .dcp import Dcp, DcpAsyncStager, DcpKeptStager, DcpProcess, DcpTorchtitan
from .floor import Floor
from .libraries import Lightning, Orbax, TorchCheckpointing, TorchSnapshot
from .ours import Pysnap
from .plain_files import Safetensors, TorchSave
from .saver import Parts, Pending, Saver

__all__ = [
    "OURS",
    "PEERS",
    "Parts",
    "Pending",
    "Pysnap",
    "Saver",
    "Subject",
    "missing",
    "open_saver",
]

PYSNAP = "pysnap"
PYSNAP_OVERLAP = "pysnap, overlap"
PYSNAP_FAST = "pysnap, codec fast"
PYSNAP_RAW = "pysnap, codec none"
PYSNAP_BOUNDED = "pysnap, bounded"
OURS = (PYSNAP, PYSNAP_OVERLAP, PYSNAP_FAST, PYSNAP_RAW, PYSNAP_BOUNDED)

FLOOR = "memcpy and write"
"""The floors in the place of a way to save."""

TORCH_SAVE = "torch.save"
SAFETENSORS = "safetensors"
DCP = "DCP async_save"
DCP_STAGER = "DCP, kept stager"
DCP_ASYNC_STAGER = "DCP, async stager"
DCP_PROCESS = "DCP, process"
DCP_TORCHTITAN = "DCP, as torchtitan"
TORCHSNAPSHOT = "torchsnapshot"
LIGHTNING = "Lightning, async"
TORCH_CHECKPOINTING = "torch_checkpointing"
ORBAX = "Orbax, async"


@dataclass(frozen=True)
class Subject:
    """Somebody else's way to save."""

    name: str
    """In the results."""
    module: str
    """What must be importable."""
    make: Callable[[Parts, Path], Saver]


PEERS = {
    "torch.save": Subject(TORCH_SAVE, "torch", TorchSave),
    "safetensors": Subject(SAFETENSORS, "safetensors", Safetensors),
    "dcp": Subject(DCP, "torch.distributed.checkpoint", Dcp),
    "dcp-stager": Subject(DCP_STAGER, "torch.distributed.checkpoint.staging", DcpKeptStager),
    "dcp-async-stager": Subject(
        DCP_ASYNC_STAGER, "torch.distributed.checkpoint.staging", DcpAsyncStager
    ),
    "dcp-process": Subject(DCP_PROCESS, "torch.distributed.checkpoint.staging", DcpProcess),
    "dcp-torchtitan": Subject(
        DCP_TORCHTITAN, "torch.distributed.checkpoint.staging", DcpTorchtitan
    ),
    "torchsnapshot": Subject(TORCHSNAPSHOT, "torchsnapshot", TorchSnapshot),
    "lightning": Subject(LIGHTNING, "pytorch_lightning", Lightning),
    "torch_checkpointing": Subject(TORCH_CHECKPOINTING, "torch_checkpointing", TorchCheckpointing),
    "orbax": Subject(ORBAX, "orbax.checkpoint", Orbax),
}
"""By their names on the command line."""


def missing(peer: str) -> str | None:
    """Why one of PEERS cannot be measured; None where it can."""
    module = PEERS[peer].module
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{module} is not installed"


def open_saver(subject: str, parts: Parts, directory: Path, host_memory: int | None) -> Saver:
    """The way to save `parts` in `directory` that `subject` names. `host_memory` bounds pysnap's
    staging memory; None leaves it to pysnap. Raises ImportError for one that is not installed."""
    codecs = {PYSNAP_FAST: "fast", PYSNAP_RAW: "none"}
    if subject in OURS:
        return Pysnap(
            parts,
            directory,
            host_memory=host_memory,
            codec=codecs.get(subject, "auto"),
            overlap=subject == PYSNAP_OVERLAP,
        )
    makers = {FLOOR: Floor} | {peer.name: peer.make for peer in PEERS.values()}
    return makers[subject](parts, directory)
