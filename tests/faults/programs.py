"""Programs that a harness starts, talks to, stops, kills and waits for, each in a process of its
own (see zygote.py)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Far above what any program of a harness needs; who reaches it hangs.
PATIENCE = 60.0


class HangError(AssertionError):
    """A program did not end, or say what it should, in time."""


@dataclass(frozen=True)
class Ending:
    """How a program ended: its exit status, or minus the signal that killed it; all it wrote."""

    status: int
    out: str
    err: str


@dataclass
class Program:
    """A running program. `hear` and `tell` are lines of its standard output and input."""

    zygote: Zygote
    pid: int
    stdin: int
    stdout: int
    err: Path
    _heard: bytes = field(default=b"", repr=False)
    _lines: list[str] = field(default_factory=list, repr=False)
    _status: int | None = field(default=None, repr=False)

    def hear(self) -> str:
        """The next line that it prints. Raises HangError where none comes."""
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._heard:
            if not self._read(deadline):
                raise HangError(f"the program ended, or hangs, before its next line:{self._end()}")
        line, self._heard = self._heard.split(b"\n", 1)
        self._lines.append(line.decode())
        return line.decode()

    def tell(self, line: str = "") -> None:
        """Give it a line to read."""
        os.write(self.stdin, f"{line}\n".encode())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_stopped(self) -> None:
        """Until it has stopped itself, or was stopped."""
        status = self.zygote.wait(self.pid, stopped=True)
        assert os.WIFSTOPPED(status), f"it ended with {status}:{self._err()}"

    def wait(self, patience: float = PATIENCE) -> Ending:
        """Its end. Raises HangError, with the stacks of its threads, where it does not end."""
        if self._status is None:
            try:
                self._status = self.zygote.wait(self.pid, patience=patience)
            except HangError:
                raise HangError(f"the program hangs:{self._end()}") from None
        while self._read(0.0):
            pass
        text = "".join(f"{line}\n" for line in self._lines) + self._heard.decode()
        return Ending(os.waitstatus_to_exitcode(self._status), text, self._err())

    def close(self) -> None:
        """End it, if it lives, and give its pipes back."""
        if self._status is None:
            self._end()
        # Its children, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for descriptor in (self.stdin, self.stdout):
            os.close(descriptor)

    def _read(self, deadline: float) -> bool:
        left = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([self.stdout], [], [], left)
        data = os.read(self.stdout, 65536) if ready else b""
        self._heard += data
        return bool(data)

    def _end(self) -> str:
        """Kill it; where its threads were."""
        for number in (signal.SIGCONT, signal.SIGABRT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            try:
                self._status = self.zygote.wait(self.pid, patience=5.0 * (number != signal.SIGCONT))
                break
            except HangError:
                continue
        return self._err()

    def _err(self) -> str:
        return "\n" + self.err.read_text(errors="replace")


class Zygote:
    """Starts programs. One for a whole test session."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = Path(__file__).parent
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(root / "zygote.py"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root.parent), *sys.path])},
            )
        self._control = ours
        self._waiting: int | None = None  # for this program it waits already

    def start(self, folder: Path, code: str, *arguments: object, **environment: str) -> Program:
        """A program that runs `code` in `folder` with these arguments."""
        err = folder / f"stderr-{len(list(folder.glob('stderr-*')))}"
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        stderr = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        request = {
            "code": textwrap.dedent(code),
            "folder": str(folder),
            "arguments": [str(argument) for argument in arguments],
            "environment": environment,
        }
        theirs = [stdin, stdout, stderr]
        socket.send_fds(self._control, [json.dumps(request).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        return Program(self, self._answer(PATIENCE)["pid"], to_stdin, from_stdout, err)

    def run(
        self,
        folder: Path,
        code: str,
        *arguments: object,
        patience: float = PATIENCE,
        **environment: str,
    ) -> Ending:
        """The end of such a program."""
        with contextlib.closing(self.start(folder, code, *arguments, **environment)) as program:
            return program.wait(patience)

    def wait(self, pid: int, *, patience: float = PATIENCE, stopped: bool = False) -> int:
        """The status of a program that ends, or stops. Raises HangError where it does not."""
        if self._waiting is None:
            self._control.send(json.dumps({"wait": pid, "stopped": stopped}).encode())
            self._waiting = pid
        assert self._waiting == pid
        status = int(self._answer(patience)["status"])
        self._waiting = None
        return status

    def close(self) -> None:
        self._control.close()
        self._process.wait(PATIENCE)

    def _answer(self, patience: float) -> Any:
        ready, _, _ = select.select([self._control], [], [], max(0.0, patience))
        if not ready:
            raise HangError("no answer")
        data = self._control.recv(65536)
        assert data, "the zygote is gone"
        return json.loads(data)


@contextlib.contextmanager
def zygote_running() -> Iterator[Zygote]:
    zygote = Zygote()
    try:
        yield zygote
    finally:
        zygote.close()
