"""Clients that are killed in mid-stream, and a server that is stopped under load.

    python -m scripts.faults ENGINE --kills 200 --stops 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.event_client import DONE, Streamed, stream
from scripts.serving import KEY, Served, serving

LONG: dict[str, Any] = {"prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "mode": "ar", "stream": True}
# A client of its own process that says when the stream has begun, and then only reads.
_CLIENT = """
import socket, sys
host, port, payload = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
with socket.create_connection((host, port)) as connection:
    connection.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nAuthorization: Bearer %s\\r\\n" % sys.argv[4].encode()
        + b"Content-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(payload) + payload)
    while b"data: " not in connection.recv(65536):
        pass
    print("streaming", flush=True)
    while connection.recv(65536):
        pass
"""


def kill_a_client(server: Served) -> float:
    """kill -9 in mid-stream. Seconds until no slot is taken, as far as polling /metrics can tell."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    command = [sys.executable, "-S", "-E", "-c", _CLIENT, host, port, json.dumps(LONG), KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"streaming\n"
        assert server.metrics()["trimode_requests_running"] == 1
        client.kill()
        begun = time.monotonic()
        server.wait_until_idle(5)
        return time.monotonic() - begun


def stop_under_load(engine: Path, clients: int = 24, after: float = 0.5) -> Counter[str]:
    """SIGTERM while clients stream one answer after another. What became of every request, and the exit."""
    with serving(engine, "--max-batch", "8") as server:
        streams = asyncio.run(_load_and_stop(server, clients, after))
        begun = time.monotonic()
        code = server.process.wait(10)
        print(f"exit {code} after {time.monotonic() - begun + _drained(streams):.1f} s", end="; ")
    assert code == 0
    return Counter(outcome(found) for found in streams)


def outcome(found: Streamed) -> str:
    """`lost` is an answer that began and broke off without a word."""
    if found.status == 0:
        return "not accepted"
    if found.status == 503:
        return "refused"
    if found.status == 200 and found.events[-1:] == [DONE]:
        return "finished"
    return "told of the end" if found.events and "error" in found.events[-1] else "lost"


def _drained(streams: list[Streamed]) -> float:
    return 0.0 if streams else float("nan")


async def _load_and_stop(server: Served, clients: int, after: float) -> list[Streamed]:
    found: list[Streamed] = []
    body = LONG | {"max_tokens": 200}

    async def client() -> None:
        while not found or found[-1].status in (200,):
            found.append(await stream(f"{server.url}/v1/completions", body, KEY))

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(after)
    server.terminate()
    await asyncio.gather(*tasks)
    return found
