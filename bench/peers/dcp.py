"""`torch.distributed.checkpoint.async_save`, in the ways that it offers to one process."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from .saver import Parts, Peer, Pending, Written

_STAGES_ONCE = torch.__version__.startswith("2.11.")
"""Whether a `DefaultStager` serves one save: it drops a table that a second one needs."""


class Dcp(Peer):
    """Written by a thread, staged by its default stager, which allocates anew for each save."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self._async_save = async_save
        self._writer = FileSystemWriter
        # Versions without it tell by themselves that there is no process group.
        has_no_dist = "no_dist" in inspect.signature(async_save).parameters
        self.options: dict[str, Any] = {"no_dist": True} if has_no_dist else {}
        self._stager: Any = None

    def keep_stager(self, *, shared: bool, behind: bool) -> None:
        """Stage in memory that is kept, pinned where there is CUDA; with `shared` in memory that
        another process reads, with `behind` in a thread."""
        from torch.distributed.checkpoint.staging import (
            BlockingAsyncStager,
            DefaultStager,
            StagingOptions,
        )

        has_cuda = torch.cuda.is_available()
        if _STAGES_ONCE and not (shared or behind):
            self._stager = BlockingAsyncStager(cache_staged_state_dict=has_cuda)
        else:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=has_cuda,
                    use_shared_memory=shared,
                    use_async_staging=behind,
                    use_non_blocking_copy=has_cuda,
                )
            )
        self.options["async_stager"] = self._stager

    def write(self, path: Path) -> Pending:
        answer: Any = self._async_save(
            self.state_dict(), storage_writer=self._writer(path), **self.options
        )
        # A plain future, or one of two with a stager of the caller's.
        upload = getattr(answer, "upload_completion", answer)
        staging = getattr(answer, "staging_completion", None)
        if staging is None:
            return Written(path, upload.result, upload.done)
        return Written(path, upload.result, upload.done, staging.result)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class DcpAsyncStager(Dcp):
    """Written by a thread; another one stages in memory that is kept, where this torch can, and the
    training waits for it before the optimizer's step."""

    overlaps = True

    def __init__(self, parts: Parts, directory: Path) -> None:
        """Raises ImportError where this torch has no such stager."""
        super().__init__(parts, directory)
        self.keep_stager(shared=False, behind=True)

    def write(self, path: Path) -> Pending:
        pending = super().write(path)
        if not _STAGES_ONCE:
            return pending

        def end() -> None:
            # Another one for the next save, made outside of it.
            pending.wait()
            self.close()
            self.keep_stager(shared=False, behind=True)

        return Written(path, end, pending.done, pending.gate)


class DcpKeptStager(Dcp):
    """Written by a thread; the call stages in memory that is kept for the next save."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        """Raises ImportError where this torch has no such stager."""
        super().__init__(parts, directory)
        self.keep_stager(shared=False, behind=False)


class DcpProcess(Dcp):
    """Written by a process of its own, staged by the default stager."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        from torch import distributed
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        # Both processes make a group of one rank; the second finds the first by this address.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        store = directory / "group"
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        self.options = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}

    def close(self) -> None:
        from torch import distributed

        super().close()
        distributed.destroy_process_group()


class DcpTorchtitan(DcpProcess):
    """As torchtitan's `async_with_pinned_mem`: written by a process of its own, staged in shared
    memory by a thread, for which the training waits before the optimizer's step."""

    overlaps = True

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        self.keep_stager(shared=True, behind=True)
