"""Constructor options of TensorRT-LLM's ``LLM`` that TriMode lacks: refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimode.common.errors import TriModeError

_PARALLEL = "`trimode build --tp` divides an engine; there is no other parallelism"
_BUILD = "it is chosen when the engine is built: see `trimode build --help`"
_QUANTIZATION = "quantisation is a step before the build: see `trimode quantize --help`"
_REQUEST = "each request chooses its mode: SamplingParams(mode=...)"
_CACHE = "give kv_cache_bytes and prefix_cache_bytes"
_TOKENIZER = "the engine directory holds its tokenizer"
_SCHEDULING = "the scheduler batches prefill and decoding by itself"
_LORA = "the draft adapter is the only adapter"
# Each reason, and the options that it refuses. None, False, and 1 for a size of parallelism change nothing.
_REASONS = {
    name: reason
    for reason, names in (
        (_TOKENIZER, ("tokenizer", "tokenizer_mode", "skip_tokenizer_init", "tokenizer_revision")),
        ("no code of a checkpoint is run", ("trust_remote_code",)),
        ("give a checkpoint folder of that revision", ("revision",)),
        (_PARALLEL, ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "gpus_per_node")),
        (_PARALLEL, ("moe_tensor_parallel_size", "moe_expert_parallel_size", "enable_attention_dp")),
        (_BUILD, ("dtype", "build_config", "max_input_len", "max_num_tokens", "cuda_graph_config", "backend")),
        (_QUANTIZATION, ("quant_config", "calib_config", "load_format")),
        (_CACHE, ("kv_cache_config", "enable_block_reuse")),
        (_REQUEST, ("speculative_config", "decoding_config")),
        (_SCHEDULING, ("scheduler_config", "enable_chunked_prefill", "batching_type")),
        (_LORA, ("lora_config", "enable_lora", "max_loras", "max_lora_rank", "peft_cache_config")),
        ("beam search is not supported", ("max_beam_width",)),
        ("llguidance compiles all grammars", ("guided_decoding_backend",)),
    )
    for name in names
}


def refuse_foreign_options(options: Mapping[str, Any]) -> None:
    """Raise TriModeError for the first option that would change something, and for one that does not exist."""
    for name, value in options.items():
        if name not in _REASONS:
            raise TriModeError(f"LLM has no option {name}")
        if value is None or value is False or (value == 1 and name.endswith(("_parallel_size", "_width"))):
            continue
        raise TriModeError(f"{name} is {value!r}, but TriMode does not take it: {_REASONS[name]}")
