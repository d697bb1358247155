"""Entry point of the ``trimode`` command: signals, closed streams, and errors as one line with exit code 2."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import NoReturn, TextIO

from trimode.cli.interrupts import INTERRUPTED, MESSAGE, exit_on_interrupt

USAGE_ERROR = 2


def main() -> None:
    """Run the command line in ``sys.argv``."""
    _open_closed_streams()
    try:
        with exit_on_interrupt():
            import click

            from trimode.cli.commands import commands
            from trimode.common.errors import TriModeError
    except KeyboardInterrupt:
        _exit_interrupted()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        commands.main(prog_name="trimode", standalone_mode=False)
    except TriModeError as error:
        _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help())
        sys.exit(USAGE_ERROR)
    except click.UsageError as error:
        command = "trimode" if error.ctx is None else error.ctx.command_path
        message = error.format_message()
        _fail(f"{message if message.endswith(('.', '?')) else message + '.'} Try '{command} --help'.")
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _exit_interrupted()
    except BrokenPipeError:
        # The reader of stdout has closed it. Close stderr too: the interpreter would report the failed flush there.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _fail(message: str) -> NoReturn:
    print(f"trimode: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def _exit_interrupted() -> NoReturn:
    sys.stderr.write(MESSAGE)
    sys.exit(INTERRUPTED)


def _open_closed_streams() -> None:
    """Open the null device for standard streams that the parent process closed.

    Without this, the next opened file gets the descriptor of a standard stream, and ``print(..., file=sys.stderr)``
    writes to stdout. ``sys.stdin`` stays None, so that a command that must read it can report the error.
    """
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # POSIX: the lowest free descriptor, which is this one
    sys.stdout = sys.stdout or _null_stream(1)
    sys.stderr = sys.stderr or _null_stream(2)


def _null_stream(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", encoding="utf-8", closefd=False)
