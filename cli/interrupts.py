"""Ctrl-C while modules are imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 128 + signal.SIGINT
MESSAGE = "trimode: interrupted\n"


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Around imports: SIGINT ends the process at once, with one line on stderr.

    A KeyboardInterrupt during the import of a C extension becomes another error, or a crash. If the caller installed a
    handler or ignores SIGINT, that is not changed.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _exit_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _exit_at_once(*_: object) -> None:
    os.write(sys.stderr.fileno(), MESSAGE.encode())
    os._exit(INTERRUPTED)
