"""What ``LLM`` takes: token ids of any integer type, one input or a list, and its constructor's options."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from trimode.common.errors import TriModeError
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.request.sampling_params import SamplingParams

IDS = [200, 201, 300]
PARAMS = SamplingParams(max_tokens=3)
FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "numpy int64": np.array,
    "numpy uint16": lambda ids: np.array(ids, np.uint16),
    "list of numpy scalars": lambda ids: list(np.array(ids, np.int32)),
    "torch": torch.tensor,
    "torch int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "list of torch scalars": lambda ids: list(torch.tensor(ids)),
}


@pytest.fixture(scope="module")
def llm(random_engine: Path) -> Iterator[EngineLLM]:
    with EngineLLM(random_engine, max_batch_size=2, measure_passes=False) as llm:
        yield llm


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_every_integer_type(llm: EngineLLM, form: str) -> None:
    expected = llm.generate(IDS, PARAMS)
    found = llm.generate(FORMS[form](IDS), PARAMS)
    assert found.prompt_token_ids == IDS
    assert {type(token) for token in found.prompt_token_ids} == {int}
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert llm.generate({"prompt_token_ids": FORMS[form](IDS)}, PARAMS).prompt_token_ids == IDS
    several = llm.generate([FORMS[form](IDS), FORMS[form](IDS[:1])], PARAMS)
    assert [output.prompt_token_ids for output in several] == [IDS, IDS[:1]]


@pytest.mark.parametrize("form", [np.array, torch.tensor])
def test_a_matrix_of_ids_is_a_list_of_prompts(llm: EngineLLM, form: Callable[[Any], Any]) -> None:
    assert [output.prompt_token_ids for output in llm.generate(form([IDS, IDS]), PARAMS)] == [IDS, IDS]


def test_no_inputs(llm: EngineLLM) -> None:
    assert llm.generate([], PARAMS) == []
    assert llm.generate(np.empty((0, 3), int), PARAMS) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (b"abc", "an input is bytes"),
        (bytearray(b"abc"), "an input is bytes"),
        ([b"abc"], "an input is bytes"),
        ({"prompt_token_ids": b"abc"}, "an input is bytes"),
        ([[200, 1.5]], "prompt token 1.5 is outside"),
        ([[200, True]], "prompt token True is outside"),
        ([[np.bool_(True)]], "is outside the model's vocabulary"),
        ([[torch.tensor(True)]], "is outside the model's vocabulary"),
        (np.array([1.0, 2.0]), "an input is of type float64"),
        ([200, "abc"], "prompt token 'abc' is outside"),
        ([-1], "prompt token -1 is outside"),
        ([768], "prompt token 768 is outside"),
        (7, "an input is of type int"),
        (None, "an input is of type NoneType"),
        ({200, 201}, "an input is of type set"),
        ([None], "an input is of type NoneType"),
    ],
)
def test_what_is_no_input(llm: EngineLLM, inputs: Any, message: str) -> None:
    with pytest.raises(TriModeError, match=message):
        llm.generate(inputs, PARAMS)


@pytest.mark.parametrize(
    "others", [{}, {"temperature": 0.7}, {"top_k": 5}, {"temperature": 2.0, "top_k": 50, "seed": 3}]
)
def test_top_p_0_is_greedy(llm: EngineLLM, others: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=16, top_p=0.0, **others)
    assert params.greedy
    greedy = llm.generate(IDS, SamplingParams(max_tokens=16)).outputs[0].token_ids
    assert llm.generate(IDS, params).outputs[0].token_ids == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, but TriMode does not take it: `trimode build --tp`"),
        ({"trust_remote_code": True}, "no code of a checkpoint is run"),
        ({"kv_cache_config": {"max_tokens": 5}}, "give kv_cache_bytes and prefix_cache_bytes"),
        ({"speculative_config": object()}, "each request chooses its mode"),
        ({"dtype": "bfloat16"}, "chosen when the engine is built"),
        ({"max_batchsize": 3}, "LLM has no option max_batchsize"),
    ],
)
def test_options_of_other_libraries_are_refused_with_the_reason(
    random_engine: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TriModeError, match=message):
        EngineLLM(random_engine, **options)


def test_options_that_change_nothing_are_accepted(random_engine: Path) -> None:
    neutral = {"tensor_parallel_size": 1, "trust_remote_code": False, "tokenizer": None, "max_beam_width": 1}
    with EngineLLM(random_engine, measure_passes=False, **neutral) as llm:
        assert llm.generate(IDS, PARAMS).outputs[0].length == 3


def test_nothing_is_printed_to_stdout(random_engine: Path) -> None:
    program = (
        "import sys\n"
        "from trimode import LLM, SamplingParams\n"
        "with LLM(sys.argv[1]) as llm:\n"
        "    llm.generate(['a', 'b'], SamplingParams(max_tokens=2))\n"
        "    llm.generate('a')"
    )
    found = subprocess.run([sys.executable, "-c", program, random_engine], capture_output=True, text=True, check=True)
    assert found.stdout == ""


def test_a_text_with_a_token_that_the_model_lacks_is_refused(random_engine: Path, tmp_path: Path) -> None:
    """The tokenizer may have added tokens past the model's vocabulary."""
    engine = tmp_path / "engine"
    shutil.copytree(random_engine, engine)
    path = engine / "tokenizer" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|new|>"])
    tokenizer.save(str(path))
    with EngineLLM(engine, verify=False, measure_passes=False) as llm:
        innocent = llm.generate_async("What is 60% of 440?", SamplingParams(max_tokens=200, ignore_eos=True))
        message = r"contains '<\|new\|>', token 768 of the tokenizer, which is outside the model's vocabulary of 768"
        for bad in ("Spell <|new|> planet", [{"role": "user", "content": "<|new|>"}], {"prompt": "<|new|>"}):
            with pytest.raises(TriModeError, match=message):
                llm.generate_async(bad)
        assert innocent.result(60).outputs[0].length == 200
