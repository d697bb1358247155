"""Recorded texts, and what the diffusion engine drafts behind every token of them.

Drafting never changes a text, so a text and its drafts are all that a replay of any drafting needs: how many drafts
are accepted follows from comparing them with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode import LLM, SamplingParams
from trimode.runtime.decoding.sequence import TREE_RANKS
from trimode.runtime.executor import BidirectionalStep, CausalStep, Executor, Ints
from trimode.runtime.loading import load_engine

BLOCKS = (4, 8, 16, 32)  # a shorter block counts as the beginning of the next longer one
GROUP = 8  # texts that are drafted in one pass
MAX_TOKENS = 200


class Drafts(NamedTuple):
    """tokens, log_probs: [T, b - 1, k] for the T tokens of an answer, each the pending token of a block of b: the k
    likeliest tokens of each place behind it, best first.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]


class Text(NamedTuple):
    """prompt: [P]. answer: [T], the end token included. drafts: by block length."""

    prompt: Ints
    answer: Ints
    drafts: dict[int, Drafts]

    def accepted(self, block: int) -> list[int]:
        """For each pending token, the drafts that a block of this length has accepted, and up to the answer's end."""
        best, found = self.drafts[block].tokens[:, :, 0], []
        for place in range(len(self.answer) - 1):
            following = self.answer[place + 1 : place + block]
            agreed = best[place, : len(following)] == following
            found.append(int(agreed.cumprod().sum()))
        return found


def record(
    engine: Path, prompts: Sequence[Any], *, adapter: bool | None = None, sampling: dict[str, Any] | None = None
) -> list[Text]:
    """The texts of mode ``ar`` and their drafts. adapter: whether drafts use the engine's draft adapter, None if it has
    one. sampling: parameters of :class:`SamplingParams`; seeds count up from its ``seed``.
    """
    sampling = sampling or {}
    seeds = [sampling.get("seed", 0) + index for index in range(len(prompts))]
    params = [SamplingParams(max_tokens=MAX_TOKENS, mode="ar", **sampling | {"seed": seed}) for seed in seeds]
    with LLM(engine, max_batch_size=GROUP, measure_passes=False) as llm:
        encoded = [
            prompt if isinstance(prompt[0], int) else llm.tokenizer.encode(llm.tokenizer.apply_chat_template(prompt))
            for prompt in prompts
        ]
        outputs = llm.generate(encoded, params, use_tqdm=False)
    answers = [output.outputs[0].token_ids for output in outputs]
    loaded = load_engine(engine)
    uses_adapter = loaded.manifest.adapter is not None if adapter is None else adapter
    recorder = _Recorder(loaded.executor, loaded.manifest.model.mask_token_id, uses_adapter)
    order = sorted(range(len(encoded)), key=lambda index: len(answers[index]))  # a group's answers are as long
    texts: dict[int, Text] = {}
    for start in range(0, len(order), GROUP):
        group = order[start : start + GROUP]
        pairs = [(encoded[index], answers[index]) for index in group]
        texts |= zip(group, recorder.drafts_of(pairs), strict=True)
    return [texts[index] for index in range(len(encoded))]


def write(texts: Sequence[Text], path: Path) -> None:
    """Keep texts in one file."""
    arrays: dict[str, NDArray[Any]] = {}
    for index, text in enumerate(texts):
        arrays |= {f"{index} prompt": text.prompt, f"{index} answer": text.answer}
        for block, drafts in text.drafts.items():
            arrays[f"{index} tokens {block}"] = drafts.tokens.astype(np.int32)
            arrays[f"{index} log_probs {block}"] = drafts.log_probs.astype(np.float16)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read(path: Path) -> list[Text]:
    """The texts that :func:`write` has kept."""
    with np.load(path) as arrays:
        return [
            Text(
                arrays[f"{index} prompt"],
                arrays[f"{index} answer"],
                {
                    block: Drafts(arrays[f"{index} tokens {block}"], arrays[f"{index} log_probs {block}"].astype("f4"))
                    for block in BLOCKS
                },
            )
            for index in range(len([name for name in arrays.files if name.endswith("prompt")]))
        ]


class _Recorder:
    def __init__(self, executor: Executor, mask_id: int, adapter: bool) -> None:
        self._executor = executor
        self._mask_id = mask_id
        self._adapter = adapter

    def drafts_of(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Text]:
        """Drafts of several texts at once, the last token's first: a draft overwrites the KV rows behind its own
        pending token, which no earlier token needs.
        """
        pool, batch = self._executor.pool, len(pairs)
        for _ in pairs:
            pool.acquire()
        try:
            whole = [prompt + answer for prompt, answer in pairs]
            longest = max(map(len, whole))
            ids = np.zeros((batch, longest), np.int64)
            for index, tokens in enumerate(whole):
                ids[index, : len(tokens)] = tokens
            none = np.zeros((batch, 1), np.int64)
            self._executor.run(CausalStep.chain(0, ids, np.zeros(batch, np.int64), none, top_k=1))
            texts = [
                Text(np.array(prompt), np.array(answer), {block: _no_drafts(len(answer), block) for block in BLOCKS})
                for prompt, answer in pairs
            ]
            for back in range(1, max(len(answer) for _, answer in pairs) + 1):
                places = [max(len(answer) - back, 0) for _, answer in pairs]
                for block in BLOCKS:
                    self._draft(texts, places, block)
            return texts
        finally:
            while pool.active:
                pool.release(pool.active - 1)

    def _draft(self, texts: list[Text], places: list[int], block: int) -> None:
        batch = len(texts)
        ids = np.full((batch, block), self._mask_id, np.int64)
        ids[:, 0] = [text.answer[place] for text, place in zip(texts, places, strict=True)]
        write = np.array([len(text.prompt) + place for text, place in zip(texts, places, strict=True)])
        rows = np.tile(np.arange(1, block), (batch, 1))
        lengths, adapter = np.full(batch, block), np.full(batch, self._adapter)
        found = self._executor.run(BidirectionalStep.block(0, ids, write, rows, lengths, adapter, TREE_RANKS))
        for index, (text, place) in enumerate(zip(texts, places, strict=True)):
            drafts = text.drafts[block]
            drafts.tokens[place] = found.tokens[index, :, :TREE_RANKS]
            drafts.log_probs[place] = found.logits[index, :, :TREE_RANKS] - found.log_sum_exp[index, :, None]


def _no_drafts(tokens: int, block: int) -> Drafts:
    shape = tokens, block - 1, TREE_RANKS
    return Drafts(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
