"""A real frontend of Dynamo and two workers, where the environment of `make dynamo-environment` exists."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.serving.dynamo_check import EQUAL, Case, Received, solo_runs
from scripts.serving.dynamo_cluster import ENVIRONMENT, MODEL_NAME, Cluster, Worker, dynamo_cluster
from scripts.serving.event_client import stream
from tests.support.patience import HANG_SECONDS, wait_until

CHAT = [{"role": "user", "content": "Compute 47 * 36 step by step."}]
PENALISED: tuple[dict[str, Any], dict[str, Any]] = (
    {"presence_penalty": 0.6, "frequency_penalty": 0.4, "temperature": 0.8},
    {"mode": "linear_spec", "block_length": 8},
)


@pytest.fixture(scope="module")
def cluster(tiny_engine: Path) -> Iterator[Cluster]:
    if not (ENVIRONMENT / "bin" / "trimode").exists():
        pytest.skip(f"{ENVIRONMENT} does not exist; `make dynamo-environment` creates it")
    with dynamo_cluster(tiny_engine, "--threads", "1") as cluster:
        yield cluster


async def ask(cluster: Cluster, body: dict[str, Any], kill: signal.Signals | None = None) -> Received:
    """kill: a signal for the worker that answers, while it does."""
    request = asyncio.create_task(stream(f"{cluster.url}/v1/chat/completions", body))
    if kill is not None:
        worker = await asyncio.to_thread(busy_worker, cluster)
        worker.process.send_signal(kill)
        code = await asyncio.to_thread(worker.process.wait, HANG_SECONDS)
        assert code == (0 if kill == signal.SIGTERM else -signal.SIGKILL)
    received = Received.of(await request)
    if kill is not None:
        await asyncio.to_thread(cluster.replace, worker)
    return received


def busy_worker(cluster: Cluster) -> Worker:
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        for worker in cluster.workers:
            if running(worker):
                return worker
    raise TimeoutError("no worker is busy")


def running(worker: Worker) -> bool:
    lines = [line for line in worker.metrics().splitlines() if line.startswith("trimode_requests_running{")]
    return any(float(line.rpartition(" ")[2]) > 0 for line in lines)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.of(3, PENALISED, CHAT, max_tokens=600, ignore_eos=True)


@pytest.fixture(scope="module")
def solo(tiny_engine: Path, case: Case) -> Received:
    return solo_runs(tiny_engine, [case])[0]


@pytest.mark.parametrize("kill", [None, signal.SIGKILL, signal.SIGTERM], ids=["alone", "kill -9", "SIGTERM"])
def test_an_answer_is_its_solo_run(cluster: Cluster, case: Case, solo: Received, kill: signal.Signals | None) -> None:
    assert asyncio.run(ask(cluster, case.body, kill)).outcome(solo) == EQUAL


def test_no_process_listens_beyond_the_loopback_interface(cluster: Cluster) -> None:
    addresses = [
        connection.laddr.ip
        for child in psutil.Process().children(recursive=True)
        for connection in child.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(addresses) >= 2 + 2 * len(cluster.workers)
    assert set(addresses) == {"127.0.0.1"}


def test_a_client_that_leaves_frees_the_slot(cluster: Cluster) -> None:
    async def leave() -> None:
        body = {"model": MODEL_NAME, "messages": CHAT, "stream": True, "max_tokens": 1800, "ignore_eos": True}
        request = asyncio.create_task(stream(f"{cluster.url}/v1/chat/completions", body))
        await asyncio.to_thread(busy_worker, cluster)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: not any(map(running, cluster.workers)))


def test_tools_and_refusals(cluster: Cluster) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    bodies: list[dict[str, Any]] = [
        {"n": 2, "temperature": 1.0},
        {"nvext": {"annotations": ["trimode.mode=fast"]}},
        {"tools": [tool], "tool_choice": "required", "nvext": {"annotations": ["trimode.mode=diffusion"]}},
    ]
    expected = ("n is 2; Dynamo ends", "mode is 'fast'", "guided_decoding cannot be honoured in mode diffusion")
    for body, message in zip(bodies, expected, strict=True):
        received = asyncio.run(ask(cluster, {"model": MODEL_NAME, "messages": CHAT, "stream": True, **body}))
        assert message in str(received.error)
