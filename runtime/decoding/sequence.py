"""Decoding: one loop, three policies.

Every cycle drafts zero or more bidirectional passes until its block is full, then commits it with one causal pass:

| mode | block | bidirectional passes | commit accepts |
|---|---|---|---|
| ``ar`` | 1 | 0 | the token |
| ``linear_spec`` | b | 1 draft, or until filled with a draft threshold | the longest matching run, and one more token |
| ``diffusion`` | b, the last block too | denoise until filled | the whole block, and one more token |
| ``auto`` | chosen each cycle | as ``linear_spec``, or ``ar`` with a block of one | as ``linear_spec`` |

AR is speculation with a block of one. A :class:`Sequence` is one answer's state: it states which pass it needs next and
absorbs the result, so sequences of all modes can share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decoding.acceptance import Acceptance
from trimode.runtime.decoding.denoising import settled
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sampling import Sampler
from trimode.runtime.executor import Candidates, Ints
from trimode.runtime.request.outputs import Counts, Logprob, Origin
from trimode.runtime.request.sampling_params import SamplingParams

PassKind = Literal["prefill", "draft", "denoise", "commit"]
NO_BLOCK = np.empty(0, np.int64)


class Pass(NamedTuple):
    """A pass that a sequence needs: its input tokens, and the rows of them that need logits."""

    kind: PassKind
    tokens: Ints  # [S]
    rows: Ints  # [R]


class Sequence:
    """One answer: its tokens, the number of them committed to the KV pool, and the current block.

    The *pending token* is the newest emitted token. Its KV row is not committed yet; it is the first token of the next
    block.

    context: KV rows that the engine's context has. mask_id: the model's mask token. prefill_step: most tokens of a
    prefill pass. seed: of the random generator. acceptance: running estimate of this sequence's acceptance rate.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        ending: Ending,
        acceptance: Acceptance,
        *,
        context: int,
        mask_id: int,
        prefill_step: int,
        seed: int,
    ) -> None:
        self.prompt = np.array(prompt, np.int64)
        self.params = params
        self.ending = ending
        self.acceptance = acceptance
        self.committed = 0
        self.emitted: list[int] = []
        self.origins: list[Origin] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.rejected: list[int] = []  # drafts that the latest commit rejected
        self.counts = Counts()
        self._sampler = Sampler(params, self.prompt, seed)
        self._context = context
        self._mask_id = mask_id
        self._prefill_step = prefill_step
        self._block = NO_BLOCK
        self._masks = 0  # places of the block that are not settled
        # Of the block, in diffusion:
        self._masks_at_first = 0
        self._denoise_passes = 0
        self._forced_places: set[int] = set()
        self._block_logprobs: dict[int, dict[int, Logprob]] = {}  # by place

    @property
    def tokens(self) -> list[int]:
        """The prompt and the emitted tokens."""
        return [*self.prompt.tolist(), *self.emitted]

    @property
    def pending_token(self) -> int:
        return self.emitted[-1]

    @property
    def prefilling(self) -> bool:
        return self.committed < len(self.prompt)

    @property
    def fills_block(self) -> bool:
        """Whether the next pass is bidirectional."""
        return not self.prefilling and self._masks > 0

    @property
    def needs_block(self) -> bool:
        return not self.prefilling and not len(self._block)

    @property
    def drafts_in_passes(self) -> bool:
        """Whether filling a block may take more than one bidirectional pass."""
        return self.params.mode == "diffusion" or bool(self.params.draft_threshold)

    @property
    def longest_block(self) -> int:
        """Tokens of the longest block that may come next.

        Speculation does not draft past the length limit. Diffusion denoises whole blocks as long as the context has
        room, and cuts the text at the length limit, so its tokens do not depend on the limit.
        """
        if self.params.mode == "diffusion":
            return min(self.params.longest_block, self._context - self.committed)
        return min(self.params.longest_block, self.ending.remaining)

    @property
    def kv_rows(self) -> int:
        """Most KV rows that the prompt and the answer take."""
        return min(self.params.kv_rows(len(self.prompt)), self._context)

    def open_block(self, length: int) -> None:
        """Start the next block: the pending token and ``length`` - 1 masks; ``length`` is at most ``longest_block``."""
        self._block = np.full(length, self._mask_id, np.int64)
        self._block[0] = self.pending_token
        self._masks = length - 1
        self.rejected = []
        if self.params.mode == "diffusion":
            self._forced_places = set()
            self._place_end_of_thinking()
            self._masks_at_first = self._masks
            self._denoise_passes = 0
            self._block_logprobs = {}

    def next_pass(self) -> Pass:
        """The next pass of a sequence that is in its prefill or has a block."""
        if self.prefilling:
            chunk = self.prompt[self.committed : self.committed + self._prefill_step]
            return Pass("prefill", chunk, np.array([len(chunk) - 1]))
        diffusion = self.params.mode == "diffusion"
        if self._masks:
            masked = np.flatnonzero(self._block == self._mask_id)
            return Pass("denoise" if diffusion else "draft", self._block, masked)
        rows = np.array([len(self._block) - 1]) if diffusion else np.arange(len(self._block))
        return Pass("commit", self._block, rows)

    def absorb(self, done: Pass, found: Candidates) -> None:
        """Process a pass's candidates: logits, tokens [R, k] and log_sum_exp [R] of its rows."""
        setattr(self.counts, done.kind, getattr(self.counts, done.kind) + 1)
        if done.kind == "prefill":
            self.committed += len(done.tokens)
            if not self.prefilling:
                self._emit_run(found, [self.committed], "prefill")
        elif done.kind == "draft":
            self._draft(done, found)
        elif done.kind == "denoise":
            self._denoise(done, found)
        elif self.params.mode == "diffusion":
            self._commit_diffusion(found)
        else:
            self._commit(found)

    def _draft(self, done: Pass, found: Candidates) -> None:
        """Fill masks with the most likely tokens, at any temperature: they are the most likely to be accepted."""
        threshold = self.params.draft_threshold
        if not threshold:
            self._settle(done.rows, found.tokens[:, 0])
            return
        confidence = np.exp(found.logits[:, 0] - found.log_sum_exp)
        sure = confidence >= threshold
        sure[confidence.argmax()] = True
        self._settle(done.rows[sure], found.tokens[sure, 0])

    def _denoise(self, done: Pass, found: Candidates) -> None:
        """Settle masked positions of the block by confidence, the probability of the token chosen for them."""
        positions = (self.committed + done.rows).tolist()
        tokens = self._sampler.rows(found.logits, found.tokens, positions, draw=self._denoise_passes + 1)
        confidence = np.exp(found.logits[found.tokens == tokens[:, None]] - found.log_sum_exp)
        sure = settled(confidence, self.params, self._masks_at_first, self._denoise_passes)
        self._denoise_passes += 1
        self._settle(done.rows[sure], tokens[sure])
        if self.params.logprobs is not None:
            for row in np.flatnonzero(sure):
                self._block_logprobs[int(done.rows[row])] = self._logprobs(found, row, int(tokens[row]))
        self._place_end_of_thinking()
        if self._text_ends_in_block():
            self.counts.cycles += 1
            self._emit_denoised()
            self._block, self._masks = NO_BLOCK, 0

    def _place_end_of_thinking(self) -> None:
        """Put the end of thinking where the budget runs out, so that the next passes attend to it.

        NVIDIA's code does so when it opens the block. Here each pass repeats it, since the block may open ``<think>``.
        """
        forced = self.ending.forced_among(self._block[1:].tolist())
        if forced is not None:
            place = forced.place + 1
            self._masks -= int(self._block[place] == self._mask_id)
            self._block[place] = forced.token
            self._forced_places.add(place)

    def _settle(self, places: Ints, tokens: Ints) -> None:
        self._block[places] = tokens
        self._masks -= len(places)

    def _commit(self, found: Candidates) -> None:
        """Accept the longest run of drafts that equal the causal rows' tokens, and one more token."""
        drafts, before = self._block[1:].tolist(), len(self.emitted)
        positions = range(self.committed + 1, self.committed + 1 + len(self._block))
        agreed = self._emit_run(found, positions, "bonus", drafts)
        self.committed += len(self.emitted) - before
        tested = len(drafts) if agreed == len(drafts) else agreed + (self.ending.finish_reason is None)
        if drafts:
            self.acceptance.observe(agreed, tested, ended=self.ending.finish_reason == "stop")
        self.rejected = drafts[agreed:] if tested > agreed else []
        self.counts.cycles += 1
        self.counts.drafted += len(drafts)
        self.counts.accepted += agreed
        self._block = NO_BLOCK

    def _commit_diffusion(self, found: Candidates) -> None:
        """Accept the whole block, and one more token."""
        before = len(self.emitted)
        self._emit_denoised()
        if self.ending.finish_reason is None:
            self._emit_run(found, [self.committed + len(self._block)], "bonus")
        self.committed += len(self.emitted) - before
        self.counts.cycles += 1
        self._block = NO_BLOCK

    def _emit_run(self, found: Candidates, positions: Many[int], origin: Origin, drafts: Many[int] = ()) -> int:
        """Emit the tokens of causal rows, for these absolute positions, as long as each equals its draft; returns the
        number of equal ones.
        """
        agreed = 0
        for row, drawn in enumerate(self._sampler.run(found.logits, found.tokens, positions)):
            forced = self.ending.forced
            token = drawn if forced is None else forced
            if self.params.logprobs is not None:
                self.logprobs.append(self._logprobs(found, row, token))
            agrees = row < len(drafts) and token == drafts[row]
            agreed += agrees
            goes_on = self._emit(token, "forced" if forced is not None else "accepted" if agrees else origin)
            if not (agrees and goes_on):
                break
        return agreed

    def _emit_denoised(self) -> None:
        """Emit the block behind its pending token, up to the end of the text."""
        for place, token in enumerate(self._block[1:].tolist(), start=1):
            if self.params.logprobs is not None:
                self.logprobs.append(self._block_logprobs[place])
            if not self._emit(token, "forced" if place in self._forced_places else "denoised"):
                return

    def _emit(self, token: int, origin: Origin) -> bool:
        """Append a token; returns whether another may follow."""
        self.emitted.append(token)
        self.origins.append(origin)
        self._sampler.note(token)
        self.ending.take(token)
        return self.ending.finish_reason is None

    def _text_ends_in_block(self) -> bool:
        """Whether the text ends in the block with no mask before its end, so that the rest is not needed."""
        text = self._block[1 : 1 + self.ending.remaining].tolist()
        for token in text:
            if token == self._mask_id:
                return False
            if self.ending.ends_with(token):
                return True
        return len(text) == self.ending.remaining

    def _logprobs(self, found: Candidates, row: np.intp | int, token: int) -> dict[int, Logprob]:
        """The token's own log-probability, then those of the requested number of most likely tokens."""
        tokens = found.tokens[row].tolist()
        values: NDArray[np.float32] = found.logits[row] - found.log_sum_exp[row]
        ranks = [tokens.index(token), *range(self.params.logprobs or 0)]
        return {tokens[rank]: Logprob(float(values[rank]), rank + 1) for rank in ranks}
