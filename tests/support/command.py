"""The ``trimode`` command in this process, without the start of a process, which takes longer than most commands."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from unittest.mock import patch

from trimode.cli.main import main


def run_here(*arguments: object) -> CompletedProcess[str]:
    """The command with these arguments. Modules that a test has replaced stay so."""
    words = ["trimode", *map(str, arguments)]
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with patch.object(sys, "argv", words), redirect_stdout(stdout), redirect_stderr(stderr):
            main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, terminated)
    return CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())
