"""Disconnects, shutdown and load: slots are freed, and every lost response ends with an error."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.serving.event_client import DONE, event_request, stream
from scripts.serving.faults import LONG, SLOTS, kill_a_client, stop_under_load
from scripts.serving.load_test import Load, run_load
from scripts.serving.server_process import KEY, Served, serving
from tests.support.patience import HANG_SECONDS, wait_until

ANSWERS = 3  # with their likelihoods, more than the sockets' buffers hold


def test_killed_clients_free_their_slots(served: Served) -> None:
    for _ in range(8):
        kill_a_client(served)


def test_a_disconnect_before_a_whole_answer_frees_the_slot(served: Served, http: httpx.Client) -> None:
    finished = served.metrics()["trimode_answers_total"]
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG | {"stream": False}, timeout=httpx.Timeout(HANG_SECONDS, read=0.3))
    served.wait_until_idle(HANG_SECONDS)
    assert served.metrics()["trimode_answers_total"] == finished


@pytest.mark.parametrize("after", [0.0, 0.3])
def test_stopped_under_load(tiny_engine: Path, after: float) -> None:
    stopped = stop_under_load(tiny_engine, clients=16, after=after)
    assert stopped.code == 0
    assert stopped.seconds < HANG_SECONDS
    assert stopped.outcomes["lost"] == 0
    assert stopped.outcomes["finished"] >= SLOTS  # what ran was finished


def test_unfinished_responses_end_with_an_error(tiny_engine: Path) -> None:
    async def ask_and_stop(server: Served) -> list[Any]:
        running = asyncio.create_task(stream(f"{server.url}/v1/completions", LONG, KEY))
        while server.metrics()["trimode_requests_running"] == 0:
            await asyncio.sleep(0.01)
        server.terminate()
        await asyncio.to_thread(wait_until, lambda: httpx.get(f"{server.url}/health").status_code == 503)
        late = await stream(f"{server.url}/v1/completions", LONG, KEY)
        assert (late.status, late.events[-1]["error"]["code"]) == (503, "shutting_down")
        return (await running).events

    with serving(tiny_engine, "--drain-seconds", "5") as server:
        events = asyncio.run(ask_and_stop(server))
        assert events[-1]["error"]["code"] == "shutting_down"
        assert server.process.wait(HANG_SECONDS) == 0


def test_idle_servers_stop_at_once(tiny_engine: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(tiny_engine, "--drain-seconds", str(2 * HANG_SECONDS)) as server:
            httpx.get(f"{server.url}/health", timeout=HANG_SECONDS)
            server.process.send_signal(number)
            assert server.process.wait(HANG_SECONDS) == 0
            assert server.log == []


def test_concurrent_answers_equal_solo_answers(served: Served, heldout: list[dict[str, Any]]) -> None:
    load = Load.of_chats(served.url, heldout[::40], requests=72)
    found = run_load(load, clients=16)
    assert found.wrong == []
    assert found.completed == 72


def test_a_slow_reader_does_not_delay_others(served: Served) -> None:
    """Its answers are computed while its socket is full; other clients are served; it loses nothing."""
    few = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 8, "stream": True}
    much = few | {"max_tokens": 1900, "ignore_eos": True, "n": ANSWERS, "temperature": 1.0, "logprobs": True}

    async def ask() -> None:
        before = served.metrics()
        connection = _narrow_connection(served)
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(event_request(f"{served.url}/v1/chat/completions", much | {"top_logprobs": 20}, KEY))
        received = await reader.readexactly(100)  # and no further
        assert (await stream(f"{served.url}/v1/chat/completions", few, KEY)).events[-1] == DONE
        await asyncio.to_thread(served.wait_until_idle, HANG_SECONDS)
        after = served.metrics()
        assert after["trimode_answers_total"] - before["trimode_answers_total"] == ANSWERS + 1
        assert after["trimode_answer_tokens_count"] - before["trimode_answer_tokens_count"] == 1  # not the slow one's
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        received += await reader.read()
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert received.count(b'"finish_reason":"length"') == ANSWERS
        writer.close()

    asyncio.run(asyncio.wait_for(ask(), HANG_SECONDS))


def _narrow_connection(server: Served) -> socket.socket:
    """A connection with a small receive buffer."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    return connection
