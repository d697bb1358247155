"""ASGI middleware that frames every response: request id, request log, path prefix, HEAD."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimode.runtime.openai_server.server_log import log_request

REQUEST_ID = "x-request-id"
_VALID_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class HttpFrame:
    """root_path: the path under which a proxy publishes the server. It is removed if the proxy has not done so.

    The request id is the client's ``x-request-id`` or a new one; it is in the response, the request log and
    ``scope["trimode.request_id"]``.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID.encode(), b"")
        request_id = given.decode() if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
        inner = dict(scope, **{"trimode.request_id": request_id})
        head = scope["method"] == "HEAD"
        if head:
            inner["method"] = "GET"
        app = self._app
        if self._root_path and scope["path"] == self._root_path:  # relative links need the slash
            app = RedirectResponse(self._root_path.rpartition("/")[2] + "/")
        if self._root_path and scope["path"].startswith(f"{self._root_path}/"):
            inner["path"] = scope["path"].removeprefix(self._root_path)
        status, begun = 0, time.perf_counter()

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            elif head:
                message = dict(message, body=b"")
            await send(message)

        try:
            await app(inner, receive, framed)
        finally:
            log_request(scope["method"], scope["path"], status, time.perf_counter() - begun, request_id)
