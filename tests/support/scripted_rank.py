"""A rank without an engine: ``python -m tests.support.scripted_rank SOCKET`` does what ``$TRIMODE_TEST_RANKS`` says,
one word for each rank: ``ready`` loads, ``hang`` neither answers nor reads, and ``error`` answers with an error.
"""

import contextlib
import os
import sys
import time
from multiprocessing.connection import Connection

from trimode.common.errors import TriModeError
from trimode.runtime.ranks.messages import Loaded

MODULE = "tests.support.scripted_rank"
SCRIPT = "TRIMODE_TEST_RANKS"


def main() -> None:
    parent, connection = os.getppid(), Connection(int(sys.argv[1]))
    connection.recv()
    match os.environ[SCRIPT].split()[int(os.environ["PMI_RANK"])]:
        case "ready":
            connection.send(Loaded(None, 1, None))
        case "error":
            connection.send(TriModeError("this rank has no memory"))
        case "hang":
            while os.getppid() == parent:
                time.sleep(0.1)
    with contextlib.suppress(EOFError):
        connection.recv()


if __name__ == "__main__":
    main()
