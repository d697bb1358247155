"""The model repository, as written; whether a server takes it is for `test_model.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimode.model.errors import TriModeError
from trimode.runtime.triton.repository import write_repository
from trimode.runtime.triton.tensors import OPTIONAL_INPUTS, OUTPUTS, TEXT_INPUT

# Of TensorRT-LLM's `llmapi` model, config.pbtxt.
THEIR_INPUTS = {
    "text_input", "streaming", "sampling_param_best_of", "sampling_param_temperature", "sampling_param_top_k",
    "sampling_param_top_p", "sampling_param_frequency_penalty", "sampling_param_presence_penalty",
    "sampling_param_max_tokens", "sampling_param_stop", "sampling_param_seed",
    "sampling_param_exclude_input_from_output", "sampling_param_return_perf_metrics", "return_finish_reason",
    "return_stop_reason", "return_cumulative_logprob", "stop",
}  # fmt: skip


def test_what_is_written(tmp_path: Path) -> None:
    engine = tmp_path / 'an "engine"'
    write_repository(engine, tmp_path / "repository", max_batch=3, max_queue=7)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "repository").rglob("*.*"))
    assert written == ["repository/tensorrt_llm/1/model.py", "repository/tensorrt_llm/config.pbtxt"]
    config = (tmp_path / "repository/tensorrt_llm/config.pbtxt").read_text()
    inputs = re.findall(r'^input { name: "(\w+)"', config, re.MULTILINE)
    assert inputs == [tensor.name for tensor in (TEXT_INPUT, *OPTIONAL_INPUTS)]
    assert set(inputs) >= THEIR_INPUTS
    assert re.findall(r'^output { name: "(\w+)"', config, re.MULTILINE) == [tensor.name for tensor in OUTPUTS]
    assert config.count("optional: true") == len(OPTIONAL_INPUTS)
    assert f'{tmp_path.resolve()}/an \\"engine\\""' in config
    assert 'key: "max_batch" value { string_value: "3" }' in config
    assert "decoupled: true" in config


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(TriModeError, match="exists already"):
        write_repository(tmp_path / "engine", tmp_path, max_batch=1, max_queue=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
