"""Decoding: one loop, three policies.

Every cycle drafts zero or more bidirectional passes until its block is full, then commits it with one causal pass:

| mode | block | draft passes | commit accepts |
|---|---|---|---|
| ``ar`` | 1 | 0 | the token |
| ``linear_spec`` | b | 1, or until filled with a draft threshold | the longest matching run, and one more token |
| ``diffusion`` | b | until filled | the whole block, and one more token |

So AR is speculation with a block of one. A :class:`Sequence` is one request's state: it says which pass it needs next
and absorbs what the pass found, so that sequences of all modes can share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from trimode.model.config import ModelConfig
from trimode.model.errors import TriModeError
from trimode.runtime.executor import Candidates, Ints
from trimode.runtime.sampling import choose, uniform

Mode = Literal["ar", "diffusion", "linear_spec"]
PassKind = Literal["prefill", "draft", "commit"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class DecodingOptions:
    """How one request decodes.

    block_length: tokens of a block, seed included. threshold: diffusion settles every position at least this probable,
    and the best one always. draft_threshold: the same for self-speculation's drafts; 0 settles all in one pass.
    adapter: use the draft adapter in self-speculation. Raises TriModeError for a value that makes no sense.
    """

    mode: Mode = "linear_spec"
    block_length: int = 32
    threshold: float = 0.9
    draft_threshold: float = 0.0
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    adapter: bool = True

    def __post_init__(self) -> None:
        def require(holds: bool, field: str, rule: str) -> None:
            if not holds:
                raise TriModeError(f"{field} is {getattr(self, field)}; it must be {rule}")

        require(self.mode in get_args(Mode), "mode", "one of " + ", ".join(get_args(Mode)))
        require(self.block_length >= 1, "block_length", "at least 1")
        require(0 <= self.threshold <= 1, "threshold", "between 0 and 1")
        require(0 <= self.draft_threshold <= 1, "draft_threshold", "between 0 and 1")
        require(self.max_tokens >= 1, "max_tokens", "at least 1")
        require(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or a positive number")
        require(0 <= self.seed < 2**64, "seed", "between 0 and 2**64 - 1")


class Pass(NamedTuple):
    """What a sequence needs next: these tokens through an engine, and logits of these of its rows."""

    kind: PassKind
    tokens: Ints  # [S]
    rows: Ints  # [R]


@dataclass
class PassCounts:
    """Forward passes by kind; a prefill longer than a chunk counts each chunk."""

    prefill: int = 0
    draft: int = 0
    commit: int = 0


class Sequence:
    """One request: its tokens, how many of them are committed to the KV pool, and the block under work.

    The *seed* is the newest emitted token: known, but its KV row is not yet committed. It is its block's first token.
    """

    def __init__(self, prompt: list[int], options: DecodingOptions, model: ModelConfig, prefill_step: int) -> None:
        if not prompt:
            raise TriModeError("the prompt is empty; give at least one token")
        self.options = options
        self.committed = 0
        self.emitted: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.passes = PassCounts()
        self.cycles = 0  # blocks brought to their end
        self._prompt = np.array(prompt, np.int64)
        self._end_ids = frozenset(model.eos_token_id)
        self._mask_id = model.mask_token_id
        self._prefill_step = prefill_step
        self._block = np.empty(0, np.int64)
        self._draft_passes_of_block = 0

    @property
    def uses_adapter(self) -> bool:
        return self.options.mode == "linear_spec" and self.options.adapter

    def next_pass(self) -> Pass:
        """The pass that brings the sequence on; only while ``finish_reason`` is None."""
        if self.committed < len(self._prompt):
            chunk = self._prompt[self.committed : self.committed + self._prefill_step]
            return Pass("prefill", chunk, np.array([len(chunk) - 1]))
        masked = np.flatnonzero(self._block == self._mask_id)
        if len(masked):
            return Pass("draft", self._block, masked)
        if self.options.mode == "diffusion":
            return Pass("commit", self._block, np.array([len(self._block) - 1]))
        return Pass("commit", self._block, np.arange(len(self._block)))

    def absorb(self, done: Pass, found: Candidates) -> list[int]:
        """Take a pass's candidates, [1, R, k]; returns the tokens that it lets the sequence emit."""
        setattr(self.passes, done.kind, getattr(self.passes, done.kind) + 1)
        if done.kind == "draft":
            return self._fill(done, found)
        if done.kind == "prefill":
            self.committed += len(done.tokens)
            if self.committed < len(self._prompt):
                return []
            return self._emit(self._drawn(found, [self.committed]).tolist())
        return self._commit(done, found)

    def _fill(self, done: Pass, found: Candidates) -> list[int]:
        """Settle masked positions of the block by confidence, the probability of the token chosen for them."""
        options = self.options
        self._draft_passes_of_block += 1
        if options.mode == "diffusion":
            threshold = options.threshold
            positions = [self.committed + int(row) for row in done.rows]
            tokens = self._drawn(found, positions, draw=self._draft_passes_of_block)
        else:
            threshold = options.draft_threshold
            tokens = found.tokens[0, :, 0]  # the likeliest is the likeliest to be accepted, at any temperature
        logits = found.logits[0][found.tokens[0] == tokens[:, None]]
        confidence = np.exp(logits - found.log_sum_exp[0])
        settled = confidence >= threshold
        settled[confidence.argmax()] = True
        self._block[done.rows[settled]] = tokens[settled]
        if options.mode == "diffusion" and self._ends_before_a_mask():
            self.cycles += 1
            return self._emit(self._block[1:].tolist())
        return []

    def _commit(self, done: Pass, found: Candidates) -> list[int]:
        """Accept the block, or its longest run that the causal rows agree with, and the token that follows."""
        block = self._block
        tokens = self._drawn(found, [self.committed + int(row) + 1 for row in done.rows])
        if self.options.mode == "diffusion":
            new = [*block[1:].tolist(), int(tokens[-1])]
        else:
            differing = np.flatnonzero(tokens[:-1] != block[1:])
            new = tokens[: int(differing[0]) + 1 if len(differing) else len(block)].tolist()
        self.committed += len(new)
        self.cycles += 1
        return self._emit(new)

    def _drawn(self, found: Candidates, positions: list[int], draw: int = 0) -> Ints:
        """A token a row, for these absolute positions."""
        options = self.options
        numbers = [uniform(options.seed, position, draw) for position in positions] if options.temperature else []
        return choose(found.logits[0], found.tokens[0], options.temperature, numbers)

    def _emit(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the first end token or the length limit, and lay out the next block."""
        new: list[int] = []
        for token in tokens:
            new.append(token)
            if token in self._end_ids:
                self.finish_reason = "stop"
                break
            if len(self.emitted) + len(new) == self.options.max_tokens:
                self.finish_reason = "length"
                break
        self.emitted += new
        if self.finish_reason is None:
            length = 1 if self.options.mode == "ar" else self.options.block_length
            remaining = self.options.max_tokens - len(self.emitted)
            self._block = np.full(min(length, remaining), self._mask_id, np.int64)
            self._block[0] = new[-1]
            self._draft_passes_of_block = 0
        return new

    def _ends_before_a_mask(self) -> bool:
        """Whether an end token stands in the block, past its seed, with no mask before it."""
        for token in self._block[1:]:
            if token == self._mask_id:
                return False
            if token in self._end_ids:
                return True
        return False
