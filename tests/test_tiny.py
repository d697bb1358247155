"""The shipped checkpoint through the complete pipeline: real text, real acceptance.

These are small samples of the measurements of `make prove`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.prove.quantization import MODES, score
from scripts.tiny.weak_drafter import write_weak_drafter
from trimode import LLM, CompletionOutput, SamplingParams
from trimode.build.engine_builder import build_engine
from trimode.build.rtx.audit import audit_pass, read_plans
from trimode.build.rtx.target import RtxTarget
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.quantize import CALIBRATION_FILE, quantize_checkpoint

MAX_TOKENS = 200


@pytest.fixture(scope="module")
def w4a16(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint by AWQ, as `make demo` makes it, but calibrated on every fourth text."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = (tiny_checkpoint / CALIBRATION_FILE).read_text(encoding="utf-8").splitlines()
    (folder / "some.jsonl").write_text("\n".join(texts[::4]), encoding="utf-8")
    quantize_checkpoint(
        Checkpoint(tiny_checkpoint), folder / "w4a16", method="awq", group=64, calibration=folder / "some.jsonl"
    )
    return folder / "w4a16"


@pytest.fixture(scope="module")
def llm(w4a16: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    out = tmp_path_factory.mktemp("tiny") / "engine"
    build_engine(Checkpoint(w4a16), out)
    with LLM(out) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(w4a16: Path) -> NemotronLabsDiffusionModel:
    return load_reference(Checkpoint(w4a16))


@pytest.fixture(scope="module")
def prompts(llm: LLM, heldout: list[dict]) -> list[list[int]]:
    """Every tenth held-out problem: all kinds, including long conversations."""
    return encoded(llm, heldout[::10])


def encoded(llm: LLM, records: list[dict]) -> list[list[int]]:
    return [llm.tokenizer.encode(llm.tokenizer.apply_chat_template(record["messages"])) for record in records]


def answers(llm: LLM, prompts: list[list[int]], **options: Any) -> list[CompletionOutput]:
    blocks = {} if options["mode"] == "ar" else {"block_length": 16}
    params = SamplingParams(**{"max_tokens": MAX_TOKENS} | blocks | options)
    return [output.outputs[0] for output in llm.generate(prompts, params)]


def test_the_heldout_set_reaches_past_yarns_original_length(llm: LLM, heldout: list[dict]) -> None:
    original = llm.manifest.model.rope_parameters.original_max_position_embeddings
    lengths = [len(prompt) for prompt in encoded(llm, heldout)]
    assert sum(length > 2 * original for length in lengths) >= 10


@pytest.fixture(scope="module")
def speculated(llm: LLM, prompts: list[list[int]]) -> list[CompletionOutput]:
    return answers(llm, prompts, mode="linear_spec")


def tokens(found: list[CompletionOutput]) -> list[list[int]]:
    return [answer.token_ids for answer in found]


def test_linear_spec_is_ar(llm: LLM, prompts: list[list[int]], speculated: list[CompletionOutput]) -> None:
    expected = tokens(answers(llm, prompts, mode="ar"))
    assert tokens(speculated) == expected
    for options in ({"block_length": 32, "adapter": False}, {"draft_threshold": 0.5}):
        assert tokens(answers(llm, prompts, mode="linear_spec", **options)) == expected


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion"])
def test_tokens_are_the_references(
    llm: LLM, reference: NemotronLabsDiffusionModel, prompts: list[list[int]], mode: str
) -> None:
    decode = {
        "ar": lambda ids: reference.ar_generate(ids, MAX_TOKENS),
        "linear_spec": lambda ids: reference.linear_spec_generate(ids, MAX_TOKENS, block_length=16),
        "diffusion": lambda ids: reference.generate(ids, MAX_TOKENS, block_length=16, threshold=0.9),
    }[mode]
    some = prompts[::3]
    for prompt, answer in zip(some, answers(llm, some, mode=mode), strict=True):
        out, _ = decode(torch.tensor([prompt]))
        assert answer.token_ids == out[0, len(prompt) :].tolist()


def test_the_adapter_raises_acceptance(llm: LLM, prompts: list[list[int]], speculated: list[CompletionOutput]) -> None:
    """Compare the cycles for the same texts. The texts are equal, so the adapter causes the whole difference."""
    without = answers(llm, prompts, mode="linear_spec", adapter=False)
    assert tokens(speculated) == tokens(without)
    cycles = [sum(answer.counts.cycles for answer in many) for many in (speculated, without)]
    assert 1.1 * cycles[0] < cycles[1]


def test_a_weak_drafter_accepts_what_the_published_8b_does_and_trees_help_it(
    tiny_engine: Path, heldout: list[dict], tmp_path: Path
) -> None:
    """Texts are those of the shipped checkpoint, whatever is drafted."""
    write_weak_drafter(tmp_path / "weak")
    quantize_checkpoint(Checkpoint(tmp_path / "weak"), tmp_path / "w4a16", method="rtn", group=64)
    build_engine(Checkpoint(tmp_path / "w4a16"), tmp_path / "engine")
    few = heldout[::24]
    with LLM(tiny_engine, measure_passes=False) as shipped:
        prompts = encoded(shipped, few)
        expected = answers(shipped, prompts, mode="ar")
    with LLM(tmp_path / "engine", measure_passes=False) as weak:
        rates = []
        for options in ({}, {"tree_width": 32}):
            found = answers(weak, prompts, mode="linear_spec", **{"block_length": 32} | options)
            assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
            rates.append(sum(len(each.token_ids) - 1 for each in found) / sum(each.counts.cycles for each in found))
    block, tree = rates
    assert 5 < block - 1 < 7
    assert tree > 1.1 * block


def test_answers_are_mostly_right(speculated: list[CompletionOutput], heldout: list[dict]) -> None:
    expected = [record["answer"] for record in heldout[::10]]
    right = [answer.text == text for answer, text in zip(speculated, expected, strict=True)]
    assert np.mean(right) > 0.85


def test_the_quantisation_report_has_every_modes_rates(llm: LLM, heldout: list[dict]) -> None:
    few = heldout[::120]
    found = {mode: score(llm, mode, options, few) for mode, options in MODES.items()}
    assert found["ar"].tokens_per_forward == found["ar"].tokens_per_cycle == 1
    assert found["linear_spec"].exact_match == found["ar"].exact_match > 0
    for mode in found.keys() - {"ar"}:
        assert 1 < found[mode].tokens_per_forward < found[mode].tokens_per_cycle <= 16


def test_it_compiles_for_gpus_with_every_matrix_fused(w4a16: Path, tmp_path: Path) -> None:
    """AWQ's input scales, a 16-bit head and the adapter are all in these plans."""
    out = tmp_path / "rtx"
    manifest = build_engine(Checkpoint(w4a16), out, target=RtxTarget(sms=(121,)))
    assert {module for module, stored in manifest.precision.matrices.items() if stored != "int4"} == {"diffusion_head"}
    for plan in read_plans(out):
        found = audit_pass(plan, 1, 16, 512)
        assert found.int4_products == found.int4_matrices == 4 * manifest.model.num_hidden_layers
        assert found.lone_dequantisations == 0
