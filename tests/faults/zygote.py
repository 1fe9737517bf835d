"""A Python that has imported torch and pysnap and started no thread. Every program of a trial is a
fork of it, so that it begins at once, and ends by the interpreter's own finalization.

Run by programs.py, with the number of a socket as its argument. A request is one JSON object with
three descriptors (stdin, stdout, stderr of the program) or none, its answer one JSON object.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.utils.data  # for the programs, as what follows

import pysnap.auditing
import pysnap.files
import pysnap.snapshotter  # noqa: F401

_LARGEST_REQUEST = 1 << 20


def serve(control: socket.socket) -> str | None:
    """Answers requests; in a forked program its code, and None when nobody asks any more."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _LARGEST_REQUEST, 3)
        if not data:
            return None
        request = json.loads(data)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], os.WUNTRACED if request["stopped"] else 0)
            control.send(json.dumps({"status": status}).encode())
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            become(request, descriptors)
            return str(request["code"])
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps({"pid": pid}).encode())


def become(request: dict[str, str], descriptors: list[int]) -> None:
    """Make this process look like one that was started for the program."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = ["program", *request["arguments"]]
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # for its whole life
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What hangs is ended by SIGABRT, and tells where every thread was.
    faulthandler.enable(file=2)


# torch imports more when the first optimizer is made; and the interpreter need not look through all
# of that at the end of every program.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
gc.freeze()

code = serve(socket.socket(fileno=int(sys.argv[1])))
if code is not None:
    exec(compile(code, str(Path(__file__).with_name("program")), "exec"), {"__name__": "__main__"})
