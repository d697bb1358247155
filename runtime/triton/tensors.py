"""The models' tensors: names, types and meanings.

``tensorrt_llm`` has the tensors of TensorRT-LLM's ``llmapi`` model and TriMode's own. ``ensemble`` has those of
TensorRT-LLM's older ``ensemble`` model, under which its documentation sends requests; each stands for an input of
``tensorrt_llm``. So clients of both models work unchanged, except for what TriMode lacks.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Dtype = Literal["TYPE_STRING", "TYPE_BOOL", "TYPE_INT32", "TYPE_INT64", "TYPE_UINT64", "TYPE_FP32"]


class Tensor(NamedTuple):
    """field: the field of ``SamplingParams`` that an input sets. many: any number of elements, else one.

    lacking: why an input is refused, if its feature is missing; its ``neutral`` values are accepted.
    """

    name: str
    dtype: Dtype
    field: str | None = None
    many: bool = False
    lacking: str | None = None
    neutral: tuple[Any, ...] = ()

    @property
    def dims(self) -> str:
        return "[ -1 ]" if self.many else "[ 1 ]"


_NO_LORA = "this model has no LoRA adapters except its own draft adapter"
_NO_BEAMS = "beam search is not supported"
_NO_LOGITS = "logits are not returned"
TEXT_INPUT = Tensor("text_input", "TYPE_STRING", many=True)
TENSORRT_LLM_INPUTS = (
    Tensor("streaming", "TYPE_BOOL"),
    Tensor("sampling_param_max_tokens", "TYPE_INT32", "max_tokens"),
    Tensor("sampling_param_temperature", "TYPE_FP32", "temperature"),
    Tensor("sampling_param_top_k", "TYPE_INT32", "top_k"),
    Tensor("sampling_param_top_p", "TYPE_FP32", "top_p"),
    Tensor("sampling_param_seed", "TYPE_UINT64", "seed"),
    Tensor("sampling_param_stop", "TYPE_STRING", "stop", many=True),
    Tensor("sampling_param_frequency_penalty", "TYPE_FP32", "frequency_penalty"),
    Tensor("sampling_param_presence_penalty", "TYPE_FP32", "presence_penalty"),
    Tensor("sampling_param_best_of", "TYPE_INT32", lacking="for several answers send n", neutral=(0, 1)),
    Tensor("sampling_param_exclude_input_from_output", "TYPE_BOOL"),
    Tensor("sampling_param_return_perf_metrics", "TYPE_BOOL"),
    Tensor("return_finish_reason", "TYPE_BOOL"),
    Tensor("return_stop_reason", "TYPE_BOOL"),
    Tensor("return_cumulative_logprob", "TYPE_BOOL"),
    Tensor("stop", "TYPE_BOOL"),
    Tensor("image_url", "TYPE_STRING", many=True, lacking="this model reads text only", neutral=("",)),
    Tensor("lora_id", "TYPE_UINT64", lacking=_NO_LORA, neutral=(0,)),
    Tensor("lora_name", "TYPE_STRING", lacking=_NO_LORA, neutral=("",)),
    Tensor("lora_path", "TYPE_STRING", lacking=_NO_LORA, neutral=("",)),
    Tensor("lora_ckpt_source", "TYPE_STRING", lacking=_NO_LORA, neutral=("",)),
)
TRIMODE_INPUTS = (
    Tensor("n", "TYPE_INT32", "n"),
    Tensor("min_p", "TYPE_FP32", "min_p"),
    Tensor("repetition_penalty", "TYPE_FP32", "repetition_penalty"),
    Tensor("stop_token_ids", "TYPE_INT32", "stop_token_ids", many=True),
    Tensor("ignore_eos", "TYPE_BOOL", "ignore_eos"),
    Tensor("include_stop_str_in_output", "TYPE_BOOL", "include_stop_str_in_output"),
    Tensor("skip_special_tokens", "TYPE_BOOL", "skip_special_tokens"),
    Tensor("max_thinking_tokens", "TYPE_INT32", "max_thinking_tokens"),
    Tensor("mode", "TYPE_STRING", "mode"),
    Tensor("block_length", "TYPE_INT32", "block_length"),
    Tensor("adapter", "TYPE_BOOL", "adapter"),
    Tensor("draft_threshold", "TYPE_FP32", "draft_threshold"),
    Tensor("lookup", "TYPE_BOOL", "lookup"),
    Tensor("tree_width", "TYPE_INT32", "tree_width"),
    Tensor("denoising", "TYPE_STRING", "denoising"),
    Tensor("threshold", "TYPE_FP32", "threshold"),
    Tensor("denoising_steps", "TYPE_INT32", "denoising_steps"),
    Tensor("denoising_top_n", "TYPE_INT32", "denoising_top_n"),
)
# Inputs of the ensemble that no other input stands for.
ENSEMBLE_ONLY_INPUTS = (
    Tensor("bad_words", "TYPE_STRING", "bad", many=True),
    Tensor("beam_width", "TYPE_INT32", lacking=_NO_BEAMS, neutral=(0, 1)),
    Tensor("length_penalty", "TYPE_FP32", lacking=_NO_BEAMS, neutral=(0.0, 1.0)),
    Tensor("min_tokens", "TYPE_INT32", "min_tokens"),
    Tensor("guided_decoding_guide_type", "TYPE_STRING"),
    Tensor("guided_decoding_guide", "TYPE_STRING"),
    Tensor("pad_id", "TYPE_INT32"),
    Tensor("return_log_probs", "TYPE_BOOL", lacking="send return_cumulative_logprob to tensorrt_llm", neutral=(False,)),
    Tensor("return_context_logits", "TYPE_BOOL", lacking=_NO_LOGITS, neutral=(False,)),
    Tensor("return_generation_logits", "TYPE_BOOL", lacking=_NO_LOGITS, neutral=(False,)),
)
OPTIONAL_INPUTS = TENSORRT_LLM_INPUTS + TRIMODE_INPUTS + ENSEMBLE_ONLY_INPUTS
# Optional inputs of the ensemble, and the inputs of tensorrt_llm that they stand for.
ENSEMBLE_INPUTS: dict[str, str] = {
    "max_tokens": "sampling_param_max_tokens",
    "stop_words": "sampling_param_stop",
    "temperature": "sampling_param_temperature",
    "top_k": "sampling_param_top_k",
    "top_p": "sampling_param_top_p",
    "seed": "sampling_param_seed",
    "frequency_penalty": "sampling_param_frequency_penalty",
    "presence_penalty": "sampling_param_presence_penalty",
    "exclude_input_in_output": "sampling_param_exclude_input_from_output",
    "stream": "streaming",
    "num_return_sequences": "n",
    "end_id": "stop_token_ids",
    **{tensor.name: tensor.name for tensor in ENSEMBLE_ONLY_INPUTS},
    **{tensor.name: tensor.name for tensor in TRIMODE_INPUTS if tensor.name not in ("n", "stop_token_ids")},
}
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", many=True),
    Tensor("finish_reason", "TYPE_STRING", many=True),
    Tensor("stop_reason", "TYPE_STRING", many=True),
    Tensor("cumulative_logprob", "TYPE_FP32", many=True),
    Tensor("kv_cache_reused_block", "TYPE_INT32", many=True),
    Tensor("kv_cache_missed_block", "TYPE_INT32", many=True),
    Tensor("kv_cache_alloc_new_blocks", "TYPE_INT32", many=True),
    Tensor("kv_cache_alloc_total_blocks", "TYPE_INT32", many=True),
    Tensor("kv_cache_hit_rate", "TYPE_FP32", many=True),
    Tensor("arrival_time_ns", "TYPE_INT64"),
    Tensor("first_scheduled_time_ns", "TYPE_INT64"),
    Tensor("first_token_time_ns", "TYPE_INT64"),
    Tensor("last_token_time_ns", "TYPE_INT64"),
    Tensor("acceptance_rate", "TYPE_FP32"),
    Tensor("total_accepted_draft_tokens", "TYPE_INT32"),
    Tensor("total_draft_tokens", "TYPE_INT32"),
)
# Always present, so that an ensemble can rely on it.
TEXT_OUTPUT = OUTPUTS[0]
