"""A real tritonserver on free ports, in the environment that `make triton` uses."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.serving.triton_server import ENVIRONMENT, Ports, triton_server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def serving(engine: Path, *options: str) -> Iterator[Ports]:
    """Skips where the environment is missing, unless TRIMODE_NEED_TRITON is set: CI sets it, so that there a missing
    environment is a failure.
    """
    if not (ENVIRONMENT / "bin" / "trimode").exists() and "TRIMODE_NEED_TRITON" not in os.environ:
        pytest.skip(f"{ENVIRONMENT} does not exist; `make triton-environment` creates it")
    ports = Ports(free_port(), free_port(), free_port())
    with triton_server(engine, ports, "--max-batch", "4", *options):
        yield ports
