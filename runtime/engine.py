"""An engine directory, loaded: text or tokens in, text out, one request at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimode.model.errors import TriModeError
from trimode.model.manifest import TOKENIZER, Manifest, verify_files
from trimode.model.progress import Progress, no_progress
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.decoding import DecodingOptions, FinishReason, Mode, Pass, PassCounts, Sequence
from trimode.runtime.executor import BidirectionalStep, CausalStep, Executor
from trimode.runtime.loading import load_executor


@dataclass(frozen=True)
class Generation:
    """A finished answer. ``token_ids`` ends with the end token if there was one; ``text`` is without special tokens.

    cycles: blocks brought to their end, by a commit or, in diffusion, by an end token. tokens_per_forward: tokens by
    draft and commit passes, both counted. mean_acceptance: tokens a cycle. Both leave out the first token, which the
    prefill gives, and are None if it was the only one. seconds: wall time.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    mode: Mode
    prompt_tokens: int
    completion_tokens: int
    passes: PassCounts
    cycles: int
    tokens_per_forward: float | None
    mean_acceptance: float | None
    seconds: float


class Engine:
    """Loads an engine directory; every file is checked against the manifest first unless ``verify`` is off.

    Not for several threads at once: both engines write one KV pool.
    """

    def __init__(
        self, folder: Path, threads: int | None = None, verify: bool = True, progress: Progress = no_progress
    ) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        if verify:
            verify_files(folder, self.manifest, progress)
        self.tokenizer = Tokenizer.from_folder(folder / TOKENIZER)
        self.executor: Executor = load_executor(folder, self.manifest, threads)

    def generate(
        self,
        prompt: list[int],
        options: DecodingOptions,
        on_tokens: Callable[[list[int]], None] = lambda _tokens: None,
    ) -> Generation:
        """Decode one prompt to its end; ``on_tokens`` hears the tokens of each pass that emits some.
        Raises TriModeError if a prompt token is not of the vocabulary, or prompt and ``max_tokens`` exceed the
        capacity.
        """
        begun = time.perf_counter()
        self._refuse(prompt, options)
        sequence = Sequence(prompt, options, self.manifest.model, self.manifest.limits.prefill_step)
        slot = self.executor.pool.acquire()
        try:
            while sequence.finish_reason is None:
                needed = sequence.next_pass()
                emitted = sequence.absorb(needed, self.executor.run(_step(sequence, needed, slot)))
                if emitted:
                    on_tokens(emitted)
        finally:
            self.executor.pool.release(slot)
        tokens, passes = sequence.emitted, sequence.passes
        after_prefill = len(tokens) - 1
        return Generation(
            text=self.tokenizer.decode(tokens),
            token_ids=tokens,
            finish_reason=sequence.finish_reason,
            mode=options.mode,
            prompt_tokens=len(prompt),
            completion_tokens=len(tokens),
            passes=passes,
            cycles=sequence.cycles,
            tokens_per_forward=_ratio(after_prefill, passes.draft + passes.commit),
            mean_acceptance=_ratio(after_prefill, sequence.cycles),
            seconds=time.perf_counter() - begun,
        )

    def _refuse(self, prompt: list[int], options: DecodingOptions) -> None:
        capacity, vocabulary = self.manifest.limits.capacity, self.manifest.model.vocab_size
        if len(prompt) + options.max_tokens > capacity:
            raise TriModeError(
                f"the prompt has {len(prompt)} tokens; with max_tokens {options.max_tokens} that exceeds the engine's "
                f"capacity of {capacity}; shorten the prompt or lower max_tokens"
            )
        for token in prompt:
            if not 0 <= token < vocabulary:
                raise TriModeError(f"prompt token {token} is outside the model's vocabulary of {vocabulary}")


def _step(sequence: Sequence, needed: Pass, slot: int) -> CausalStep | BidirectionalStep:
    """A pass of one sequence as a step of batch 1."""
    ids, rows, write = needed.tokens[None], needed.rows[None], np.array([sequence.committed])
    if needed.kind != "draft":
        return CausalStep.chain(slot, ids, write, rows)
    length, adapter = np.array([len(needed.tokens)]), np.array([sequence.uses_adapter])
    return BidirectionalStep.block(slot, ids, write, rows, length, adapter)


def _ratio(amount: int, parts: int) -> float | None:
    return amount / parts if parts else None
