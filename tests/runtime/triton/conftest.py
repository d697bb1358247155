"""A second tritonserver, whose model is not decoupled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.serving.triton_server import Ports
from tests.support.tritonserver import serving


@pytest.fixture(scope="session")
def undecoupled(tiny_engine: Path) -> Iterator[Ports]:
    """As TensorRT-LLM's own model is configured: one answer to each request."""
    yield from serving(tiny_engine, "--no-decoupled")
