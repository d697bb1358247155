"""Errors in OpenAI's shape, with an HTTP status for each kind.

| status | type | code | when | retry |
|---|---|---|---|---|
| 400 | invalid_request_error | | the body is not JSON, or a field, a value or a combination is not supported | no |
| 400 | invalid_request_error | context_length_exceeded | prompt and completion exceed the context | no |
| 401 | authentication_error | invalid_api_key | the API key is missing or wrong | no |
| 404 | invalid_request_error | model_not_found, not_found | | no |
| 405 | invalid_request_error | method_not_allowed | | no |
| 408 | timeout_error | body_timeout | the body did not arrive in time | yes |
| 413 | invalid_request_error | body_too_large | the body exceeds the limit in bytes | no |
| 421 | invalid_request_error | wrong_host | no API key is set, and ``Host`` is not a name of this machine | no |
| 422 | timeout_error | request_timeout | the response took longer than the limit; its slot is free again | no |
| 429 | rate_limit_error | queue_full | the queue is full; with Retry-After | yes |
| 500 | server_error | internal_error | a fault of the server; the reason is in its log only | no |
| 503 | server_error | shutting_down | the server is stopping; with Retry-After | yes |
| 503 | server_error | engine_dead | the scheduler has ended; the server exits, so that a supervisor restarts it | yes |

Clients of OpenAI's API repeat a request after 408, 409, 429 and every 5xx. A response that took too long would take too
long again and keep the engine busy, so it is 422. Every error also has the header ``x-should-retry``, which OpenAI's
clients obey: it stops them from repeating a request after a 500.

Under ``/v1/messages``, errors have Anthropic's shape and types, with the same statuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi.responses import Response

from trimode.common.errors import TriModeError
from trimode.runtime.openai_server.request_bodies import BRANCHES, TOO_MANY_FIELDS, UNSUPPORTED_FIELD
from trimode.runtime.openai_server.response_bodies import ErrorBody, ErrorDetail, MessagesError, MessagesErrorBody
from trimode.runtime.request.errors import (
    ContextLengthError,
    EngineDeadError,
    ForkedError,
    QueueFullError,
    ShutDownError,
)

# Characters of a field's path in a message: a name may be as long as a body.
LONGEST_PATH = 200
MESSAGES = "/v1/messages"
# Anthropic's types, by status.
_MESSAGES_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "timeout_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
# pydantic's findings about what is no JSON object.
_NO_OBJECT = frozenset({"dict_type", "model_type", "model_attributes_type"})


class ErrorKind(NamedTuple):
    """``retry``: whether the same request may succeed later."""

    status: int
    type: str
    code: str | None = None
    retry: bool = False


BAD_REQUEST = ErrorKind(400, "invalid_request_error")
UNAUTHORIZED = ErrorKind(401, "authentication_error", "invalid_api_key")
NO_MODEL = ErrorKind(404, "invalid_request_error", "model_not_found")
NOT_FOUND = ErrorKind(404, "invalid_request_error", "not_found")
BAD_METHOD = ErrorKind(405, "invalid_request_error", "method_not_allowed")
BODY_TIMEOUT = ErrorKind(408, "timeout_error", "body_timeout", retry=True)
BODY_TOO_LARGE = ErrorKind(413, "invalid_request_error", "body_too_large")
TOO_LONG = ErrorKind(400, "invalid_request_error", "context_length_exceeded")
WRONG_HOST = ErrorKind(421, "invalid_request_error", "wrong_host")
REQUEST_TIMEOUT = ErrorKind(422, "timeout_error", "request_timeout")
QUEUE_FULL = ErrorKind(429, "rate_limit_error", "queue_full", retry=True)
INTERNAL = ErrorKind(500, "server_error", "internal_error")
SHUTTING_DOWN = ErrorKind(503, "server_error", "shutting_down", retry=True)
ENGINE_DEAD = ErrorKind(503, "server_error", "engine_dead", retry=True)


class ApiError(TriModeError):
    """An error of the HTTP layer. ``param``: the field of the body."""

    def __init__(self, kind: ErrorKind, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.param = param


def error_body(error: Exception) -> ErrorBody:
    """The response to ``error``; an internal error does not show its reason."""
    kind = kind_of(error)
    message = str(error)
    if kind is INTERNAL:
        message = "internal error; the server's log has the reason"
    elif isinstance(error, ContextLengthError):
        message = f"{context_limit(error.context)}. However, {message}"
    param = error.param if isinstance(error, ApiError) else None
    return ErrorBody(error=ErrorDetail(message=message, type=kind.type, param=param, code=kind.code))


def messages_error(error: Exception) -> MessagesErrorBody:
    """As :func:`error_body`, in Anthropic's shape."""
    kind = _MESSAGES_TYPES.get(kind_of(error).status, "invalid_request_error")
    return MessagesErrorBody(type="error", error=MessagesError(type=kind, message=error_body(error).error.message))


def context_limit(tokens: int) -> str:
    """OpenAI's words, which clients match."""
    return f"This model's maximum context length is {tokens} tokens"


def respond(error: Exception, path: str) -> Response:
    """path: of the request; it decides the error's shape."""
    kind = kind_of(error)
    headers = {"x-should-retry": "true" if kind.retry else "false"}
    if kind in (QUEUE_FULL, SHUTTING_DOWN):
        headers["retry-after"] = "1"
    if kind is UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if kind in (BODY_TIMEOUT, BODY_TOO_LARGE):
        headers["connection"] = "close"  # the rest of the body stays unread
    body = messages_error(error) if path.startswith(MESSAGES) else error_body(error)
    return Response(body.json_text(), kind.status, headers=headers, media_type="application/json")


def kind_of(error: Exception) -> ErrorKind:
    match error:
        case ApiError():
            return error.kind
        case QueueFullError():
            return QUEUE_FULL
        case ContextLengthError():
            return TOO_LONG
        case EngineDeadError() | ForkedError():
            return ENGINE_DEAD
        case ShutDownError():
            return SHUTTING_DOWN
        case TriModeError():
            return BAD_REQUEST
        case _:
            return INTERNAL


def of_validation(found: Sequence[Any]) -> ApiError:
    """pydantic's findings in one line, without the input."""
    messages: dict[str, str] = {}
    for error in found:
        if error["type"] == "json_invalid":
            return ApiError(BAD_REQUEST, f"the body is not JSON (character {error['loc'][1]})")
        parts = [str(part) for part in error["loc"][1:] if not _is_branch(part)]
        if error["type"] == UNSUPPORTED_FIELD:
            parts.append(error["ctx"]["field"])
        path = ".".join(parts)[:LONGEST_PATH]
        message = "Input should be an object" if error["type"] in _NO_OBJECT else error["msg"]
        if not path:
            unread = "the body must be a JSON object, sent with content-type application/json"
            return ApiError(BAD_REQUEST, message if error["type"] == TOO_MANY_FIELDS else unread)
        messages.setdefault(path, message)
    listed = [f"{path}: {message}" for path, message in messages.items()]
    return ApiError(BAD_REQUEST, "; ".join(listed[:3]), next(iter(messages)))


def _is_branch(part: str | int) -> bool:
    """pydantic names the branches of a union in the paths of its findings."""
    return isinstance(part, str) and (part in BRANCHES or "[" in part)
