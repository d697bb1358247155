"""What measurements on a GPU share: ``emit`` on any machine, ``run`` on the one with the GPU, ``dry`` anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple


class CommandLine(NamedTuple):
    """commands: more can be added to them. emit, run: options can be added to them."""

    parser: argparse.ArgumentParser
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    emit: argparse.ArgumentParser
    run: argparse.ArgumentParser


def emit_run_dry(description: str | None, *, emit: str, run: str, out: str, dry: str) -> CommandLine:
    """``emit FOLDER --sm N``, ``run FOLDER OUT`` and ``dry``, with these help texts; ``out`` is that of OUT."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_emit = commands.add_parser("emit", help=f"{emit}; needs no GPU")
    of_emit.add_argument("folder", type=Path)
    of_emit.add_argument("--sm", type=int, default=90, help="compute capability, 90 for 9.0")
    of_run = commands.add_parser("run", help=f"{run} on this machine's GPU")
    of_run.add_argument("folder", type=Path, help="what emit wrote")
    of_run.add_argument("out", type=Path, help=out)
    commands.add_parser("dry", help=f"{dry}; needs no GPU")
    return CommandLine(parser, commands, of_emit, of_run)
