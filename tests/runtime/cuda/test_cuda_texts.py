"""Target cuda on a double that interprets the kernels: the shipped checkpoint's tokens equal those of target cpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runtime.cuda.conftest import Engines, Gpu, build_engines
from trimode import LLM, SamplingParams
from trimode.build.cuda.target import CudaTarget
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint
from trimode.runtime.scheduling.pass_cost import PassCost

MODES: list[dict[str, Any]] = [
    {"mode": "ar", "max_tokens": 2},
    {"mode": "linear_spec", "block_length": 8, "max_tokens": 8},
    {"mode": "diffusion", "block_length": 4, "max_tokens": 4},
    {"mode": "auto", "block_length": 8, "max_tokens": 4},
    {"mode": "linear_spec", "block_length": 4, "tree_width": 8, "max_tokens": 4},
]
PROMPT = [{"role": "user", "content": "What is 60% of 440?"}]
OTHER = [{"role": "user", "content": "What is 7 + 8?"}]
PROMPTS = [PROMPT, OTHER, PROMPT, PROMPT, PROMPT]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder = tmp_path_factory.mktemp("tiny")
    quantize_checkpoint(Checkpoint(tiny_checkpoint), folder / "int4", method="rtn", group=64)
    target = CudaTarget(sms=(121,), dtype="fp32", max_batch=2, max_step=32)
    return build_engines(folder / "int4", folder, target, 96)


@pytest.fixture(autouse=True)
def equal_pass_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All passes have the same cost, so that measured costs, which depend on the machine's load, change nothing."""
    for name in ("seconds", "least_seconds"):
        monkeypatch.setattr(PassCost, name, lambda *_: 1e-3)


def tokens(engine: Path) -> list[list[int]]:
    """Of a request in each mode, and of one with a tree, two at a time. The later ones reuse the KV rows of the first
    one's prompt.
    """
    params = [SamplingParams(**options) for options in MODES]
    with LLM(engine, max_batch_size=2, verify=False, measure_passes=False) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]


def test_tokens_in_every_mode(tiny: Engines, gpu: Gpu) -> None:
    gpu(tiny)
    assert tokens(tiny.cuda) == tokens(tiny.cpu)
