"""A real tritonserver over the tiny engine, in the environment that `make triton` uses."""

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
    """CI sets the variable, so that there a missing environment is a failure."""
    if not (ENVIRONMENT / "bin" / "trimode").exists() and "TRIMODE_NEED_TRITON" not in os.environ:
        pytest.skip(f"{ENVIRONMENT} is not there; `make triton-environment` makes it")
    ports = Ports(free_port(), free_port(), free_port())
    with triton_server(engine, ports, "--max-batch", "4", *options):
        yield ports


@pytest.fixture(scope="session")
def triton(tiny_engine: Path) -> Iterator[Ports]:
    yield from serving(tiny_engine)


@pytest.fixture(scope="session")
def undecoupled(tiny_engine: Path) -> Iterator[Ports]:
    """As TensorRT-LLM's own model is configured: one answer to each request."""
    yield from serving(tiny_engine, "--no-decoupled")
