"""A rank without an engine: ``python -m tests.support.scripted_rank SOCKET`` does what ``$TRIMODE_TEST_RANKS`` says,
one word for each rank: ``ready`` loads, ``hang`` neither answers nor reads, ``error`` answers with an error, and
``close`` closes its sockets, and ends with exit code 7 as soon as no other rank runs.
"""

import contextlib
import os
import sys
import time
from multiprocessing.connection import Connection

import psutil

from trimode.common.errors import TriModeError
from trimode.runtime.ranks.messages import Loaded

MODULE = "tests.support.scripted_rank"
SCRIPT = "TRIMODE_TEST_RANKS"


def is_another_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it has ended
        return MODULE in process.cmdline() and process.pid != os.getpid()
    return False


def main() -> None:
    parent, connection = os.getppid(), Connection(int(sys.argv[1]))
    connection.recv()
    match os.environ[SCRIPT].split()[int(os.environ["PMI_RANK"])]:
        case "ready":
            connection.send(Loaded(None, 1, None))
        case "error":
            connection.send(TriModeError("this rank has no memory"))
        case "close":
            connection.close()
            os.close(int(os.environ["PMI_FD"]))
            while any(is_another_rank(child) for child in psutil.Process(parent).children()):
                time.sleep(0.1)
            sys.exit(7)
        case "hang":
            while os.getppid() == parent:
                time.sleep(0.1)
    with contextlib.suppress(EOFError):
        connection.recv()


if __name__ == "__main__":
    main()
