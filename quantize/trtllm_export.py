"""``trimode export --format trtllm``: the autoregressive half as a checkpoint that TensorRT-LLM's ``LLM`` class loads.

The AR network is a Mistral-family decoder: standard tensor names, the standard config with YaRN as ``rope_scaling``,
and for int4 ModelOpt's unified format, which TensorRT-LLM reads. Diffusion and the draft adapter are not exported. No
tensor is changed; one is in memory at a time.

TensorRT-LLM's Mistral has no Llama-4 query scaling. The scaling is 1 up to ``original_max_position_embeddings``, so the
exported ``max_position_embeddings`` is limited to that: within it the network is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt

from trimode.common.atomic_folder import atomic_folder
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress, no_progress
from trimode.model.checkpoint import HEAD, Checkpoint
from trimode.model.config import ModelConfig
from trimode.model.quantization import QUANT_CONFIG_FILE
from trimode.quantize.companions import copy_companions, write_json
from trimode.quantize.modelopt_format import hf_quant_config, quantization_config
from trimode.quantize.safetensors_stream import DTYPE_NAMES, TensorSpec, write_tensors

EXCLUDED = ("lm_head", "model.embed_tokens")
_NUMPY_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class ExportReport(BaseModel):
    """``max_tokens``: longest sequence for which TensorRT-LLM computes the same network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: PositiveInt
    bytes: PositiveInt
    quantization: str
    max_tokens: PositiveInt


def export_trtllm(checkpoint: Checkpoint, out: Path, progress: Progress = no_progress) -> ExportReport:
    """Write the AR-only checkpoint to the folder ``out``. After an error, there is no folder.

    Raises TriModeError if TensorRT-LLM cannot express the checkpoint: an int4 head, or some forms of YaRN.
    """
    _refuse_inexpressible(checkpoint)
    described = checkpoint.described()
    specs = [TensorSpec(_renamed(name), _NUMPY_DTYPES[dtype], shape) for name, (dtype, shape) in described.items()]
    config = trtllm_config(checkpoint.config, _TORCH_DTYPES[described["encoder.embed_tokens.weight"][0]])
    quantization = checkpoint.quantization
    with atomic_folder(out) as folder:
        copy_companions(checkpoint.folder, folder)
        if quantization is not None:
            config["quantization_config"] = quantization_config(EXCLUDED)
            write_json(folder / QUANT_CONFIG_FILE, hf_quant_config(quantization.group_size, EXCLUDED))
        write_json(folder / "config.json", config)
        write_tensors(folder, specs, _arrays(checkpoint, len(specs), progress))
    return ExportReport(
        tensors=len(specs),
        bytes=sum(spec.bytes for spec in specs),
        quantization="none" if quantization is None else quantization.quant_algo,
        max_tokens=config["max_position_embeddings"],
    )


def trtllm_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` of the exported checkpoint."""
    rope = config.rope_parameters
    scaling = {
        "rope_type": rope.rope_type,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
    # transformers ignores one without the other; TensorRT-LLM does not.
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    scaled_queries = rope.llama_4_scaling_beta != 0
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": (
            rope.original_max_position_embeddings if scaled_queries else config.max_position_embeddings
        ),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.rope_theta,
        "rope_scaling": scaling,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id[0] if len(config.eos_token_id) == 1 else list(config.eos_token_id),
    }


def _refuse_inexpressible(checkpoint: Checkpoint) -> None:
    rope, source = checkpoint.config.rope_parameters, checkpoint.folder / "config.json"
    if checkpoint.is_int4(HEAD):
        raise TriModeError(
            f"{checkpoint.folder}: {HEAD} is int4, and TensorRT-LLM's head is 16-bit; quantise with --head 16bit"
        )
    if rope.attention_factor is not None:
        raise TriModeError(
            f"{source}: rope_parameters.attention_factor is {rope.attention_factor}; TensorRT-LLM's YaRN has no such "
            "field. Give it as mscale and mscale_all_dim"
        )
    if not rope.truncate:
        raise TriModeError(f"{source}: rope_parameters.truncate is false; TensorRT-LLM's YaRN always truncates")


def _renamed(name: str) -> str:
    return name.replace("encoder.", "model.", 1).replace(f"{HEAD}.", "lm_head.", 1)


def _arrays(checkpoint: Checkpoint, total: int, progress: Progress) -> Iterator[NDArray[Any]]:
    for done, (_, array) in enumerate(checkpoint.tensors(), start=1):
        yield array
        progress("export", done, total)
