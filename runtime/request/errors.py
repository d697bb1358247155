"""Refusals that a caller may want to tell apart: a server answers each with its own status."""

from __future__ import annotations

from trimode.common.errors import TriModeError


class QueueFullError(TriModeError):
    """More requests wait than the queue may hold; try again later."""


class ContextLengthError(TriModeError):
    """Prompt and answer would exceed the engine's capacity."""


class ShutDownError(TriModeError):
    """The engine was shut down before the request was finished."""
