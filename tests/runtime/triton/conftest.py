"""A real tritonserver over the tiny engine, in the environment that `make triton` uses."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.triton_server import ENVIRONMENT, Ports, triton_server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def triton(tiny_engine: Path) -> Iterator[Ports]:
    """CI sets the variable, so that there a missing environment is a failure."""
    if not (ENVIRONMENT / "bin" / "trimode").exists() and "TRIMODE_NEED_TRITON" not in os.environ:
        pytest.skip(f"{ENVIRONMENT} is not there; `make triton-environment` makes it")
    ports = Ports(free_port(), free_port(), free_port())
    with triton_server(tiny_engine, ports, max_batch=4):
        yield ports
