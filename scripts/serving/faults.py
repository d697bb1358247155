"""Clients that are killed while they stream, and a server that is stopped under load.

python -m scripts.serving.faults ENGINE --kills 200 --stops 20
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from scripts.serving.event_client import DONE, Streamed, event_request, stream
from scripts.serving.server_process import KEY, Served, serving

SHORT: dict[str, Any] = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "mode": "ar", "stream": True}
# Long enough that no machine finishes it during a test.
LONG = SHORT | {"max_tokens": 1900, "n": 64, "temperature": 1.0}
SLOTS = 8
# A client process that prints a line when the stream has begun, and then only reads.
_CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(sys.argv[3].encode())
    while b"data: " not in connection.recv(65536):
        pass
    print("streaming", flush=True)
    while connection.recv(65536):
        pass
"""


def kill_a_client(server: Served) -> float:
    """Kill a streaming client. Its answers must not be computed to their end.

    Returns the seconds until no slot is in use, by polling /metrics.
    """
    finished = server.metrics()["trimode_answers_total"]
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    request = event_request(f"{server.url}/v1/completions", LONG, KEY).decode()
    command = [sys.executable, "-S", "-E", "-c", _CLIENT, host, port, request]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"streaming\n"
        assert server.metrics()["trimode_requests_running"] > 0
        client.kill()
        begun = time.monotonic()
        server.wait_until_idle(60)
        seconds = time.monotonic() - begun
    assert server.metrics()["trimode_answers_total"] == finished
    return seconds


class Stopped(NamedTuple):
    """``outcomes`` of the requests, by :func:`outcome`. ``seconds``: from SIGTERM to the exit with ``code``."""

    outcomes: Counter[str]
    code: int
    seconds: float


def stop_under_load(engine: Path, clients: int = 24, after: float = 0.0) -> Stopped:
    """Send SIGTERM while more clients than slots stream one answer after another, ``after`` seconds after all slots are
    in use for the first time.
    """
    with serving(engine, "--max-batch", str(SLOTS)) as server:
        streams, stopped_at = asyncio.run(_load_and_stop(server, clients, after))
        code = server.process.wait(600)
        seconds = time.monotonic() - stopped_at
    return Stopped(Counter(outcome(found, begun < stopped_at) for begun, found in streams), code, seconds)


def outcome(found: Streamed, before: bool) -> str:
    """``before``: the request was sent before the signal.

    `lost`: the response broke off without an error, or never began although it was requested before the signal.
    `reset`: requested too late for a response.
    """
    if found.status == 0:
        return "lost" if before else "reset"
    if found.status == 503:
        return "refused"
    if found.whole and found.events[-1:] == [DONE]:
        return "finished"
    return "ended with an error" if found.whole and "error" in found.events[-1] else "lost"


async def _load_and_stop(server: Served, clients: int, after: float) -> tuple[list[tuple[float, Streamed]], float]:
    """Every stream with the time of its request, and the time of the signal."""
    found: list[tuple[float, Streamed]] = []

    async def ask_on() -> None:
        while True:
            begun = time.monotonic()
            answer = await stream(f"{server.url}/v1/completions", SHORT, KEY)
            found.append((begun, answer))
            if answer.status != 200:
                return

    tasks = [asyncio.create_task(ask_on()) for _ in range(clients)]
    while (await asyncio.to_thread(server.metrics))["trimode_requests_running"] < SLOTS:
        await asyncio.sleep(0.01)
    await asyncio.sleep(after)
    stopped_at = time.monotonic()
    server.terminate()
    await asyncio.wait_for(asyncio.gather(*tasks), 60)
    return found, stopped_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=20)
    options = parser.parse_args()
    with serving(options.engine) as server:
        before = server.resident_mib()
        seconds = sorted(kill_a_client(server) for _ in range(options.kills))
        cache = server.metrics()["trimode_prefix_cache_bytes"] / 2**20
        median, most = 1000 * seconds[len(seconds) // 2], 1000 * seconds[-1]
        print(
            f"{options.kills} clients killed while streaming: slot free after {median:.0f} ms (median), {most:.0f} ms "
            f"at most, as polled; {before:.0f} MiB resident before, {server.resident_mib():.0f} after with {cache:.0f} "
            f"of prefix cache; {len(server.log)} lines in the log"
        )
    total: Counter[str] = Counter()
    longest = 0.0
    for number in range(options.stops):
        stopped = stop_under_load(options.engine, after=number / options.stops)
        assert stopped.code == 0
        total += stopped.outcomes
        longest = max(longest, stopped.seconds)
    print(f"{options.stops} servers stopped under load: exit 0 within {longest:.1f} s; requests: {dict(total)}")
    assert not total["lost"]


if __name__ == "__main__":
    main()
