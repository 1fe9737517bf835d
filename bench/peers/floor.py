"""What a save takes from training even if nothing is done beside copying and writing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from floors import MemcpyFloor, WriteFloor

from .plain_files import flat_tensors
from .saver import Parts, Peer, Pending, Written


class Floor(Peer):
    """`memmove` of the state in as many threads as there are cores, then the write of the bytes by
    a thread, as the floors do it: no digest, no names, nothing that could be read back."""

    suffix = ".raw"

    def __init__(self, parts: Parts, directory: Path) -> None:
        super().__init__(parts, directory)
        self._memcpy = MemcpyFloor(list(flat_tensors(self.state_dict()).values()))
        self._disk = WriteFloor(directory, self._memcpy.buffer.view)
        self._writer = ThreadPoolExecutor(1)

    def write(self, path: Path) -> Pending:
        self._memcpy.copy_in_threads()
        writing = self._writer.submit(self._disk.write, path)
        return Written(path, end=writing.result, ended=writing.done)

    def close(self) -> None:
        self._writer.shutdown()
