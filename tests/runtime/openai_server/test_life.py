"""Clients that leave, a server that is stopped, and many at once: slots come back, nothing is lost without a word."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.event_client import DONE, stream
from scripts.faults import LONG, SLOTS, kill_a_client, stop_under_load
from scripts.load_test import Load, run_load
from scripts.serving import KEY, Served, serving

CHAT = "/v1/chat/completions"


def test_killed_clients_free_their_slots(served: Served) -> None:
    for _ in range(8):
        kill_a_client(served)


def test_a_client_that_hangs_up_before_a_whole_answer_frees_its_slot(served: Served, http: httpx.Client) -> None:
    whole = LONG | {"stream": False}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=whole, timeout=0.3)
    served.wait_until_idle(2)


def test_an_answer_is_cut_at_a_killed_client_and_not_computed_further(served: Served) -> None:
    before = served.metrics()["trimode_answers_total"]
    kill_a_client(served)
    assert served.metrics()["trimode_answers_total"] == before


@pytest.mark.parametrize("after", [0.0, 0.3])
def test_stopped_under_load(tiny_engine: Path, after: float) -> None:
    stopped = stop_under_load(tiny_engine, clients=16, after=after)
    assert stopped.code == 0
    assert stopped.seconds < 10
    assert stopped.outcomes["lost"] == 0
    assert stopped.outcomes["finished"] >= SLOTS  # what ran was finished


def test_what_does_not_finish_in_time_is_told(tiny_engine: Path) -> None:
    async def ask_and_stop(server: Served) -> list[Any]:
        body = LONG | {"n": 8, "temperature": 1.0}
        asked = asyncio.create_task(stream(f"{server.url}/v1/completions", body, KEY))
        await asyncio.sleep(0.5)
        server.terminate()
        await asyncio.sleep(0.2)
        late = await stream(f"{server.url}/v1/completions", LONG, KEY)
        assert (late.status, late.events[-1]["error"]["code"]) == (503, "shutting_down")
        return (await asked).events

    with serving(tiny_engine, "--drain-seconds", "0.5") as server:
        events = asyncio.run(ask_and_stop(server))
        assert events[-1]["error"]["code"] == "shutting_down"
        assert server.process.wait(10) == 0


def test_idle_servers_stop_at_once(tiny_engine: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(tiny_engine) as server:
            httpx.get(f"{server.url}/health")
            server.process.send_signal(number)
            assert server.process.wait(5) == 0
            assert server.log == []


def test_many_at_once_answer_as_each_alone(served: Served, heldout: list[dict[str, Any]]) -> None:
    load = Load.of_chats(served.url, heldout[::40], requests=72)
    found = run_load(load, clients=16)
    assert found.wrong == []
    assert found.completed == 72


def test_a_slow_reader_holds_up_nobody(served: Served) -> None:
    async def ask() -> tuple[float, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))
        body = b'{"prompt": "abc", "max_tokens": 1900, "ignore_eos": true, "stream": true}'
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n" % (KEY.encode(), len(body)) + body
        )
        await reader.readexactly(100)  # and no further
        found = await stream(f"{served.url}/v1/completions", {"prompt": "abc", "max_tokens": 8, "stream": True}, KEY)
        writer.close()
        return found.events[-1]

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == DONE
    served.wait_until_idle(10)
