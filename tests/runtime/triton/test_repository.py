"""The model repository as written; `test_model.py` loads it into a server."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from trimode.cli import triton as command
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Limits
from trimode.runtime.triton.repository import write_repository
from trimode.runtime.triton.tensors import OPTIONAL_INPUTS, TEXT_INPUT

# Of TensorRT-LLM's `llmapi` model, config.pbtxt.
THEIR_INPUTS = {
    "text_input": "STRING [ -1 ]", "image_url": "STRING [ -1 ]", "streaming": "BOOL [ 1 ]",
    "sampling_param_best_of": "INT32 [ 1 ]", "sampling_param_temperature": "FP32 [ 1 ]",
    "sampling_param_top_k": "INT32 [ 1 ]", "sampling_param_top_p": "FP32 [ 1 ]",
    "sampling_param_frequency_penalty": "FP32 [ 1 ]", "sampling_param_presence_penalty": "FP32 [ 1 ]",
    "sampling_param_max_tokens": "INT32 [ 1 ]", "sampling_param_stop": "STRING [ -1 ]",
    "sampling_param_seed": "UINT64 [ 1 ]", "sampling_param_exclude_input_from_output": "BOOL [ 1 ]",
    "sampling_param_return_perf_metrics": "BOOL [ 1 ]", "return_finish_reason": "BOOL [ 1 ]",
    "return_stop_reason": "BOOL [ 1 ]", "return_cumulative_logprob": "BOOL [ 1 ]", "stop": "BOOL [ 1 ]",
    "lora_id": "UINT64 [ 1 ]", "lora_name": "STRING [ 1 ]", "lora_path": "STRING [ 1 ]",
    "lora_ckpt_source": "STRING [ 1 ]",
}  # fmt: skip
THEIR_OUTPUTS = {
    "text_output": "STRING [ -1 ]", "finish_reason": "STRING [ -1 ]", "stop_reason": "STRING [ -1 ]",
    "cumulative_logprob": "FP32 [ -1 ]", "kv_cache_reused_block": "INT32 [ -1 ]",
    "kv_cache_missed_block": "INT32 [ -1 ]", "kv_cache_alloc_new_blocks": "INT32 [ -1 ]",
    "kv_cache_alloc_total_blocks": "INT32 [ -1 ]", "kv_cache_hit_rate": "FP32 [ -1 ]",
    "arrival_time_ns": "INT64 [ 1 ]", "first_scheduled_time_ns": "INT64 [ 1 ]", "first_token_time_ns": "INT64 [ 1 ]",
    "last_token_time_ns": "INT64 [ 1 ]", "acceptance_rate": "FP32 [ 1 ]",
    "total_accepted_draft_tokens": "INT32 [ 1 ]", "total_draft_tokens": "INT32 [ 1 ]",
}  # fmt: skip


def declared(kind: str, config: str) -> dict[str, str]:
    found = re.findall(rf'^{kind} {{ name: "(\w+)" data_type: TYPE_(\w+) dims: (\[ -?1 \])', config, re.MULTILINE)
    return {name: f"{dtype} {dims}" for name, dtype, dims in found}


def test_what_is_written(tmp_path: Path) -> None:
    engine = tmp_path / 'an "engine"'
    write_repository(engine, tmp_path / "repository", max_batch=3, max_queue=7)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "repository").rglob("*.*"))
    models = ["repository/ensemble/config.pbtxt", "repository/tensorrt_llm/1/model.py"]
    assert written == [*models, "repository/tensorrt_llm/config.pbtxt"]
    config = (tmp_path / "repository/tensorrt_llm/config.pbtxt").read_text()
    inputs = declared("input", config)
    assert list(inputs) == [tensor.name for tensor in (TEXT_INPUT, *OPTIONAL_INPUTS)]
    assert inputs.items() >= THEIR_INPUTS.items()
    assert declared("output", config) == THEIR_OUTPUTS
    assert config.count("optional: true") == len(OPTIONAL_INPUTS)
    assert f'{tmp_path.resolve()}/an \\"engine\\""' in config
    assert 'key: "max_batch" value { string_value: "3" }' in config
    assert "decoupled: true" in config
    write_repository(engine, tmp_path / "another", max_batch=3, max_queue=7, decoupled=False)
    assert "decoupled: false" in (tmp_path / "another/tensorrt_llm/config.pbtxt").read_text()


# Of TensorRT-LLM's `inflight_batcher_llm` models, ensemble/config.pbtxt: those that its documentation sends.
THEIR_ENSEMBLE = {
    "text_input": "STRING [ -1 ]", "max_tokens": "INT32 [ 1 ]", "bad_words": "STRING [ -1 ]",
    "stop_words": "STRING [ -1 ]", "exclude_input_in_output": "BOOL [ 1 ]", "pad_id": "INT32 [ 1 ]",
    "top_k": "INT32 [ 1 ]", "top_p": "FP32 [ 1 ]", "temperature": "FP32 [ 1 ]", "length_penalty": "FP32 [ 1 ]",
    "repetition_penalty": "FP32 [ 1 ]", "min_tokens": "INT32 [ 1 ]", "presence_penalty": "FP32 [ 1 ]",
    "frequency_penalty": "FP32 [ 1 ]", "seed": "UINT64 [ 1 ]", "return_log_probs": "BOOL [ 1 ]",
    "return_context_logits": "BOOL [ 1 ]", "return_generation_logits": "BOOL [ 1 ]", "beam_width": "INT32 [ 1 ]",
    "num_return_sequences": "INT32 [ 1 ]", "stream": "BOOL [ 1 ]",
    "guided_decoding_guide_type": "STRING [ 1 ]", "guided_decoding_guide": "STRING [ 1 ]",
}  # fmt: skip


def test_the_ensemble(tmp_path: Path) -> None:
    """Each input stands for an input of ``tensorrt_llm``, once."""
    write_repository(tmp_path / "engine", tmp_path / "repository", max_batch=3, max_queue=7)
    config = (tmp_path / "repository/ensemble/config.pbtxt").read_text()
    assert (tmp_path / "repository/ensemble/1").is_dir()
    inputs = declared("input", config)
    assert inputs.items() >= THEIR_ENSEMBLE.items()
    passed_on = dict(re.findall(r'^input_map { key: "(\w+)" value: "(\w+)" }$', config, re.MULTILINE))
    assert set(passed_on.values()) == inputs.keys()
    assert passed_on.keys() <= {tensor.name for tensor in (TEXT_INPUT, *OPTIONAL_INPUTS)}
    assert passed_on["sampling_param_max_tokens"] == "max_tokens"


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(TriModeError, match="exists already"):
        write_repository(tmp_path / "engine", tmp_path, max_batch=1, max_queue=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_takes_the_engines_largest_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = Limits(capacity=96, prefill_step=64, top_k=4, max_batch=4, max_step=64)
    monkeypatch.setattr(command.Manifest, "read", lambda _engine: SimpleNamespace(limits=built))
    run, arguments = CliRunner(), [str(tmp_path / "engine"), str(tmp_path / "repository")]
    assert run.invoke(command.command, arguments).exit_code == 0
    config = (tmp_path / "repository/tensorrt_llm/config.pbtxt").read_text()
    assert 'key: "max_batch" value { string_value: "4" }' in config
    with pytest.raises(TriModeError, match="built for batches of 4; lower it, or build with --max-batch 5"):
        run.invoke(command.command, [*arguments, "--max-batch", "5"], catch_exceptions=False)
