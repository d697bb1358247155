"""Where a text ends (end tokens, stop strings, the length limit), and which tokens the thinking budget forces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trimode.runtime.decoding.text_stream import TextStream
from trimode.runtime.decoding.thinking_budget import ThinkingBudget
from trimode.runtime.request.outputs import FinishReason
from trimode.runtime.request.sampling_params import SamplingParams


class Forced(NamedTuple):
    """A token that the thinking budget forces. place: its index among the next tokens."""

    place: int
    token: int


class Ending:
    """Receives a sequence's tokens one by one, as they are emitted, and reports when the text has ended.

    end_ids: the model's end tokens. stop_tokens: stop strings that are one token, by its id. text: the decoded text, if
    the request has other stop strings; it is fed with every token, so that the token that completes a stop string ends
    the text. budget: the request's thinking budget.

    finish_reason, stop_reason: why the text ended; None while it continues. remaining: tokens that may still be
    emitted. end_ids: tokens that always end the text. depends_on_text: whether other tokens before them decide as well
    whether the text ends or what comes next. hides_last: whether the last token is a stop token that is not part of the
    text.
    """

    def __init__(
        self,
        params: SamplingParams,
        end_ids: frozenset[int],
        stop_tokens: Mapping[int, str] | None = None,
        text: TextStream | None = None,
        budget: ThinkingBudget | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        if params.max_tokens is None:
            raise ValueError("max_tokens is open; SamplingParams.with_defaults sets it")
        self.remaining = params.max_tokens
        self.hides_last = False
        self._stops: dict[int, int | str] = {token: token for token in params.stop_token_ids or ()}
        self._stops |= stop_tokens or {}
        self.end_ids = frozenset(self._stops) | (frozenset() if params.ignore_eos else end_ids)
        self._hides_stops = not params.include_stop_str_in_output
        self._text = text
        self._budget = budget
        self.depends_on_text = text is not None or budget is not None

    @property
    def feeds_text(self) -> bool:
        """Whether :meth:`take` feeds the text."""
        return self._text is not None

    @property
    def forced(self) -> int | None:
        """The token that must come next, regardless of the model's prediction."""
        return self._budget.ids.end if self._budget is not None and self._budget.spent else None

    def forced_among(self, tokens: list[int]) -> list[Forced]:
        """The tokens that the budget forces if ``tokens`` come next."""
        if self._budget is None:
            return []
        return [Forced(place, self._budget.ids.end) for place in self._budget.ends_among(tokens)]

    def take_all(self, tokens: list[int]) -> None:
        """Count emitted tokens. Only the last of them may end the text."""
        if self.depends_on_text:
            for token in tokens:
                self.take(token)
        else:
            self.remaining -= len(tokens) - 1
            self.take(tokens[-1])

    def take(self, token: int) -> None:
        """Count an emitted token; sets ``finish_reason`` if it ends the text."""
        self.remaining -= 1
        if self._budget is not None:
            self._budget.take(token)
        self.hides_last = token in self._stops and self._hides_stops
        if self._text is not None and not self.hides_last:
            self._text.feed([token])
        if token in self.end_ids:
            self.finish_reason, self.stop_reason = "stop", self._stops.get(token)
        elif self._text is not None and self._text.stop is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.stop
        elif self.remaining == 0:
            self.finish_reason = "length"
