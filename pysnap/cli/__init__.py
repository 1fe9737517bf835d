"""The command line: `pysnap COMMAND`, or `python -m pysnap COMMAND`.

A command is a module with `configure(parser)` and `run(arguments, output)`; only the module of the
command that is asked for is imported, so that `pysnap ls` starts without torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module

from pysnap.cli import exits
from pysnap.cli.output import Output
from pysnap.errors import Error

# command: its module, and what it does
COMMANDS = {
    "ls": ("ls", "list the snapshots of a repository"),
    "show": ("show", "the state in a snapshot: names, shapes, sizes, how well it is encoded"),
    "verify": ("verify", "read and check every byte of a snapshot or a repository"),
    "diff": ("diff", "what changed between two snapshots"),
    "tag": ("marks", "tag a snapshot, which keeps it"),
    "pin": ("marks", "pin a snapshot, which keeps it"),
    "note": ("marks", "set the note of a snapshot"),
    "prune": ("prune", "remove the snapshots that no rule keeps"),
    "export": ("export", "write the tensors as safetensors or for torch.load"),
    "doctor": ("doctor", "what pysnap finds on this machine, and what it would do here"),
    "watch": ("watch", "follow a running repository"),
    "report": ("report", "the history of a run as one HTML file, or its plots as a PNG"),
    "demo": ("demo", "train, kill, resume, and compare bit for bit"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["demo"]:
        # It has a command line of its own.
        from pysnap.demo.run import main as demo

        return demo(words[1:])
    chosen = _parser(words[0] if words else "").parse_args(words)
    output = Output(json=chosen.json)
    try:
        status: int = import_module(f"pysnap.cli.{COMMANDS[chosen.command][0]}").run(chosen, output)
        sys.stdout.flush()
        return status
    except Error as error:
        output.error(str(error))
        return exits.of(error)
    except BrokenPipeError:
        # `pysnap ls | head -1`. What is still buffered has no reader, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of all commands, of which only `command` knows its arguments."""
    parser = argparse.ArgumentParser(
        prog="pysnap",
        description="Background snapshots of PyTorch training: what is there, and is it whole?",
        epilog=f"{_SNAPSHOT}\n\n{exits.HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from pysnap._version import __version__

    parser.add_argument("--version", action="version", version=f"pysnap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, meaning) in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=meaning,
            description=meaning[0].upper() + meaning[1:] + ".",
            epilog=f"{_SNAPSHOT}\n\n{exits.HELP}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command and name != "demo":
            one.add_argument("--json", action="store_true", help="print one JSON object")
            import_module(f"pysnap.cli.{module}").configure(one)
    return parser


_SNAPSHOT = """A SNAPSHOT is named by
  REPO                  its newest
  REPO@step=200         that of a step
  REPO@tag=good         the newest with a tag
  REPO@best             the best one, by the rule of the run
  REPO@"min val_loss"   the best one by this rule
  REPO/step-000000200   its directory"""
