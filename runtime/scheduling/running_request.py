"""One answer in the scheduler: its sequence, its text, and the listener that receives its updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.decoding.text_stream import TextStream
from trimode.runtime.request.outputs import Counts, FinishReason, Update

Listener = Callable[[Update], None]


class Request:
    """``listener`` is called on the scheduler's thread.

    request_id: of the prompt; log lines name it. index: of this answer among the prompt's answers. update_seconds: the
    least time between two updates, not counting the last one, which is sent at once; None sends only the last one.
    siblings: other answers to the same prompt, which wait until its KV rows can be reused. failure: the exception that
    ended this request.
    """

    def __init__(
        self,
        sequence: Sequence,
        text: TextStream,
        listener: Listener,
        *,
        request_id: int,
        index: int,
        update_seconds: float | None,
    ) -> None:
        self.sequence = sequence
        self.request_id = request_id
        self.index = index
        self.siblings: list[Request] = []
        self.aborted = False
        self.failure: Exception | None = None
        self._text = text
        self._text_is_fed = sequence.ending.feeds_text  # token by token
        self._listener = listener
        self._update_seconds = update_seconds
        self._arrived = time.perf_counter()
        self._admitted_at: float | None = None
        self._first_token_at: float | None = None
        self._sent = 0  # tokens
        self._sent_at = -math.inf
        self._prompt_logprobs_sent = False
        self._rejected: list[int] = []  # drafts, since the last update
        self._sent_cycles = 0

    def admit(self) -> None:
        """The request has a slot."""
        self._admitted_at = time.perf_counter()

    def deliver(self) -> None:
        """Send what is new, if an update is due."""
        sequence = self.sequence
        new = len(sequence.emitted) > self._sent
        if new and self._first_token_at is None:
            self._first_token_at = time.perf_counter()
        self._rejected += sequence.rejected
        finish_reason = sequence.ending.finish_reason
        if finish_reason is not None:
            self._finish(finish_reason, sequence.ending.stop_reason)
        elif new and self._update_seconds is not None:
            now = time.perf_counter()
            if now - self._sent_at >= self._update_seconds:
                self._sent_at = now
                self._feed(sequence.emitted[self._sent :])
                self._send(self._text.new_text())

    def cancel(self) -> None:
        """Send the last update of an aborted request."""
        self._finish("cancelled", None)

    def fail(self, error: Exception) -> None:
        """Send ``error`` as the last update."""
        self._listener(Update(index=self.index, error=error))

    def _finish(self, finish_reason: FinishReason, stop_reason: int | str | None) -> None:
        shown = len(self.sequence.emitted) - self.sequence.ending.hides_last
        self._feed(self.sequence.emitted[self._sent : shown])
        text = self._text.finish()
        now = time.perf_counter()
        self._send(
            text,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            time_to_slot=self._since_arrival(self._admitted_at),
            time_to_first_token=self._since_arrival(self._first_token_at),
            seconds=now - self._arrived,
        )

    def _since_arrival(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self._arrived

    def _feed(self, tokens: list[int]) -> None:
        if not self._text_is_fed:
            self._text.feed(tokens)

    def _send(self, text: str, **ending: object) -> None:
        sequence, begin = self.sequence, self._sent
        self._sent = len(sequence.emitted)
        begin_cycle, self._sent_cycles = self._sent_cycles, len(sequence.cycles)
        rejected, self._rejected = self._rejected, []
        prompt_logprobs = None if self._prompt_logprobs_sent or sequence.prefilling else sequence.prompt_logprobs
        self._prompt_logprobs_sent = self._prompt_logprobs_sent or prompt_logprobs is not None
        self._listener(
            Update(
                index=self.index,
                text=text,
                token_ids=sequence.emitted[begin:],
                logprobs=sequence.logprobs[begin:],
                origins=sequence.origins[begin:],
                rejected=rejected,
                cycles=sequence.cycles[begin_cycle:],
                counts=Counts(**vars(sequence.counts)),
                prompt_logprobs=prompt_logprobs,
                **ending,  # type: ignore[arg-type]
            )
        )
