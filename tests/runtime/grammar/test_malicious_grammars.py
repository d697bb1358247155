"""Grammars that are costly while an answer is decoded: bounded, and harmless to the requests that run beside them.

Those that are refused when they are compiled are in test_compiler.py.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimode import LLM, GuidedDecodingParams, SamplingParams
from trimode.runtime.request.errors import GrammarError

CHAT = [{"role": "user", "content": "Describe a user as JSON."}]
RECURSIVE = [
    {"type": "object", "properties": {f"k{number}": {"$ref": "#/$defs/a"}}, "required": [f"k{number}"]}
    for number in range(60)
]
KINDS = [
    {
        "type": "object",
        "properties": {"kind": {"const": f"kind{number}"}, "x": {"type": "string"}},
        "required": ["kind"],
    }
    for number in range(400)
]
COSTLY: list[dict[str, Any]] = [
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [*RECURSIVE, {"type": "integer"}]}}}},
    {"json": {"anyOf": KINDS}},
    {"json": {"type": "array", "items": {"type": "array", "minItems": 10**9}, "minItems": 10**9}},
    {"json": {"type": "string", "minLength": 10**6, "maxLength": 10**9}},
    {"json": {"type": "string", "pattern": "^(a+)+(b|a)*(a*)*$"}},
    {"regex": "(a|b)*a(a|b){200}c"},
    {"regex": "[a-z]{1000000}"},
    {"regex": "(([a-z]{1,100}){1,100}){1,100}"},
    {"grammar": 'start: s\ns: s s | "a" | "a" s | s "a" |'},
    {"grammar": "start: " + " ".join(f"a{i}" for i in range(300)) + "".join(f'\na{i}: "x"?' for i in range(300))},
]


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, max_batch_size=8, measure_passes=False) as llm:
        yield llm


@pytest.mark.parametrize("mode", ["ar", "linear_spec"])
def test_costly_grammars_end_or_fail_alone_within_bounds(llm: LLM, mode: str) -> None:
    harmless = SamplingParams(max_tokens=60, mode="linear_spec")
    alone = llm.generate(CHAT, harmless).outputs[0].text
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    costly = [
        llm.generate_async(
            CHAT, SamplingParams(max_tokens=60, guided_decoding=GuidedDecodingParams(**fields), mode=mode)
        )
        for fields in COSTLY
    ]
    beside = [llm.generate_async(CHAT, harmless) for _ in range(4)]
    assert [each.result().outputs[0].text for each in beside] == [alone] * 4
    for fields, answer in zip(COSTLY, costly, strict=True):
        try:
            assert answer.result().outputs[0].finish_reason in ("stop", "length"), fields
        except GrammarError as error:
            assert "limits of time and memory" in str(error)  # noqa: PT017 - some texts stay within the limits
    assert time.process_time() - begun < 60  # CPU time: they take about 2 seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB
