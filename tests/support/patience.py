"""How long tests wait for what must come: no test fails because the machine is busy."""

import time
from collections.abc import Callable

HANG_SECONDS = 600  # after which a wait is taken for a hang


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"it did not become true in {HANG_SECONDS} seconds"
        time.sleep(0.005)
