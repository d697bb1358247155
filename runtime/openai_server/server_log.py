"""The server's log on stderr."""

from __future__ import annotations

import logging
from typing import Literal

LogLevel = Literal["debug", "info", "warning", "error"]


def configure_log(level: LogLevel) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("trimode")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
