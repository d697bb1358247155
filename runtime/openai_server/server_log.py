"""The server's log on stderr, and its line for each request."""

from __future__ import annotations

import logging
from typing import Literal

_requests = logging.getLogger("trimode.request")

LogLevel = Literal["debug", "info", "warning", "error"]


def configure_log(level: LogLevel) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("trimode")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


def log_request(method: str, path: str, status: int, seconds: float, request_id: str) -> None:
    """At level info."""
    _requests.info("%s %s %d %.3f s, request %s", method, path, status, seconds, request_id)
