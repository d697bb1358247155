"""Refusals and failures that a caller may handle differently: a server answers each with its own status."""

from __future__ import annotations

from trimode.common.errors import TriModeError


class QueueFullError(TriModeError):
    """More requests wait than the queue may hold; try again later."""


class ContextLengthError(TriModeError):
    """Prompt and answer exceed the context.

    context: the most tokens of a prompt and its answer. prompt_tokens: of this prompt, None if it was not tokenised.
    max_tokens: that were requested, None if the request left them open. fits: the largest max_tokens for this prompt.
    """

    def __init__(
        self, message: str, *, context: int, prompt_tokens: int | None = None, max_tokens: int | None = None
    ) -> None:
        super().__init__(message)
        self.context = context
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.fits = None if prompt_tokens is None else max(0, context - prompt_tokens)


class GrammarError(TriModeError):
    """A grammar, a schema or another constraint of an answer cannot be used; the request is wrong."""


class ShutDownError(TriModeError):
    """The engine was shut down before the request was finished."""


class EngineDeadError(ShutDownError):
    """The scheduler's thread ended by an error; the engine must be loaded again."""


class ForkedError(TriModeError):
    """The engine was loaded before a fork, and its threads exist in the parent process only."""
