"""The records of a request's results: TensorRT-LLM's field names, and the counts of its passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled"]
# The source of a token: the prefill's last row; an accepted draft; the causal row's own token after the drafts; a
# denoise pass of a diffusion block; the thinking budget, or a grammar that allows no other token.
Origin = Literal["prefill", "accepted", "bonus", "denoised", "forced"]
# The source of a cycle's drafts: no drafts; a draft pass, verified as a chain or as a tree; prompt lookup; what the
# last commit predicted after the draft that it rejected; a grammar alone, or an answer that another process began.
Drafting = Literal["none", "draft", "tree", "copy", "kept", "forced"]


# Of each token of the prompt, its own log-probability first, then those of the likeliest. None for the first token.
PromptLogprobs = list["dict[int, Logprob] | None"]


class Logprob(NamedTuple):
    """logprob: natural log of the model's probability. rank: 1 for the likeliest token of the row; None for a token
    that is not among the candidates that the engine returns.
    """

    logprob: float
    rank: int | None


class Choice(NamedTuple):
    """What ``auto`` compared when it chose how a cycle drafts.

    block: the block length that it chose. trial: whether it did so to measure the passes, and not because it expects
    them to be the fastest. rates: expected tokens per second of the whole batch by block length, each with its fastest
    way to draft.
    """

    block: int
    trial: bool
    rates: dict[int, float]


class DraftRecord(NamedTuple):
    """The drafts of a cycle, recorded if the request sets ``record_drafts``.

    tokens: that the commit pass verified, pending token first. parents: of each token of a tree, -1 for the first; None
    for a chain. path: the indices of the accepted tokens, 0 first. choice: None if the request fixes how it drafts.
    """

    tokens: list[int]
    parents: list[int] | None
    path: list[int]
    choice: Choice | None


class Cycle(NamedTuple):
    """One cycle of self-speculation or AR, by its tokens. drafted: of the block that was drafted or copied, pending
    token included. verified: of the commit. expected: that the cycle was expected to emit. emitted: that it emitted.
    record: None unless the request sets ``record_drafts``.
    """

    drafting: Drafting
    drafted: int
    verified: int
    expected: float
    emitted: int
    record: DraftRecord | None = None


@dataclass
class Counts:
    """The work for one answer.

    prefill, draft, denoise, commit: passes of each kind; every chunk of a prefill counts. cycles: blocks finished, by a
    commit or, in diffusion, by an end token. drafted, accepted: tokens proposed by drafts, and those of them that were
    emitted. trees: cycles whose drafts were verified as a tree. lookups: cycles whose drafts were copied instead of
    drafted by a pass; copied, accepted_copies: their part of drafted and accepted. cached_tokens: prompt tokens whose
    KV rows were reused.
    """

    prefill: int = 0
    draft: int = 0
    denoise: int = 0
    commit: int = 0
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    trees: int = 0
    lookups: int = 0
    copied: int = 0
    accepted_copies: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(kw_only=True)  # not frozen, which would make creation several times slower
class Update:
    """New tokens and text of one answer. The last update has a finish_reason or an error. prompt_logprobs: in the first
    update of a prompt's first answer, if they were requested.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    time_to_slot: float | None = None
    time_to_first_token: float | None = None
    seconds: float | None = None
    error: Exception | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass
class CompletionOutput:
    """One answer, complete or in progress.

    text: without the stop string, and without special tokens if skip_special_tokens. token_ids: the end token included.
    logprobs: for each token, its own first, then the requested number of the likeliest; empty for a token that another
    process emitted (``answer_token_ids``). finish_reason: None while it
    runs. stop_reason: the stop string or stop token id, None for the model's end token. origins: the source of each
    token. rejected: drafted tokens that the latest update's commits rejected. cycles: how each cycle drafted, none in
    diffusion. time_to_slot, time_to_first_token,
    seconds: since the request's arrival. ``*_diff``: what the latest update added.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    origins: list[Origin] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    time_to_slot: float | None = None
    time_to_first_token: float | None = None
    seconds: float | None = None
    text_diff: str = ""
    token_ids_diff: list[int] = field(default_factory=list)
    logprobs_diff: list[dict[int, Logprob]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_forward(self) -> float | None:
        """Tokens for each draft, denoise or commit pass, without the first token, which the prefill yields. None if
        there is no other token.
        """
        passes = self.counts.draft + self.counts.denoise + self.counts.commit
        return (self.length - 1) / passes if passes else None

    @property
    def mean_acceptance(self) -> float | None:
        """Tokens for each cycle, without the first token; None if there was no cycle."""
        return (self.length - 1) / self.counts.cycles if self.counts.cycles else None

    def begin_update(self) -> None:
        """Clear what the previous update added."""
        self.text_diff, self.token_ids_diff, self.logprobs_diff, self.rejected = "", [], [], []

    def apply(self, update: Update) -> None:
        """Add an update."""
        self.text += update.text
        self.token_ids += update.token_ids
        self.origins += update.origins
        self.cycles += update.cycles
        self.text_diff += update.text
        self.token_ids_diff += update.token_ids
        self.logprobs_diff += update.logprobs
        self.rejected += update.rejected
        if update.logprobs:
            self.logprobs = (self.logprobs or []) + update.logprobs
            own = (next(iter(chosen.values())).logprob for chosen in update.logprobs if chosen)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(own)
        self.counts = update.counts
        self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason
        self.time_to_slot, self.time_to_first_token = update.time_to_slot, update.time_to_first_token
        self.seconds = update.seconds
