"""The three decoding modes on the PyTorch reference, with the model card's signatures: the oracle of every decoding
test.
One sequence at a time, one plain loop a mode. The *pending token* is the newest emitted token, whose KV row is not yet
committed; the cache holds causal rows only. Every function returns ``(ids, nfe)``: prompt and continuation, ended after
an end token or at ``max_new_tokens`` exactly, and the number of forward passes made, prefill included.

Source: technical report arXiv 2607.05722 and the model card. Where upstream's remote code is at fault (batch 1 only,
output beyond ``max_new_tokens``, a finished row that stops the others, a thinking budget that leaves text and cache
different) this follows the paper. The mask token is never a candidate, in any mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimode.model.reference.patterns import KeyValue, bidirectional, causal, crop

Ids = list[int]


class TriModeGeneration:
    """Mixed into the network; needs its ``encoder``, ``diffusion_head`` and ``config``."""

    config: Any
    encoder: Any
    diffusion_head: Any
    modules: Callable[[], Iterator[Any]]

    @torch.no_grad()
    def ar_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        eos_token_id: int | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
    ) -> tuple[Tensor, int]:
        """One token a causal pass."""

        def row(prompt: Tensor, stop: StopRule) -> tuple[Ids, int]:
            logits, cache = self._commit(prompt, [])
            emitted, passes = stop.cut([], [self._draw(logits[-1], temperature)]), 1
            while not stop.reached(emitted):
                logits, cache = self._commit(prompt.new_tensor(emitted[-1:]), cache)
                emitted, passes = stop.cut(emitted, [self._draw(logits[-1], temperature)]), passes + 1
            return emitted, passes

        stop = StopRule(max_new_tokens, self._end_ids(eos_token_id), max_thinking_tokens, end_think_token_id)
        return self._each_row(prompt_ids, stop, row)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        threshold: float | None = None,
        steps: int | None = None,
        temperature: float = 0.0,
        eos_token_id: int | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
    ) -> tuple[Tensor, int]:
        """Block diffusion: denoise a block in bidirectional passes that commit nothing, then commit it in one causal
        pass.

        A denoise pass settles the most confident masked position and, with ``threshold``, every other one whose
        confidence reaches it; without, an even share of the masks for ``steps`` passes a block (``block_length`` passes
        unless told), the remainder first. Confidence is the softmax probability of the chosen token.
        """
        size = block_length or self.config.block_size

        def row(prompt: Tensor, stop: StopRule) -> tuple[Ids, int]:
            logits, cache = self._commit(prompt, [])
            emitted, passes = stop.cut([], [self._draw(logits[-1], temperature)]), 1
            while not stop.reached(emitted):
                block = self._masked_block(emitted[-1], min(size, stop.remaining(emitted)), prompt)
                quotas = even_quotas(int((block == self.config.mask_token_id).sum()), steps or size)
                while (masked := block == self.config.mask_token_id).any() and not stop.ends_before_a_mask(
                    block, masked
                ):
                    logits = self._bidirectional_logits(block, cache, adapter=False)
                    passes += 1
                    tokens = self._draw(logits, temperature)
                    confidence = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0].masked_fill(~masked, -1)
                    if threshold is None:
                        settled = torch.zeros_like(masked)
                        settled[confidence.topk(next(quotas)).indices] = True
                    else:
                        settled = confidence >= threshold
                        settled[confidence.argmax()] = True
                    block[settled & masked] = tokens[settled & masked]
                if stop.ends_before_a_mask(block, masked=block == self.config.mask_token_id):
                    finished = stop.cut(emitted, block[1:].tolist())
                    if stop.reached(finished):
                        emitted = finished
                        break
                logits, cache = self._commit(block, cache)
                passes += 1
                before = len(emitted)
                emitted = stop.cut(emitted, [*block[1:].tolist(), self._draw(logits[-1], temperature)])
                cache = crop(cache, cache[0][0].shape[2] - len(block) + len(emitted) - before)
            return emitted, passes

        stop = StopRule(max_new_tokens, self._end_ids(eos_token_id), max_thinking_tokens, end_think_token_id)
        return self._each_row(prompt_ids, stop, row)

    @torch.no_grad()
    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        eos_token_id: int | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        threshold: float = 0.0,
    ) -> tuple[Tensor, int]:
        """Linear self-speculation: diffusion drafts a block (adapter on), one causal pass verifies it (adapter off).
        Emits the AR row's token while it equals the draft, and one more: exactly AR's greedy tokens, or draws from AR's
        distribution. Drafts are greedy at any temperature. With ``threshold`` > 0 the draft is refined pass by pass
        until every position is settled.
        """
        size = block_length or self.config.block_size

        def row(prompt: Tensor, stop: StopRule) -> tuple[Ids, int]:
            logits, cache = self._commit(prompt, [])
            emitted, passes = stop.cut([], [self._draw(logits[-1], temperature)]), 1
            while not stop.reached(emitted):
                block = self._masked_block(emitted[-1], min(size, stop.remaining(emitted)), prompt)
                while (masked := block == self.config.mask_token_id).any():
                    logits = self._bidirectional_logits(block, cache, adapter=True)
                    passes += 1
                    confidence, tokens = logits.softmax(-1).max(-1)
                    confidence = confidence.masked_fill(~masked, -1)
                    settled = confidence >= threshold
                    settled[confidence.argmax()] = True
                    block[settled & masked] = tokens[settled & masked]
                committed = cache[0][0].shape[2]
                logits, cache = self._commit(block, cache)
                passes += 1
                verified = self._draw(logits, temperature)
                matches = (verified[:-1] == block[1:]).int().cumprod(0).sum()
                before = len(emitted)
                emitted = stop.cut(emitted, verified[: int(matches) + 1].tolist())
                cache = crop(cache, committed + len(emitted) - before)
            return emitted, passes

        stop = StopRule(max_new_tokens, self._end_ids(eos_token_id), max_thinking_tokens, end_think_token_id)
        return self._each_row(prompt_ids, stop, row)

    def _commit(self, tokens: Tensor, cache: list[KeyValue]) -> tuple[Tensor, list[KeyValue]]:
        """One causal pass, adapter off: logits [step, vocabulary] and the cache with the step's rows."""
        with self.draft_adapter(False):
            return self._pass(tokens, cache, causal)

    def _bidirectional_logits(self, block: Tensor, cache: list[KeyValue], adapter: bool) -> Tensor:
        """One bidirectional pass that leaves the cache as it is; row i predicts position i itself."""
        with self.draft_adapter(adapter):
            return self._pass(block, cache, bidirectional)[0]

    def _pass(
        self, tokens: Tensor, cache: list[KeyValue], pattern: Callable[..., Tensor]
    ) -> tuple[Tensor, list[KeyValue]]:
        past, step = cache[0][0].shape[2] if cache else 0, len(tokens)
        positions = torch.arange(past, past + step, device=tokens.device)[None]
        hidden, present = self.encoder(tokens[None], positions, pattern(1, step, past, tokens.device), cache or None)
        logits = self.diffusion_head(hidden)[0].float()
        logits[:, self.config.mask_token_id] = -torch.inf
        return logits, present

    def _draw(self, logits: Tensor, temperature: float) -> Any:
        """Argmax, or a draw at ``temperature``, of each row; a plain int for a single row."""
        if temperature > 0:
            tokens = torch.multinomial((logits / temperature).softmax(-1).view(-1, logits.shape[-1]), 1)[:, 0]
        else:
            tokens = logits.view(-1, logits.shape[-1]).argmax(-1)
        return tokens if logits.dim() == 2 else int(tokens[0])

    def _masked_block(self, pending_token: int, size: int, like: Tensor) -> Tensor:
        block = like.new_full((size,), self.config.mask_token_id)
        block[0] = pending_token
        return block

    @contextmanager
    def draft_adapter(self, enabled: bool) -> Iterator[None]:
        """Switch peft's tuner layers on or off, if any are attached, and leave them as they were found."""
        layers = [module for module in self.modules() if hasattr(module, "lora_A")]
        before = [not layer.disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer.enable_adapters(enabled)
            yield
        finally:
            for layer, was_enabled in zip(layers, before, strict=True):
                layer.enable_adapters(was_enabled)

    def _end_ids(self, eos_token_id: int | None) -> set[int]:
        ids = self.config.eos_token_id if eos_token_id is None else eos_token_id
        return set(ids) if isinstance(ids, list) else {ids} - {None}

    def _each_row(
        self, prompt_ids: Tensor, stop: StopRule, row: Callable[[Tensor, StopRule], tuple[Ids, int]]
    ) -> tuple[Tensor, int]:
        """Decode every row on its own; shorter ones are padded with the end token."""
        results = [row(prompt, stop) for prompt in prompt_ids]
        longest = max(len(emitted) for emitted, _ in results)
        pad = min(stop.end_ids, default=0)
        continuation = prompt_ids.new_full((len(results), longest), pad)
        for index, (emitted, _) in enumerate(results):
            continuation[index, : len(emitted)] = prompt_ids.new_tensor(emitted)
        return torch.cat((prompt_ids, continuation), dim=1), sum(passes for _, passes in results)


class StopRule:
    """When a continuation is over, and what the thinking budget makes of it."""

    def __init__(
        self, max_new_tokens: int, end_ids: set[int], max_thinking_tokens: int | None, end_think_token_id: int | None
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if max_thinking_tokens is not None and end_think_token_id is None:
            raise ValueError("max_thinking_tokens needs end_think_token_id, the token to force")
        self.max_new_tokens = max_new_tokens
        self.end_ids = end_ids
        self.max_thinking_tokens = max_thinking_tokens
        self.end_think_token_id = end_think_token_id

    def remaining(self, emitted: Ids) -> int:
        return self.max_new_tokens - len(emitted)

    def reached(self, emitted: Ids) -> bool:
        return self.remaining(emitted) == 0 or emitted[-1] in self.end_ids

    def cut(self, emitted: Ids, new: Ids) -> Ids:
        """Append tokens up to the first end token, the length limit, or the token that the thinking budget forces."""
        result = list(emitted)
        for token in new:
            over_budget = (
                self.max_thinking_tokens is not None
                and len(result) >= self.max_thinking_tokens
                and self.end_think_token_id not in result
            )
            result.append(self.end_think_token_id if over_budget else token)  # type: ignore[arg-type]
            if self.reached(result) or over_budget:
                break
        return result

    def ends_before_a_mask(self, block: Tensor, masked: Tensor) -> bool:
        """Whether an end token stands in the block, past its pending token, with no mask before it."""
        for token, is_mask in zip(block[1:].tolist(), masked[1:].tolist(), strict=True):
            if is_mask:
                return False
            if token in self.end_ids:
                return True
        return False


def even_quotas(masks: int, steps: int) -> Iterator[int]:
    """How many masks each denoise pass settles: an even share, the remainder in the first passes, at least one."""
    share, remainder = divmod(masks, steps)
    for step in range(steps):
        yield max(1, share + (step < remainder))
