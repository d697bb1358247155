"""The application: routes, the gate before them, and the page."""

from __future__ import annotations

import time
import traceback
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from trimode.common.errors import TriModeError
from trimode.runtime.openai_server import http_errors as errors
from trimode.runtime.openai_server.chat import complete_chat
from trimode.runtime.openai_server.completions import complete
from trimode.runtime.openai_server.http_errors import BAD_METHOD, BAD_REQUEST, NOT_FOUND, ApiError
from trimode.runtime.openai_server.running import ClientLeftError
from trimode.runtime.openai_server.schema import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorAnswer,
    Health,
    Model,
    ModelList,
)
from trimode.runtime.openai_server.service import Service, json_response

# The page needs nothing but itself and this server.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
PAGE_FILES = {
    "/": ("playground.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
METRICS: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
# The gate checks the key; this only documents it.
KEY_SCHEME = {"HTTPBearer": {"type": "http", "scheme": "bearer", "description": "Checked where a key is set."}}
LOCKED: dict[str, Any] = {"openapi_extra": {"security": [{name: []} for name in KEY_SCHEME]}}
CLIENT_LEFT = 499  # as nginx logs it; nobody receives it


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


REFUSALS = _documented(401, 421, 500, 503)
BODY_REFUSALS = REFUSALS | _documented(400, 404, 408, 413, 429, 504)
STREAM: dict[str, Any] = {
    "description": "The answer; with `stream`, its chunks as server-sent events.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="TriMode", version="1", docs_url=None, redoc_url=None)
    _add_handlers(app)
    _add_page(app)
    started = int(time.time())

    @app.post("/v1/chat/completions", responses=BODY_REFUSALS | {200: STREAM | {"model": ChatCompletion}}, **LOCKED)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        return await complete_chat(service, body, http)

    @app.post("/v1/completions", responses=BODY_REFUSALS | {200: STREAM | {"model": Completion}}, **LOCKED)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await complete(service, body, http)

    @app.get("/v1/models", responses=REFUSALS, response_model=ModelList, **LOCKED)
    async def models() -> Response:
        return json_response(ModelList(object="list", data=[model()]))

    @app.get("/v1/models/{name:path}", responses=REFUSALS | _documented(404), response_model=Model, **LOCKED)
    async def one_model(name: str) -> Response:
        service.require_model(name)
        return json_response(model())

    def model() -> Model:
        return Model(
            id=service.model_name,
            object="model",
            created=started,
            owned_by="trimode",
            max_model_len=service.llm.manifest.limits.capacity,
        )

    @app.get("/health", responses=_documented(421, 503), response_model=Health)
    async def health() -> Response:
        return json_response(Health(status="ok"))

    @app.get("/metrics", responses=REFUSALS | {200: METRICS}, **LOCKED)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def openapi() -> dict[str, Any]:
        """FastAPI documents 422 for every body; here that is 400."""
        if not app.openapi_schema:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema["components"]["securitySchemes"] = KEY_SCHEME
            for path in app.openapi_schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_page(app: FastAPI) -> None:
    folder = resources.files("trimode.runtime.openai_server")
    for path, (name, media_type) in PAGE_FILES.items():
        page = Response((folder / name).read_bytes(), headers=PAGE_HEADERS, media_type=media_type)
        app.add_route(path, _showing(page))


def _showing(page: Response) -> Callable[[Request], Awaitable[Response]]:
    async def show(_: Request) -> Response:
        return page

    return show


def _release(error: Exception) -> None:
    """FastAPI's frames keep the error that keeps them, and the body. Megabytes would wait for a collection of garbage,
    which counts objects.
    """
    traceback.clear_frames(error.__traceback__)


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(TriModeError)
    async def refuse(_: Request, error: TriModeError) -> Response:
        return errors.respond(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> Response:
        _release(error)
        return errors.respond(errors.of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> Response:
        _release(error)
        # FastAPI makes one of what goes wrong while a body is read, the gate's refusals among them.
        if isinstance(error.__cause__, ApiError):
            return errors.respond(error.__cause__)
        kind, message = {
            404: (NOT_FOUND, "there is nothing at this path"),
            405: (BAD_METHOD, "this path does not take that method"),
        }.get(error.status_code, (BAD_REQUEST, "the body cannot be read as JSON in UTF-8"))
        response = errors.respond(ApiError(kind, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientLeftError)
    async def nobody(_: Request, _error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return errors.respond(error)
