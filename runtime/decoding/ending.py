"""Where a text ends: end tokens, stop strings, the length limit; and the one token that a request can force."""

from __future__ import annotations

from collections.abc import Mapping

from trimode.runtime.decoding.text_stream import TextStream
from trimode.runtime.decoding.thinking_budget import ThinkingBudget
from trimode.runtime.request.outputs import FinishReason
from trimode.runtime.request.sampling_params import SamplingParams


class Ending:
    """Takes a sequence's tokens one by one, as they are emitted.

    end_ids: the model's end tokens. stop_tokens: stop strings that are one token, by its id. text: hears every token,
    so that any other stop string ends the text with the token that completes it. budget: of thinking, if the request
    has one. hides_last: whether the last token, a stop token, is no part of the text.
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
        self.remaining = params.max_tokens  # tokens that may still come
        self.hides_last = False
        self._stops: dict[int, int | str] = {token: token for token in params.stop_token_ids or ()}
        self._stops |= stop_tokens or {}
        self._end_ids = frozenset(self._stops) | (frozenset() if params.ignore_eos else end_ids)
        self._hides_stops = not params.include_stop_str_in_output
        self._text = text
        self._budget = budget

    @property
    def feeds_text(self) -> bool:
        """Whether :meth:`take` feeds the text."""
        return self._text is not None

    @property
    def forced(self) -> int | None:
        """The token that must come next, whatever the model says."""
        return self._budget.ids.end if self._budget is not None and self._budget.spent else None

    def ends_with(self, token: int) -> bool:
        """Whether the text ends with this token, wherever it comes."""
        return token in self._end_ids

    def take(self, token: int) -> None:
        """``token`` was emitted; sets ``finish_reason`` if that ends the text."""
        self.remaining -= 1
        if self._budget is not None:
            self._budget.take(token)
        self.hides_last = token in self._stops and self._hides_stops
        if self._text is not None and not self.hides_last:
            self._text.feed([token])
        if token in self._end_ids:
            self.finish_reason, self.stop_reason = "stop", self._stops.get(token)
        elif self._text is not None and self._text.stop is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.stop
        elif self.remaining == 0:
            self.finish_reason = "length"
