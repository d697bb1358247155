"""The simulator: replayed texts take the cycles and the seconds that they must."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from scripts.drafting.cost_table import CostTable
from scripts.drafting.machines import of_estimate, of_h100
from scripts.drafting.recording import BLOCKS, Drafts, Text, read, write
from scripts.drafting.replay import Replay
from scripts.drafting.simulate import POLICIES
from trimode.runtime.decoding.sequence import TREE_RANKS
from trimode.runtime.scheduling.auto_block import HOST_SECONDS, HOST_SECONDS_OF_A_SEQUENCE, seconds_of_a_tree

END, TOKENS = 11, 33
FLAT = CostTable.of("flat", "", lambda engine, _batch, _step: 1e-3 if engine == "ar" else 2e-3)


def text(seed: int, rank: int) -> Text:
    """An answer of which every token is the draft's candidate of this rank."""
    rng = np.random.default_rng(seed)
    answer = np.append(rng.integers(100, 200, TOKENS - 1), END)
    after = np.concatenate([answer, np.full(BLOCKS[-1], 300)])
    drafts = {}
    for block in BLOCKS:
        tokens = np.tile(np.arange(500, 500 + TREE_RANKS, dtype=np.int32), (TOKENS, block - 1, 1))
        for place in range(TOKENS):
            tokens[place, :, rank] = after[place + 1 : place + block]
        log_probs = np.log(np.tile(np.linspace(0.2, 0.06, TREE_RANKS), (TOKENS, block - 1, 1))).astype(np.float32)
        drafts[block] = Drafts(tokens, log_probs)
    return Text(rng.integers(20, 90, 12), answer, drafts)


@pytest.mark.parametrize("block", [4, 16, 32])
def test_right_drafts_take_one_cycle_a_block(block: int) -> None:
    replay = Replay([text(0, rank=0)], FLAT, load=1)
    found = replay.run([0], {"mode": "linear_spec", "block_length": block})
    cycles = math.ceil((TOKENS - 1) / block)
    assert len(found.cycles[0]) == cycles
    steps = cycles + 1  # the prefill is a causal pass
    host = (steps + cycles) * (HOST_SECONDS + HOST_SECONDS_OF_A_SEQUENCE)
    assert found.seconds == pytest.approx(steps * 1e-3 + cycles * 2e-3 + host, abs=1e-9)


def test_a_second_choice_is_found_by_a_tree_only() -> None:
    texts = [text(0, rank=1)]
    block = Replay(texts, FLAT, 1).run([0], {"mode": "linear_spec", "block_length": 8})
    tree = Replay(texts, FLAT, 1).run([0], {"mode": "linear_spec", "block_length": 8, "tree_width": 24})
    assert block.tokens_per_cycle == 1
    assert tree.tokens_per_cycle >= 2
    assert tree.seconds > len(tree.cycles[0]) * (3e-3 + seconds_of_a_tree(1))


@pytest.mark.parametrize("load", [1, 5])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_emits_every_text(name: str, load: int) -> None:
    texts = [text(seed, rank=seed % 2) for seed in range(6)]
    replay = Replay(texts, of_h100(), load)
    options: dict[str, Any] = POLICIES[name]
    for _ in range(2):
        found = replay.run(range(6), options)
        assert [sum(cycle.emitted for cycle in each) for each in found.cycles] == [TOKENS - 1] * 6


def test_a_recording_can_be_kept(tmp_path: Any) -> None:
    texts = [text(seed, rank=0) for seed in range(3)]
    write(texts, tmp_path / "drafts.npz")
    for kept, given in zip(read(tmp_path / "drafts.npz"), texts, strict=True):
        assert (kept.answer == given.answer).all()
        for block in BLOCKS:
            assert (kept.drafts[block].tokens == given.drafts[block].tokens).all()
            np.testing.assert_allclose(kept.drafts[block].log_probs, given.drafts[block].log_probs, rtol=1e-3)


def test_accepted_drafts_are_counted_to_the_answers_end() -> None:
    assert text(0, rank=0).accepted(8) == [min(7, TOKENS - 1 - place) for place in range(TOKENS - 1)]
    assert text(0, rank=1).accepted(8) == [0] * (TOKENS - 1)


def test_the_h100_has_its_measured_passes() -> None:
    """docs/measurements/2026-11-27-h100-check-7.json, 512 rows."""
    table = of_h100()
    for engine, batch, step, milliseconds in (
        ("ar", 1, 1, 2.58),
        ("ar", 1, 32, 3.05),
        ("diffusion", 1, 32, 3.25),
        ("ar", 16, 32, 21.82),
        ("diffusion", 4, 32, 7.30),
    ):
        assert 1e3 * table.seconds(engine, batch, step) == pytest.approx(milliseconds, abs=0.01)  # type: ignore[arg-type]


def test_estimates_grow_with_the_tokens() -> None:
    table = of_estimate("dgx-spark")
    assert table.seconds("ar", 16, 32) > 2 * table.seconds("ar", 1, 32) > 0.03
