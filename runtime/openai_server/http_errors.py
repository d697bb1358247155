"""Every refusal and failure in OpenAI's shape, with its status.

| status | type | code | when |
|---|---|---|---|
| 400 | invalid_request_error | | a body that is no JSON, a field, a value or a combination that cannot be honoured |
| 401 | authentication_error | invalid_api_key | no key, or a wrong one |
| 404 | invalid_request_error | model_not_found, not_found | |
| 405 | invalid_request_error | method_not_allowed | |
| 408 | timeout_error | body_timeout | the body did not come in time |
| 413 | invalid_request_error | context_length_exceeded, body_too_large | |
| 421 | invalid_request_error | wrong_host | a server without a key, on the loopback interface, under another name |
| 429 | rate_limit_error | queue_full | with Retry-After |
| 500 | server_error | internal_error | a fault of ours; the reason is in the server's log alone |
| 503 | server_error | shutting_down | with Retry-After |
| 504 | timeout_error | request_timeout | the answer did not come in time; its slot is free again |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi.responses import Response

from trimode.common.errors import TriModeError
from trimode.runtime.openai_server.schema import LACKING, TOO_MANY_FIELDS, ErrorAnswer, ErrorDetail
from trimode.runtime.request.errors import ContextLengthError, QueueFullError, ShutDownError

RETRY_AFTER = {"retry-after": "1"}
# Characters of a field's path that are told: a name may be as long as a body.
LONGEST_PATH = 200


class Kind(NamedTuple):
    status: int
    type: str
    code: str | None = None


BAD_REQUEST = Kind(400, "invalid_request_error")
UNAUTHORIZED = Kind(401, "authentication_error", "invalid_api_key")
NO_MODEL = Kind(404, "invalid_request_error", "model_not_found")
NOT_FOUND = Kind(404, "invalid_request_error", "not_found")
BAD_METHOD = Kind(405, "invalid_request_error", "method_not_allowed")
BODY_TIMEOUT = Kind(408, "timeout_error", "body_timeout")
BODY_TOO_LARGE = Kind(413, "invalid_request_error", "body_too_large")
TOO_LONG = Kind(413, "invalid_request_error", "context_length_exceeded")
WRONG_HOST = Kind(421, "invalid_request_error", "wrong_host")
QUEUE_FULL = Kind(429, "rate_limit_error", "queue_full")
INTERNAL = Kind(500, "server_error", "internal_error")
SHUTTING_DOWN = Kind(503, "server_error", "shutting_down")
REQUEST_TIMEOUT = Kind(504, "timeout_error", "request_timeout")


class ApiError(TriModeError):
    """A refusal that is the server's own; ``param`` names the field of the body."""

    def __init__(self, kind: Kind, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.param = param


def answer(error: Exception) -> ErrorAnswer:
    """What the client is told; of a fault of ours, only that it is one."""
    kind = kind_of(error)
    message = "internal error; the server's log has the reason" if kind is INTERNAL else str(error)
    param = error.param if isinstance(error, ApiError) else None
    return ErrorAnswer(error=ErrorDetail(message=message, type=kind.type, param=param, code=kind.code))


def respond(error: Exception) -> Response:
    kind = kind_of(error)
    headers = RETRY_AFTER if kind in (QUEUE_FULL, SHUTTING_DOWN) else {}
    if kind is UNAUTHORIZED:
        headers = {"www-authenticate": "Bearer"}
    if kind in (BODY_TIMEOUT, BODY_TOO_LARGE):
        headers = {"connection": "close"}  # the rest of the body stays unread
    return Response(answer(error).json_text(), kind.status, headers=headers, media_type="application/json")


def kind_of(error: Exception) -> Kind:
    match error:
        case ApiError():
            return error.kind
        case QueueFullError():
            return QUEUE_FULL
        case ContextLengthError():
            return TOO_LONG
        case ShutDownError():
            return SHUTTING_DOWN
        case TriModeError():
            return BAD_REQUEST
        case _:
            return INTERNAL


def of_validation(found: Sequence[Any]) -> ApiError:
    """pydantic's findings in one line; the input itself is not repeated."""
    told: dict[str, str] = {}
    for error in found:
        if error["type"] == "json_invalid":
            return ApiError(BAD_REQUEST, f"the body is not JSON (character {error['loc'][1]})")
        path = ".".join(str(part) for part in error["loc"][1:] if not _is_branch(part))[:LONGEST_PATH]
        message = error["msg"]
        if not path:
            unread = "the body must be a JSON object, sent with content-type application/json"
            return ApiError(BAD_REQUEST, message if error["type"] == TOO_MANY_FIELDS else unread)
        told.setdefault(path, next((LACKING[part] for part in error["loc"] if part in LACKING), message))
    listed = [f"{path}: {message}" for path, message in told.items()]
    return ApiError(BAD_REQUEST, "; ".join(listed[:3]), next(iter(told)))


def _is_branch(part: str | int) -> bool:
    """pydantic names the alternatives of a union in the paths of what it finds."""
    return isinstance(part, str) and (part == "str" or "[" in part)
