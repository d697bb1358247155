"""``trimode serve``: listen, answer, and on SIGTERM finish what runs, refuse what arrives, and exit with 0."""

from __future__ import annotations

import gc
import logging
import socket
import sys
import time
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from trimode.common.errors import TriModeError
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.openai_server.app import create_app
from trimode.runtime.openai_server.connection import Connection
from trimode.runtime.openai_server.gate import Gate
from trimode.runtime.openai_server.http_frame import REQUEST_ID, HttpFrame
from trimode.runtime.openai_server.server_log import LogLevel, configure_log
from trimode.runtime.openai_server.service import IGNORED_FIELDS_HEADER, Service

log = logging.getLogger("trimode.server")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Longer than clients keep idle connections, so that no request meets a connection that is closing.
KEEP_ALIVE_SECONDS = 75
# After each pass the scheduler thread must reacquire the GIL. The default interval of 5 ms is as long as a pass.
SWITCH_SECONDS = 0.0005
# Allocations between two cyclic garbage collections; the default of 700 is a dozen events.
GARBAGE_OBJECTS = 50_000
# Not 2, which stands for an error of the user.
ENGINE_DEAD_EXIT = 1
# For clients to receive the error that ends a cancelled response.
LAST_WORDS_SECONDS = 1


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """host: other machines can reach the server unless this is a loopback address; ``::`` listens on IPv6 and IPv4.
    model_names: the names clients may use, the engine's source if empty. max_body: bytes. request_seconds: limit of one
    response. drain_seconds: time to finish after SIGTERM; later, responses end with an error (`docker stop` kills after
    10). allowed_origins: web pages of these origins may use the server (CORS); ``*`` allows all. root_path: the path
    under which a proxy publishes the server. strict_fields: refuse unknown fields. tool_call_parser: as in Service.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_names: tuple[str, ...] = ()
    max_body: int = 4 << 20
    request_seconds: float = 600.0
    drain_seconds: float = 7.0
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    strict_fields: bool = False
    tool_call_parser: str | None = None
    log_level: LogLevel = "warning"


def serve(llm: EngineLLM, options: ServerOptions) -> None:
    """Answer until SIGTERM or SIGINT. If the engine stops by an error, exit with code 1, so that a supervisor restarts
    the server.
    """
    configure_log(options.log_level)
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    service = Service(
        llm,
        options.model_names or llm.manifest.source,
        options.request_seconds,
        strict_fields=options.strict_fields,
        tool_call_parser=options.tool_call_parser,
    )
    root_path = _normal_root_path(options.root_path)
    exposed = options.host not in LOOPBACK
    gate = Gate(
        create_app(service, root_path),
        api_key=options.api_key,
        max_body=options.max_body,
        this_machine_only=options.api_key is None and not exposed,
    )
    config = uvicorn.Config(
        HttpFrame(_with_origins(gate, options.allowed_origins), root_path),
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
    print(f"trimode: {llm.capacity}", file=sys.stderr)
    _Server(config, gate, service, options.drain_seconds).run(sockets=[_listener(options, config.backlog)])
    if llm.failure is not None:
        log.critical("the server exits with code %d: %s", ENGINE_DEAD_EXIT, llm.failure)
        sys.exit(ENGINE_DEAD_EXIT)


def _normal_root_path(path: str) -> str:
    """With a slash at the start and none at the end; empty for the root."""
    stripped = path.strip("/")
    return f"/{stripped}" if stripped else ""


def _with_origins(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID, IGNORED_FIELDS_HEADER],
    )


def _listener(options: ServerOptions, backlog: int) -> socket.socket:
    address = options.host, options.port
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    dual_stack = options.host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=backlog, dualstack_ipv6=dual_stack)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TriModeError(f"cannot listen on {options.host}:{options.port}: {reason}; use another --port") from None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, gate: Gate, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._gate = gate
        self._service = service
        self._drain_seconds = drain_seconds
        self._stopped_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal drains, a second one ends at once. Neither is raised again, so that the exit code is 0."""
        if self._stopped_at is not None:
            self.should_exit = self.force_exit = True
        self._gate.draining = True
        self._stopped_at = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second; True ends the server."""
        if await super().on_tick(counter) or self._service.llm.failure is not None:
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
        print(f"trimode: {self._service.names.default.name} on http://{host}:{port}", file=sys.stderr, flush=True)
