"""The application: routes, the playground's files, and error handlers."""

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
from trimode.common.version import __version__
from trimode.runtime.openai_server import http_errors as errors
from trimode.runtime.openai_server import tokenizer_endpoints
from trimode.runtime.openai_server.anthropic_bodies import (
    CountTokensRequest,
    MessageRecord,
    MessagesRequest,
    TokenCount,
)
from trimode.runtime.openai_server.anthropic_messages import count_tokens, create_message
from trimode.runtime.openai_server.chat import complete_chat
from trimode.runtime.openai_server.completions import complete
from trimode.runtime.openai_server.gate import HEALTH
from trimode.runtime.openai_server.http_errors import BAD_METHOD, BAD_REQUEST, ENGINE_DEAD, NOT_FOUND, ApiError
from trimode.runtime.openai_server.model_names import ModelName
from trimode.runtime.openai_server.request_bodies import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from trimode.runtime.openai_server.response_bodies import (
    ChatCompletion,
    Completion,
    Detokenized,
    ErrorBody,
    Health,
    MessagesErrorBody,
    ModelList,
    ServedModel,
    Tokenized,
    TokenizerInfo,
    Version,
)
from trimode.runtime.openai_server.responses import respond
from trimode.runtime.openai_server.responses_bodies import ResponseRecord, ResponsesRequest
from trimode.runtime.openai_server.running import ClientLeftError
from trimode.runtime.openai_server.service import Service, json_response

# The playground loads nothing from other servers.
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
KEY_SCHEME = {
    "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "Required if the server has an API key."}
}
LOCKED: dict[str, Any] = {"openapi_extra": {"security": [{name: []} for name in KEY_SCHEME]}}
# Parts of OpenAI's and Anthropic's APIs that clients call, by the beginning of their path.
NOT_OFFERED = {
    "/v1/assistants": "assistants are not offered; use /v1/responses or /v1/chat/completions",
    "/v1/audio": "audio is not offered: this server reads and writes text only",
    "/v1/batches": "batches are not offered; send requests side by side, the server batches them",
    "/v1/conversations": "conversations are not stored; send the whole conversation with each request",
    "/v1/embeddings": "embeddings are not offered: this server has a generative model only",
    "/v1/files": "files are not offered",
    "/v1/fine_tuning": "training is not offered",
    "/v1/images": "images are not offered: this server reads and writes text only",
    "/v1/messages/": "message batches are not offered; send requests side by side, the server batches them",
    "/v1/moderations": "moderation is not offered: this server has a generative model only",
    "/v1/realtime": "realtime sessions are not offered",
    "/v1/rerank": "ranking is not offered: this server has a generative model only",
    "/v1/responses/": "responses are not stored",
    "/v1/score": "scores are not offered: this server has a generative model only",
    "/v1/threads": "threads are not offered; send the whole conversation with each request",
    "/v1/vector_stores": "vector stores are not offered",
}
CLIENT_LEFT = 499  # nginx's code for the log; the client has gone


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


REFUSALS = _documented(401, 421, 500, 503)
BODY_REFUSALS = REFUSALS | _documented(400, 404, 408, 413, 422, 429)
MESSAGES_REFUSALS: dict[int | str, dict[str, Any]] = {status: {"model": MessagesErrorBody} for status in BODY_REFUSALS}
# Before OpenAPI 3.2, the schema of an event stream describes one event.
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
STREAM: dict[str, Any] = {
    "description": "The response; with `stream`, its chunks as server-sent events.",
    "content": {"text/event-stream": {"schema": EVENT}},
}


def create_app(service: Service, root_path: str = "") -> FastAPI:
    """``root_path``: the path under which a proxy publishes the server, for the OpenAPI document."""
    servers = [{"url": root_path}] if root_path else None
    app = FastAPI(title="TriMode", version=__version__, docs_url=None, redoc_url=None, servers=servers)
    _add_handlers(app)
    _add_page(app)
    started = int(time.time())

    @app.post("/v1/chat/completions", responses=BODY_REFUSALS | {200: STREAM | {"model": ChatCompletion}}, **LOCKED)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        return await complete_chat(service, body, http)

    @app.post("/v1/responses", responses=BODY_REFUSALS | {200: STREAM | {"model": ResponseRecord}}, **LOCKED)
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        return await respond(service, body, http)

    @app.post("/v1/messages", responses=MESSAGES_REFUSALS | {200: STREAM | {"model": MessageRecord}}, **LOCKED)
    async def messages(body: MessagesRequest, http: Request) -> Response:
        return await create_message(service, body, http)

    @app.post("/v1/messages/count_tokens", responses=MESSAGES_REFUSALS, response_model=TokenCount, **LOCKED)
    async def tokens_of_messages(body: CountTokensRequest, http: Request) -> Response:
        return await count_tokens(service, body, http)

    @app.post("/v1/completions", responses=BODY_REFUSALS | {200: STREAM | {"model": Completion}}, **LOCKED)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await complete(service, body, http)

    @app.post("/tokenize", responses=BODY_REFUSALS, response_model=Tokenized, **LOCKED)
    async def tokenize(body: TokenizeRequest, http: Request) -> Response:
        return await tokenizer_endpoints.tokenize(service, body, http)

    @app.post("/detokenize", responses=BODY_REFUSALS, response_model=Detokenized, **LOCKED)
    async def detokenize(body: DetokenizeRequest, http: Request) -> Response:
        return await tokenizer_endpoints.detokenize(service, body, http)

    @app.get("/tokenizer_info", responses=REFUSALS, response_model=TokenizerInfo, **LOCKED)
    async def tokenizer_info() -> Response:
        return tokenizer_endpoints.tokenizer_info(service)

    @app.get("/v1/models", responses=REFUSALS, response_model=ModelList, **LOCKED)
    async def models() -> Response:
        return json_response(ModelList(object="list", data=[model(name) for name in service.names]))

    @app.get("/v1/models/{name:path}", responses=REFUSALS | _documented(404), response_model=ServedModel, **LOCKED)
    async def one_model(name: str) -> Response:
        return json_response(model(service.names.resolve(name)))

    def model(found: ModelName) -> ServedModel:
        return ServedModel(
            id=found.name,
            object="model",
            created=started,
            owned_by="trimode",
            root=found.root,
            parent=None,
            max_model_len=service.context_length,
        )

    @app.get("/version", responses=REFUSALS, response_model=Version, **LOCKED)
    async def version() -> Response:
        return json_response(Version(version=__version__))

    @app.get(HEALTH, responses=_documented(503), response_model=Health)
    async def health() -> Response:
        if service.llm.failure is not None:
            return errors.respond(ApiError(ENGINE_DEAD, service.llm.failure), HEALTH)
        return json_response(Health(status="ok"))

    @app.get("/metrics", responses=REFUSALS | {200: METRICS}, **LOCKED)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def openapi() -> dict[str, Any]:
        """FastAPI documents its own 422 for every body; here a body that does not fit is 400."""
        if not app.openapi_schema:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes, servers=servers)
            app.openapi_schema["components"]["securitySchemes"] = KEY_SCHEME
            for path in app.openapi_schema["paths"].values():
                for operation in path.values():
                    _drop_validation_error(operation["responses"])
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _drop_validation_error(responses: dict[str, Any]) -> None:
    schema = responses.get("422", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if schema.get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]


def _add_page(app: FastAPI) -> None:
    folder = resources.files("trimode.runtime.openai_server")
    for path, (name, media_type) in PAGE_FILES.items():
        page = Response((folder / name).read_bytes(), headers=PAGE_HEADERS, media_type=media_type)
        app.add_route(path, _showing(page))


def _showing(page: Response) -> Callable[[Request], Awaitable[Response]]:
    async def show(_: Request) -> Response:
        return page

    return show


def _why_not_found(path: str) -> str:
    offered = (reason for beginning, reason in NOT_OFFERED.items() if path.startswith(beginning))
    return next(offered, "this path does not exist")


def _release(error: Exception) -> None:
    """The exception and its frames form a cycle that holds the body. Break it now: cyclic garbage collection triggers
    on the number of objects, not on bytes.
    """
    traceback.clear_frames(error.__traceback__)


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(TriModeError)
    async def refuse(http: Request, error: TriModeError) -> Response:
        return errors.respond(error, http.url.path)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(http: Request, error: RequestValidationError) -> Response:
        _release(error)
        return errors.respond(errors.of_validation(error.errors()), http.url.path)

    @app.exception_handler(HTTPException)
    async def refuse_http(http: Request, error: HTTPException) -> Response:
        _release(error)
        # FastAPI raises this from any error while it reads a body, the gate's among them.
        if isinstance(error.__cause__, ApiError):
            return errors.respond(error.__cause__, http.url.path)
        kind, message = {
            404: (NOT_FOUND, _why_not_found(http.url.path)),
            405: (BAD_METHOD, "this path does not support the method"),
        }.get(error.status_code, (BAD_REQUEST, "the body cannot be read as JSON in UTF-8"))
        response = errors.respond(ApiError(kind, message), http.url.path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RecursionError)
    async def refuse_nesting(http: Request, error: RecursionError) -> Response:
        """Only data of a request is nested."""
        _release(error)
        return errors.respond(ApiError(BAD_REQUEST, "the body is nested too deeply"), http.url.path)

    @app.exception_handler(ClientLeftError)
    async def client_left(_: Request, _error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(Exception)
    async def fail(http: Request, error: Exception) -> Response:
        return errors.respond(error, http.url.path)
