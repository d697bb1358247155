"""The server's life: it says where it listens; at SIGTERM it finishes what runs, refuses what comes, leaves with 0."""

from __future__ import annotations

import gc
import socket
import sys
import time
from dataclasses import dataclass
from types import FrameType

import uvicorn

from trimode.common.errors import TriModeError
from trimode.runtime.api.llm import LLM
from trimode.runtime.openai_server.app import create_app
from trimode.runtime.openai_server.connection import Connection
from trimode.runtime.openai_server.gate import Gate
from trimode.runtime.openai_server.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Idle connections are kept longer than clients keep them, so that no request meets a closing one.
KEEP_ALIVE_SECONDS = 75
# After each pass the scheduler's thread waits until this one hands the interpreter over: by default for up to 5 ms,
# which is as long as a pass.
SWITCH_SECONDS = 0.0005
# Objects made between two collections of cyclic garbage, which few are: the default of 700 is a dozen events.
GARBAGE_OBJECTS = 50_000
# For clients to take the error with which a cancelled answer ends.
LAST_WORDS_SECONDS = 1


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """host: every other machine can reach the server unless it is a loopback address. model_name: the engine's source
    unless given. max_body: bytes. request_seconds: longest time for an answer. drain_seconds: time to finish after
    SIGTERM; what runs on is told that it is not whole (`docker stop` kills after 10).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_name: str | None = None
    max_body: int = 4 << 20
    request_seconds: float = 600.0
    drain_seconds: float = 7.0


def serve(llm: LLM, options: ServerOptions) -> None:
    """Answer until SIGTERM or SIGINT."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    service = Service(llm, options.model_name or llm.manifest.source, options.request_seconds)
    exposed = options.host not in LOOPBACK
    gate = Gate(
        create_app(service),
        api_key=options.api_key,
        max_body=options.max_body,
        loopback_only=options.api_key is None and not exposed,
    )
    config = uvicorn.Config(
        gate,
        host=options.host,
        port=options.port,
        loop="uvloop",
        http=Connection,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
    )
    if exposed and options.api_key is None:
        print(f"trimode: {options.host} is open to other machines, and no API key is set", file=sys.stderr)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=config.backlog)
    except OSError as error:
        raise TriModeError(
            f"cannot listen on {options.host}:{options.port}: {error.strerror}; give another --port"
        ) from None
    _Server(config, gate, service, options.drain_seconds).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, gate: Gate, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._gate = gate
        self._service = service
        self._drain_seconds = drain_seconds
        self._stopped_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal drains; a second one ends at once. Neither is raised again: to be stopped is no failure."""
        if self._stopped_at is not None:
            self.should_exit = self.force_exit = True
        self._gate.draining = True
        self._stopped_at = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to exit."""
        if await super().on_tick(counter):
            return True
        if self._stopped_at is None:
            return False
        late = time.monotonic() - self._stopped_at - self._drain_seconds
        if late >= 0:
            self._service.running.cancel_all()
        return self._gate.active == 0 or late >= LAST_WORDS_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        print(f"trimode: {self._service.model_name} on http://{host}:{port}", file=sys.stderr, flush=True)
