"""However a cycle drafts, the texts are AR's: drafts by a pass or copied, chosen at random, in batches of all modes."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.runtime.scheduling.test_scheduler import LAWS, Recorder, penalised_text
from tests.support.exact_law import (
    Bench,
    ExactLawExecutor,
    WeakDraftExecutor,
    greedy,
    greedy_text,
    prompts,
)
from trimode import SamplingParams
from trimode.runtime.scheduling.auto_block import CHOICES, Opening, Plan

COPYING: list[dict[str, Any]] = [
    {"mode": "linear_spec", "block_length": 6, "lookup": True},
    {"mode": "auto", "block_length": 8, "lookup": True},
]
TREES: list[dict[str, Any]] = [
    {"mode": "linear_spec", "block_length": 6, "tree_width": 9},
    {"mode": "linear_spec", "block_length": 3, "tree_width": 12, "lookup": True},
    {"mode": "linear_spec", "block_length": 8, "tree_width": 4},
]
MODES: list[dict[str, Any]] = [*COPYING, *TREES, {"mode": "ar"}, {"mode": "linear_spec", "block_length": 4}]
REPEATED = (2, 3, 4, 2, 3, 4, 2, 3)
PENALISED = {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.4}


def choose_at_random(bench: Bench, seed: int, copies: float = 0.5) -> None:
    """Replace the choices by random ones. copies: the share of the copies found that are used."""
    rng = np.random.default_rng(seed)

    def choose(opening: list[Opening], *_: Any) -> Plan:
        copying = [bool(each.copy_yields) and bool(rng.random() < copies) for each in opening]
        return Plan(int(rng.choice(CHOICES)), int(rng.choice(CHOICES[1:])), copying, bool(rng.random() < 0.5))

    bench.scheduler._block_chooser.choose = choose  # type: ignore[method-assign,assignment]


def copied(bench: Recorder) -> tuple[int, int]:
    """Copied tokens that were verified, and those of them that were emitted."""
    counts = bench.scheduler.stats().counts
    return counts.copied, counts.accepted_copies


@pytest.mark.parametrize("executor", [ExactLawExecutor, WeakDraftExecutor])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_greedy_texts_are_those_of_the_law(batch: int, executor: type[ExactLawExecutor]) -> None:
    bench = Recorder(max_batch=batch, capacity=100, executor=executor)
    choose_at_random(bench, batch)
    expected = {}
    for index, prompt in enumerate(prompts(60, seed=batch)):
        params = SamplingParams(max_tokens=3 + index % 30, **MODES[index % len(MODES)])
        expected[bench.submit(prompt * (1 + index % 3), params)] = greedy_text(
            prompt * (1 + index % 3), params.max_tokens or 0
        )
    bench.run()
    assert bench.texts == expected
    assert copied(bench)[0] > 0


def test_a_copy_needs_no_draft_pass() -> None:
    bench = Recorder(max_batch=1, end=False)
    choose_at_random(bench, 0, copies=1.0)
    number = bench.submit(REPEATED, SamplingParams(max_tokens=20, **COPYING[0]))
    bench.run()
    counts = bench.finished[number].counts
    assert counts.lookups > 0
    assert counts.draft in (
        counts.cycles - counts.lookups,
        counts.cycles - counts.lookups - 1,
    )  # or a last block of one
    assert counts.copied <= counts.drafted
    assert counts.accepted_copies <= counts.accepted


def test_copies_are_not_used_in_fixed_modes_or_against_the_request() -> None:
    bench = Recorder(max_batch=1, end=False)
    for mode in ({"mode": "linear_spec"}, {"mode": "auto", "lookup": False}, {"mode": "linear_spec", "lookup": False}):
        bench.submit(REPEATED, SamplingParams(max_tokens=20, **mode))
    bench.run()
    assert copied(bench) == (0, 0)


PERIOD = REPEATED[:3]


class Repeating(ExactLawExecutor):
    """A language in which every text goes on as its beginning did, so that every copy is right."""

    def run(self, step: Any) -> Any:
        found = super().run(step)
        tokens = self.pool.buffers[0]
        for index in range(step.batch):
            for place, row in enumerate(step.logit_rows[index].tolist()):
                position = int(step.position_ids[index, row])
                slot = step.first_slot + index
                following = int(tokens[slot, 0, (position + 1) % len(PERIOD), 0])
                order = [following, *(token for token in found.tokens[index, place].tolist() if token != following)]
                found.tokens[index, place] = order[: found.tokens.shape[-1]]
        return found


def test_copies_that_hold_replace_most_drafts() -> None:
    """The chooser learns from the copies' own success that they halve a cycle's passes."""
    bench = Recorder(max_batch=2, end=False, executor=Repeating, clock=iter(np.arange(1e6)).__next__)
    for mode in COPYING:
        bench.submit(PERIOD * 2, SamplingParams(max_tokens=50, ignore_eos=True, **mode))
    bench.run()
    for number, update in bench.finished.items():
        assert bench.texts[number] == [*PERIOD] * 16 + [*PERIOD[:2]]
        assert update.counts.lookups > 0.5 * update.counts.cycles
        assert update.counts.accepted_copies == update.counts.copied


def likely_repetition() -> tuple[int, ...]:
    """A prompt that ends as it begins, and whose law makes the next tokens of its beginning likely."""
    for a, b, c, d in product(range(2, 7), repeat=4):
        prompt = (a, b, c, d, a, b, c)
        if greedy(prompt, end=False) == d and greedy((*prompt, d), end=False) == a:
            return prompt
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("how", [*LAWS, PENALISED], ids=str)
def test_sampled_texts_are_ars_seed_by_seed(how: dict[str, Any]) -> None:
    """A copied draft is a certain guess, accepted with the probability that the law gives its token. Draws depend on
    the seed and the position alone, so not only the law but every text is AR's.
    """
    texts = []
    for mode in ({"mode": "ar"}, *COPYING, *TREES):
        bench = Recorder(max_batch=16, prefix_cache=False, end=False, capacity=32)
        choose_at_random(bench, 2, copies=0.9)
        for seed in range(100):
            bench.submit(likely_repetition(), SamplingParams(max_tokens=6, **mode, **how), seed=seed)
        bench.run()
        texts.append(bench.texts)
        tried, accepted = copied(bench)
        assert tried > 0 if "lookup" in mode else tried == 0
        assert accepted <= tried
    assert all(found == texts[0] for found in texts)
    assert len({tuple(text) for text in texts[0].values()}) > 20


def test_greedy_texts_with_penalties_are_those_of_the_law() -> None:
    bench, expected = Recorder(end=False), {}
    choose_at_random(bench, 3)
    for index, prompt in enumerate(prompts(12, seed=5)):
        params = SamplingParams(max_tokens=14, presence_penalty=0.6, frequency_penalty=0.3, **MODES[index % len(MODES)])
        expected[bench.submit(prompt, params)] = penalised_text(prompt, 14, 0.6, 0.3)
    bench.run()
    assert bench.texts == expected


def test_a_tree_accepts_what_a_chain_does_not() -> None:
    """A weak draft's second and third candidates are verified too, so that a cycle yields more tokens."""
    yields = {}
    for width in (None, 8, 24):
        bench = Recorder(max_batch=4, capacity=100, end=False, executor=WeakDraftExecutor)
        params = SamplingParams(max_tokens=40, temperature=0.7, mode="linear_spec", block_length=8, tree_width=width)
        for seed, prompt in enumerate(prompts(24, seed=7)):
            bench.submit(prompt, params, seed=seed)
        bench.run()
        stats = bench.scheduler.stats()
        yields[width] = stats.emitted / stats.counts.cycles
    assert yields[24] > yields[8] > 1.1 * yields[None], yields


def test_the_rows_of_the_accepted_path_are_moved_together() -> None:
    """The executor computes from the committed rows, so the text shows whether they are those of the path."""
    params = SamplingParams(max_tokens=30, temperature=1.5, mode="linear_spec", block_length=6, tree_width=20, seed=1)
    moved: list[tuple[int, list[int]]] = []
    texts = []
    for moves in (True, False):
        bench = Recorder(max_batch=1, end=False)
        move = bench.executor.pool.move_rows

        def noting(slot: int, start: int, sources: list[int], move: Any = move if moves else None) -> None:
            moved.append((start, sources))
            if move is not None:
                move(slot, start, sources)

        bench.executor.pool.move_rows = noting  # type: ignore[method-assign,assignment]
        bench.submit((2, 3), params)
        bench.run()
        texts.append(bench.texts[0])
    ar = Recorder(max_batch=1, end=False)
    ar.submit((2, 3), SamplingParams(max_tokens=30, temperature=1.5, mode="ar", seed=1))
    ar.run()
    assert texts[0] == ar.texts[0] != texts[1]
    assert all(source > start + place for start, sources in moved for place, source in enumerate(sources))


def test_a_tree_that_fills_the_context_stays_within_its_rows() -> None:
    """Beside the last tokens of a text there is room for a narrower tree only."""
    bench = Recorder(max_batch=2, capacity=24, end=False, limit_rows=48)
    expected = {}
    for prompt in ((2,) * 4, (3, 5)):
        tokens = 24 - len(prompt)
        params = SamplingParams(max_tokens=tokens, mode="linear_spec", block_length=4, tree_width=16)
        expected[bench.submit(prompt, params)] = greedy_text(prompt, tokens, end=False)
    bench.run()
    assert bench.texts == expected
