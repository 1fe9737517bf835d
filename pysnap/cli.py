"""The command line. It knows one command so far: `pysnap demo`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="pysnap", description="Background snapshots of PyTorch training."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", add_help=False, help="train, kill, resume, and compare bit for bit")
    chosen, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    assert chosen.command == "demo"
    from pysnap.demo.run import main as demo

    return demo(rest)
