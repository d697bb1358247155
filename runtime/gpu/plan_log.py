"""Errors of TensorRT and TensorRT-RTX: their functions return None or False on failure, and log the reason."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


class LastErrorLog:
    """Keeps the last error message. A target derives its logger from this class and from the library's ``ILogger``.

    library: its name, for messages.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self.complaint = ""

    def keep(self, message: str, is_error: bool) -> None:
        if is_error:
            self.complaint = message.splitlines()[0] if message else ""
        logger.debug("%s: %s", self.library, message)

    def expect(self, result: Any, what: str) -> Any:
        """The result of a call. Raises RuntimeError with the library's message if it is None or False."""
        if result is None or result is False:
            raise RuntimeError(f"{self.library}: {what}: {self.complaint or 'no reason given'}")
        return result
