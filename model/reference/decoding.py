"""The three decoding modes on the PyTorch reference, one plain loop for each: the oracle of every decoding test.

Source: technical report arXiv 2607.05722, and NVIDIA's remote code for the family ("upstream"). Names, order and
defaults of the arguments are upstream's. Every function returns ``(ids, nfe)``: the prompts with their continuations,
and the number of forward passes as upstream counts them. ``passes`` has the number of passes that ran, by kind.

Every cycle drafts a block in zero or more bidirectional passes, then commits it in one causal pass. The *pending token*
is the newest emitted token. Its KV row is not committed yet, and it is the first token of the next block. The KV cache
holds causal rows only.

The reference corrects these faults of upstream:

- Rows of a batch are decoded one by one. Upstream takes one row only (``linear_spec_generate``) or lets a finished row
  stop the others (``generate``).
- A continuation has at most ``max_new_tokens`` tokens. Upstream exceeds that by up to a block in
  ``linear_spec_generate``, and ``generate`` takes multiples of ``block_length`` only.
- Text and KV cache agree after a thinking budget has forced its token. Upstream's ``linear_spec_generate`` replaces the
  pending token by the forced one in the network's input, but not in the text.
- In ``generate``, a pending token that ends thinking counts. Upstream looks at the tokens before it only, and places a
  second end of thinking in the block that follows.
- The mask token is never a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimode.model.reference.patterns import KeyValue, bidirectional, causal, crop


@dataclass
class PassTotals:
    """Forward passes of one call, summed over its rows."""

    prefill: int = 0
    draft: int = 0
    denoise: int = 0
    commit: int = 0


class TriModeGeneration:
    """The decoding modes, mixed into the network; needs its ``encoder``, ``diffusion_head`` and ``config``.

    passes: what the latest call made.
    """

    config: Any
    encoder: Any
    diffusion_head: Any
    modules: Callable[[], Iterator[Any]]
    passes: PassTotals

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
        """Autoregressive decoding: one token for each causal pass. nfe counts the prefill."""

        def decode(prompt: Tensor, text: Continuation) -> int:
            logits, cache = self._prefill_pass(prompt)
            text.emit(self._draw(logits[-1], temperature))
            while not text.has_ended():
                logits, cache = self._commit(prompt.new_tensor([text.pending_token]), cache)
                text.emit(self._draw(logits[-1], temperature))
            return len(text.tokens)

        rules = self._stop_rules(max_new_tokens, eos_token_id, max_thinking_tokens, end_think_token_id)
        return self._each_row(prompt_ids, rules, decode)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        threshold: float | None = None,
        causal_context: bool = True,
        temperature: float = 0.0,
        eos_token_id: int | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        steps: int | None = None,
    ) -> tuple[Tensor, int]:
        """Block diffusion: denoise a block in bidirectional passes that commit nothing, then commit it in one causal
        pass.

        A denoise pass settles the most confident masked position. With ``threshold`` it also settles every other one
        whose confidence reaches it; without, an even share of the masks for ``steps`` passes a block (default:
        ``block_length`` passes), the remainder first. Confidence is the softmax probability of the chosen token.

        Blocks have their full length if the context has room, and the text is cut at ``max_new_tokens``. So the first n
        tokens of an answer do not depend on its length limit. Denoising stops when no mask is left before the end of
        the text.

        If the thinking budget runs out in a block, ``end_think_token_id`` is placed in the block before denoising, as
        upstream does. So every token of the block attends to it.

        nfe counts as upstream does: the denoise passes and one commit per block, without the prefill. Upstream also
        commits the block in which the text ends, and opens another block after an end token that came from a commit.
        The reference counts both in nfe, but runs neither.

        Raises ValueError if ``causal_context`` is False.
        """
        if not causal_context:
            raise ValueError("causal_context is False; the reference commits causal rows only")
        size = block_length or self.config.block_size
        mask = self.config.mask_token_id

        def decode(prompt: Tensor, text: Continuation) -> int:
            logits, cache = self._prefill_pass(prompt)
            text.emit(self._draw(logits[-1], temperature))
            nfe = 0
            while not text.has_ended():
                room = self.config.max_position_embeddings - length_of(cache)
                block = self._open_block(text, min(size, max(room, text.remaining)), mask, prompt)
                text.place_end_of_thinking(block)
                quotas = even_quotas(int((block == mask).sum()), steps or size)
                while not text.settled_in(block, mask):
                    logits = self._bidirectional_logits(block, cache, adapter=False)
                    self.passes.denoise += 1
                    nfe += 1
                    tokens = self._draw(logits, temperature)
                    masked = block == mask
                    confidence = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0].masked_fill(~masked, -1)
                    if threshold is None:
                        settled = torch.zeros_like(masked)
                        settled[confidence.topk(next(quotas)).indices] = True
                    else:
                        settled = confidence >= threshold
                        settled[confidence.argmax()] = True
                    block[settled & masked] = tokens[settled & masked]
                nfe += 1
                for token in block[1:].tolist():
                    text.emit(token)
                    if text.has_ended():
                        return nfe
                logits, cache = self._commit(block, cache)
                text.emit(self._draw(logits[-1], temperature))
            return nfe + (2 if text.found_end else 0)

        rules = self._stop_rules(max_new_tokens, eos_token_id, max_thinking_tokens, end_think_token_id)
        return self._each_row(prompt_ids, rules, decode)

    @torch.no_grad()
    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        threshold: float = 0.0,
    ) -> tuple[Tensor, int]:
        """Linear self-speculation: diffusion drafts a block (adapter on), one causal pass verifies it (adapter off).

        Emits the causal rows' tokens while they equal the draft, and one more: AR's greedy tokens exactly, or draws
        from AR's distribution. Drafts are greedy at any temperature (upstream samples them too; the law of the text is
        the same). With ``threshold`` > 0 the draft is refined pass by pass until every position is settled.

        A block is at most as long as the text that remains: drafts beyond it would be discarded. nfe counts every pass.
        """
        size = block_length or self.config.block_size
        mask = self.config.mask_token_id if mask_token_id is None else mask_token_id

        def decode(prompt: Tensor, text: Continuation) -> int:
            logits, cache = self._prefill_pass(prompt)
            text.emit(self._draw(logits[-1], temperature))
            nfe = 1
            while not text.has_ended():
                block = self._open_block(text, min(size, text.remaining), mask, prompt)
                masked = torch.ones_like(block, dtype=torch.bool)
                masked[0] = False  # the pending token
                while masked.any():
                    logits = self._bidirectional_logits(block, cache, adapter=True)
                    self.passes.draft += 1
                    nfe += 1
                    confidence, tokens = logits.softmax(-1).max(-1)
                    confidence = confidence.masked_fill(~masked, -1)
                    settled = confidence >= threshold
                    settled[confidence.argmax()] = True
                    block[settled & masked] = tokens[settled & masked]
                    masked &= ~settled
                committed = length_of(cache)
                logits, cache = self._commit(block, cache)
                nfe += 1
                drafted = [*block[1:].tolist(), None]  # nothing is drafted for the last row
                for verified, draft in zip(self._draw(logits, temperature).tolist(), drafted, strict=True):
                    committed += 1
                    if text.emit(verified) != draft or text.has_ended():
                        break
                cache = crop(cache, committed)
            return nfe

        rules = self._stop_rules(max_new_tokens, eos_token_id, max_thinking_tokens, end_think_token_id)
        return self._each_row(prompt_ids, rules, decode)

    def _prefill_pass(self, prompt: Tensor) -> tuple[Tensor, list[KeyValue]]:
        logits, cache = self._causal_pass(prompt, [])
        self.passes.prefill += 1
        return logits, cache

    def _commit(self, block: Tensor, cache: list[KeyValue]) -> tuple[Tensor, list[KeyValue]]:
        logits, cache = self._causal_pass(block, cache)
        self.passes.commit += 1
        return logits, cache

    def _causal_pass(self, tokens: Tensor, cache: list[KeyValue]) -> tuple[Tensor, list[KeyValue]]:
        """Adapter off: logits [step, vocabulary], row i for position i + 1, and the cache with the step's rows."""
        with self.draft_adapter(False):
            return self._pass(tokens, cache, causal)

    def _bidirectional_logits(self, block: Tensor, cache: list[KeyValue], adapter: bool) -> Tensor:
        """Logits [step, vocabulary], row i for position i itself; the cache stays as it is."""
        with self.draft_adapter(adapter):
            return self._pass(block, cache, bidirectional)[0]

    def _pass(
        self, tokens: Tensor, cache: list[KeyValue], pattern: Callable[..., Tensor]
    ) -> tuple[Tensor, list[KeyValue]]:
        past, step = length_of(cache), len(tokens)
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

    def _open_block(self, text: Continuation, size: int, mask: int, like: Tensor) -> Tensor:
        """The pending token and ``size`` - 1 masks."""
        block = like.new_full((size,), mask)
        block[0] = text.pending_token
        return block

    @contextmanager
    def draft_adapter(self, enabled: bool) -> Iterator[None]:
        """Switch peft's tuner layers on or off, if any are attached, and restore their state afterwards."""
        layers = [module for module in self.modules() if hasattr(module, "lora_A")]
        before = [not layer.disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer.enable_adapters(enabled)
            yield
        finally:
            for layer, was_enabled in zip(layers, before, strict=True):
                layer.enable_adapters(was_enabled)

    def _stop_rules(
        self,
        max_new_tokens: int,
        eos_token_id: int | None,
        max_thinking_tokens: int | None,
        end_think_token_id: int | None,
    ) -> StopRules:
        end = self.config.eos_token_id if eos_token_id is None else eos_token_id
        end_ids = set(end) if isinstance(end, list) else {end} - {None}
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if max_thinking_tokens is None:
            return StopRules(max_new_tokens, end_ids)
        if end_think_token_id is None:
            raise ValueError("max_thinking_tokens needs end_think_token_id, the token to force")
        return StopRules(max_new_tokens, end_ids, ThinkingLimit(max_thinking_tokens, end_think_token_id))

    def _each_row(
        self, prompt_ids: Tensor, rules: StopRules, decode: Callable[[Tensor, Continuation], int]
    ) -> tuple[Tensor, int]:
        """Decode every row on its own; shorter ones are padded with the end token."""
        self.passes = PassTotals()
        texts = [Continuation(rules) for _ in prompt_ids]
        nfe = sum(decode(prompt, text) for prompt, text in zip(prompt_ids, texts, strict=True))
        longest = max(len(text.tokens) for text in texts)
        continuation = prompt_ids.new_full((len(texts), longest), min(rules.end_ids, default=0))
        for index, text in enumerate(texts):
            continuation[index, : len(text.tokens)] = prompt_ids.new_tensor(text.tokens)
        return torch.cat((prompt_ids, continuation), dim=1), nfe


class ThinkingLimit(NamedTuple):
    """After ``tokens`` tokens the token ``end`` is forced, unless the text has it already."""

    tokens: int
    end: int


class StopRules(NamedTuple):
    """When a continuation ends."""

    max_new_tokens: int
    end_ids: set[int]
    thinking: ThinkingLimit | None = None


class Continuation:
    """The tokens emitted for one row."""

    def __init__(self, rules: StopRules) -> None:
        self.rules = rules
        self.tokens: list[int] = []

    @property
    def pending_token(self) -> int:
        return self.tokens[-1]

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.rules.max_new_tokens - len(self.tokens)

    @property
    def found_end(self) -> bool:
        return self.tokens[-1] in self.rules.end_ids

    def has_ended(self) -> bool:
        return self.remaining == 0 or self.found_end

    def emit(self, token: int) -> int:
        """Append ``token``, or the token that the thinking budget forces instead; returns the one appended."""
        limit = self._thinking_limit
        if limit is not None and len(self.tokens) >= limit.tokens:
            token = limit.end
        self.tokens.append(token)
        return token

    def place_end_of_thinking(self, block: Tensor) -> None:
        """Place the end of thinking where the budget runs out, if that is in the block after its pending token."""
        limit = self._thinking_limit
        if limit is not None and 1 <= (place := limit.tokens - len(self.tokens) + 1) < len(block):
            block[place] = limit.end

    def settled_in(self, block: Tensor, mask: int) -> bool:
        """Whether no mask is left in the block before the end of the text, or before the block's own end."""
        for token in block[1 : 1 + self.remaining].tolist():
            if token == mask:
                return False
            if token in self.rules.end_ids:
                return True
        return True

    @property
    def _thinking_limit(self) -> ThinkingLimit | None:
        """None once the text has the end of thinking."""
        limit = self.rules.thinking
        return None if limit is None or limit.end in self.tokens else limit


def even_quotas(masks: int, steps: int) -> Iterator[int]:
    """Masks that each denoise pass settles: an even share, at least one; the first passes settle the remainder."""
    share, remainder = divmod(masks, steps)
    for step in range(steps):
        yield max(1, share + (step < remainder))


def length_of(cache: list[KeyValue]) -> int:
    """Rows that the cache holds."""
    return cache[0][0].shape[2] if cache else 0
