"""HTTP as clients and proxies speak it: upgrades, HTTP/1.0, HEAD, request ids, path prefixes, CORS, IPv6."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.serving.server_process import KEY, Served, serving
from tests.support.patience import HANG_SECONDS

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "What is 60% of 440?"}], "max_tokens": 8}
TEXT = json.dumps(BODY).encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(TEXT), TEXT)
SIZED = b"Content-Length: %d\r\n" % len(TEXT), TEXT
UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n",
}


def exchange(server: Served, *parts: bytes) -> bytes:
    """What the server sends until it closes the connection."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=HANG_SECONDS) as connection:
        for part in parts:
            connection.sendall(part)
            threading.Event().wait(0.05)  # so that the parts arrive separately
        while data := connection.recv(1 << 16):
            received += data
    return received


def post(framing: bytes, version: bytes = b"1.1", more: bytes = b"") -> bytes:
    return (
        b"POST %s HTTP/%s\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n%s%s\r\n"
        % (CHAT.encode(), version, KEY.encode(), framing, more)
    )


LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("framing", [SIZED, CHUNKED], ids=["sized", "chunked"])
@pytest.mark.parametrize("separate", [False, True])
def test_an_upgrade_is_ignored(served: Served, upgrade: str, framing: tuple[bytes, bytes], separate: bool) -> None:
    """The body is read, and the connection serves the next request."""
    head, body = post(framing[0], more=UPGRADES[upgrade]), framing[1]
    parts = [head, body[:10], body[10:], head + body, LAST] if separate else [head + body + head + body + LAST]
    received = exchange(served, *parts)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.count(b'"completion_tokens":8') == 2
    assert received.endswith(b'{"status":"ok"}')


def test_an_upgrade_without_a_body(served: Served) -> None:
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % UPGRADES["h2c"]
    assert exchange(served, get, get, LAST).count(b'{"status":"ok"}') == 3


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_has_no_chunks(served: Served, stream: bool) -> None:
    body = json.dumps(BODY | {"stream": stream}).encode()
    framing = b"Content-Length: %d\r\n" % len(body)
    head, _, text = exchange(served, post(framing, b"1.0") + body).partition(b"\r\n\r\n")
    assert b"200 OK" in head
    assert b"transfer-encoding" not in head.lower()
    assert text.endswith(b"data: [DONE]\n\n") if stream else json.loads(text)["usage"]["completion_tokens"] == 8
    if stream:
        assert text.startswith(b"data: {")


def test_head_is_get_without_a_body(served: Served, http: httpx.Client) -> None:
    for path in ("/", "/playground.js", "/health", "/v1/models", "/v1/models/tiny", "/version", "/metrics"):
        found, expected = http.head(path), http.get(path)
        assert (found.status_code, found.content) == (200, b"")
        assert found.headers["content-type"] == expected.headers["content-type"]
        if path != "/metrics":
            assert found.headers["content-length"] == expected.headers["content-length"]
    assert http.head(CHAT).status_code == 405
    assert httpx.head(f"{served.url}/v1/models").status_code == 401


def test_request_ids(served: Served, http: httpx.Client) -> None:
    given = http.post(CHAT, json=BODY, headers={"x-request-id": "trace-1:a/b"})
    assert given.headers["x-request-id"] == "trace-1:a/b"
    for stream in (False, True):
        made = {http.post(CHAT, json=BODY | {"stream": stream}).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2
    refused = httpx.get(f"{served.url}/v1/models", headers={"x-request-id": "mine"}, timeout=HANG_SECONDS)
    assert (refused.status_code, refused.headers["x-request-id"]) == (401, "mine")
    for strange in (b"a b", "\u00fc".encode("latin-1"), b"x" * 129):
        assert http.get("/health", headers={b"x-request-id": strange}).headers["x-request-id"] != strange.decode(
            "latin-1"
        )


def test_request_log(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--log-level", "info") as server:
        headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
        httpx.post(f"{server.url}{CHAT}", json=BODY, headers=headers, timeout=HANG_SECONDS)
        httpx.get(f"{server.url}/nowhere", headers=headers, timeout=HANG_SECONDS)
        server.process.terminate()
        server.process.wait(HANG_SECONDS)
        lines = [line for line in server.log if "request mine" in line]
    assert "POST /v1/chat/completions 200" in lines[0]
    assert "GET /nowhere 404" in lines[1]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_scheme_of_the_key_has_no_case(served: Served, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {KEY}"}
    assert httpx.get(f"{served.url}/v1/models", headers=headers, timeout=HANG_SECONDS).status_code == 200


@pytest.fixture(scope="module")
def under_a_path(tiny_engine: Path) -> Iterator[Served]:
    options = ("--root-path", "/ai/trimode/", "--allowed-origins", "https://app.example", "--host", "::")
    with serving(tiny_engine, *options, "--allowed-origins", "http://localhost:3000") as server:
        yield server


def local(server: Served) -> str:
    return server.url.replace("[::]", "127.0.0.1")


def test_a_path_prefix(under_a_path: Served) -> None:
    """Whether or not the proxy removes it."""
    url, headers = local(under_a_path), {"authorization": f"Bearer {KEY}"}
    for prefix in ("", "/ai/trimode"):
        assert httpx.get(f"{url}{prefix}/health", timeout=HANG_SECONDS).json() == {"status": "ok"}
        assert httpx.get(f"{url}{prefix}/v1/models", timeout=HANG_SECONDS).status_code == 401
        assert httpx.post(f"{url}{prefix}{CHAT}", json=BODY, headers=headers, timeout=HANG_SECONDS).status_code == 200
        page = httpx.get(f"{url}{prefix}/", timeout=HANG_SECONDS)
        assert page.status_code == 200
        for link in ("playground.css", "playground.js"):
            assert f'"{link}"' in page.text
            assert httpx.get(f"{url}{prefix}/{link}", timeout=HANG_SECONDS).status_code == 200
    moved = httpx.get(f"{url}/ai/trimode", headers={"x-request-id": "mine"}, timeout=HANG_SECONDS)
    assert moved.headers["x-request-id"] == "mine"
    assert (moved.status_code, str(moved.next_request and moved.next_request.url)) == (307, f"{url}/ai/trimode/")
    assert httpx.get(f"{url}/ai/trimodes/health", timeout=HANG_SECONDS).status_code == 401
    assert httpx.get(f"{url}/openapi.json", headers=headers, timeout=HANG_SECONDS).json()["servers"] == [
        {"url": "/ai/trimode"}
    ]


@pytest.mark.parametrize("origin", ["https://app.example", "http://localhost:3000"])
def test_allowed_origins(under_a_path: Served, origin: str) -> None:
    request = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    preflight = httpx.options(
        f"{local(under_a_path)}{CHAT}", headers=request, timeout=HANG_SECONDS
    )  # browsers send no key with it
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    assert preflight.headers["x-request-id"]
    refused = httpx.get(f"{local(under_a_path)}/v1/models", headers={"origin": origin}, timeout=HANG_SECONDS)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
    assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()


def test_other_origins(under_a_path: Served, served: Served) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for url in (local(under_a_path), served.url):
        assert (
            "access-control-allow-origin"
            not in httpx.options(f"{url}{CHAT}", headers=headers, timeout=HANG_SECONDS).headers
        )


def test_dual_stack(under_a_path: Served) -> None:
    port = int(under_a_path.url.rpartition(":")[2])
    for host in ("127.0.0.1", "[::1]"):
        assert httpx.get(f"http://{host}:{port}/health", timeout=HANG_SECONDS).status_code == 200
