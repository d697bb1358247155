"""A real server in its own process, over the tiny engine, and clients on real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from scripts.serving.server_process import KEY, Served, serving
from tests.support.patience import HANG_SECONDS


@pytest.fixture(scope="session")
def served(tiny_engine: Path) -> Iterator[Served]:
    """One server for all tests that do not change its state."""
    with serving(tiny_engine, "--update-seconds", "0") as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=HANG_SECONDS) as found:
        yield found
