"""Other libraries, each by the call that its documentation gives for a save in the background.

They are imported when they are opened: none is a dependency of ours.
"""

from __future__ import annotations

import threading
from pathlib import Path

from torch import Tensor

from .saver import Parts, Peer, Pending, Written


class TorchSnapshot(Peer):
    """`torchsnapshot.Snapshot.async_take`."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        import torchsnapshot

        self._take = torchsnapshot.Snapshot.async_take

    def write(self, path: Path) -> Pending:
        pending = self._take(str(path), self.parts)
        return Written(path, pending.wait, pending.done)


class Lightning(Peer):
    """`AsyncCheckpointIO` of PyTorch Lightning over its default, `TorchCheckpointIO`."""

    suffix = ".ckpt"

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        ended = self._ended = threading.Event()

        class Told(TorchCheckpointIO):  # type: ignore[misc]  # it is not there when mypy runs
            """It tells when a file is written: the plugin does not."""

            def save_checkpoint(self, *args: object, **options: object) -> None:
                try:
                    super().save_checkpoint(*args, **options)
                finally:
                    ended.set()

        self._plugin = AsyncCheckpointIO(Told())

    def write(self, path: Path) -> Pending:
        self._ended.clear()
        self._plugin.save_checkpoint(self.state_dict(), path)
        # What waits for its thread, and raises what failed there; the next save makes another.
        return Written(path, self._plugin.teardown, self._ended.is_set)


class TorchCheckpointing(Peer):
    """`torch_checkpointing.CheckpointManager`, asynchronous: staged in shared memory by a thread,
    written by a process of its own."""

    overlaps = True

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # Its direct writes are not aligned, which file systems refuse (version 0.1.1).
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def write(self, path: Path) -> Pending:
        written = self._manager.save(str(path), self.state_dict())
        return Written(path, written.result, written.done, self._wait_staged)

    def _wait_staged(self) -> None:
        with self._manager.lock():
            pass

    def close(self) -> None:
        self._manager.close()


class Orbax(Peer):
    """`AsyncCheckpointer` of Orbax on NumPy arrays that share memory with the tensors."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        import jax
        import orbax.checkpoint as orbax

        self._map = jax.tree.map
        self._arguments = orbax.args.PyTreeSave
        self._ended = threading.Event()
        self._checkpointer = orbax.AsyncCheckpointer(
            orbax.PyTreeCheckpointHandler(),
            async_options=orbax.AsyncOptions(post_finalization_callback=self._ended.set),
        )

    def write(self, path: Path) -> Pending:
        self._ended.clear()
        arrays = self._map(_array, self.state_dict())
        self._checkpointer.save(path.absolute(), args=self._arguments(arrays))
        return Written(path, self._checkpointer.wait_until_finished, self._ended.is_set)

    def close(self) -> None:
        self._checkpointer.close()


def _array(leaf: object) -> object:
    return leaf.numpy() if isinstance(leaf, Tensor) else leaf
