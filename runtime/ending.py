"""Where a text ends: end tokens, stop strings, the length limit; and the one token that a request can force."""

from __future__ import annotations

from trimode.runtime.outputs import FinishReason
from trimode.runtime.sampling_params import SamplingParams
from trimode.runtime.text_stream import TextStream
from trimode.runtime.thinking_budget import ThinkingBudget


class Ending:
    """Takes a sequence's tokens one by one, as they are emitted.

    end_ids: the model's end tokens. text: hears every token, so that a stop string ends the text with the token that
    completes it. budget: of thinking, if the request has one.
    """

    def __init__(
        self,
        params: SamplingParams,
        end_ids: frozenset[int],
        text: TextStream | None = None,
        budget: ThinkingBudget | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.remaining = params.max_tokens  # tokens that may still come
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._end_ids = self._stop_ids if params.ignore_eos else end_ids | self._stop_ids
        self._text = text
        self._budget = budget

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
        if self._text is not None:
            self._text.feed([token])
        if token in self._end_ids:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self._stop_ids else None
        elif self._text is not None and self._text.stop is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.stop
        elif self.remaining == 0:
            self.finish_reason = "length"
