"""The entry of the ``trimode`` command: Ctrl-C ends it in one line, be it in the first imports, which take a while."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130
MESSAGE = "trimode: interrupted\n"


def main() -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        # Packages in C make errors of their own, or a crash, of an exception that passes through their import.
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end_at_once)
        from trimode.cli import commands

        signal.signal(signal.SIGINT, handler)
        commands.main()
    except KeyboardInterrupt:
        sys.stderr.write(MESSAGE)
        sys.exit(INTERRUPTED)


def _end_at_once(*_: object) -> None:
    os.write(sys.stderr.fileno(), MESSAGE.encode())
    os._exit(INTERRUPTED)
