"""A checkpoint with random weights, in a published shape (3B, 8B, 14B) or a small one, streamed by tensor.

    python -m scripts.gpu.random_w4a16_checkpoint 8b engines/random-8b

Format, names, sizes and files are those of a quantised checkpoint; the integers are random. Use it to build and audit
engines without the published weights: bytes, kernels and build time do not depend on the values.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from tests.support.random_checkpoint import write_random_tokenizer
from trimode.common.atomic_folder import atomic_folder
from trimode.model.checkpoint import (
    ADAPTER_FOLDER,
    HEAD,
    Checkpoint,
    TensorFiles,
    adapter_shapes,
    linear_shapes,
    vector_shapes,
)
from trimode.model.config import ModelConfig
from trimode.model.quantization import QUANT_CONFIG_FILE
from trimode.quantize.modelopt_format import excluded_modules, hf_quant_config, quantization_config
from trimode.quantize.safetensors_stream import DTYPE_NAMES, TensorSpec, write_tensors


class ModelSizes(NamedTuple):
    """The fields of ``config.json`` that differ between the shapes."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    rope_theta: float = 1e6
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 131072


# 3b, 8b and 14b are the published models, and tiny is the shipped checkpoint.
SHAPES = {
    "tiny": ModelSizes(256, 4, 384, 1e4, 4, 2, 64, 768),
    "250m": ModelSizes(1024, 12, 4096, 1e6, 16, 4, 64, 32768),
    "3b": ModelSizes(3072, 26, 9216),
    "8b": ModelSizes(4096, 34, 14336),
    "14b": ModelSizes(5120, 40, 16384, 1e9),
}
GROUP = 128
RANK = 128
_DRAWN_ROWS = 256
BF16 = np.dtype(ml_dtypes.bfloat16)
# Scales that give the matrices the spread of a trained network's, about 0.02: int4 values have a deviation of 4.6.
SCALE = 0.004


def config_fields(shape: str, layers: int | None, vocab_size: int | None) -> dict[str, Any]:
    """``config.json`` of ``shape``. layers, vocab_size: replace the shape's values, for a smaller checkpoint."""
    sizes = SHAPES[shape]
    return {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": vocab_size or sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": layers or sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": sizes.rope_theta,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "mask_token_id": 100,
        "eos_token_id": 11,
        "bos_token_id": 1,
        "block_size": 32,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }


def write_checkpoint(
    folder: Path,
    shape: str,
    layers: int | None = None,
    vocab_size: int | None = None,
    int4_head: bool = True,
    seed: int = 0,
) -> Path:
    """Write the checkpoint into the new ``folder``. After an error, there is no folder.

    int4_head: whether the head has 4 bits as well.
    """
    fields = config_fields(shape, layers, vocab_size)
    config = ModelConfig.model_validate(fields)
    specs = list(_specs(config, [module for module in linear_shapes(config) if int4_head or module != HEAD]))
    with atomic_folder(folder) as out:
        write_tensors(out, specs, track(_random(specs, seed), f"{shape} weights", total=len(specs)))
        excluded = excluded_modules(int4_head)
        fields["quantization_config"] = quantization_config(excluded)
        (out / QUANT_CONFIG_FILE).write_text(json.dumps(hf_quant_config(GROUP, excluded), indent=2))
        _write_companions(out, fields, seed)
    return folder


class DrawnCheckpoint(Checkpoint):
    """A checkpoint in bf16 whose tensors are drawn whenever they are read: its weights need no disk. Its matrices
    repeat a few rows, since drawing would take most of the time.

    folder: new; ``config.json``, the adapter and the tokenizer are written there. layers: None for the shape's.
    """

    def __init__(self, folder: Path, shape: str, layers: int | None = None, seed: int = 0) -> None:
        folder.mkdir()
        _write_companions(folder, config_fields(shape, layers, None), seed)
        super().__init__(folder, shape)

    def _open_files(self) -> TensorFiles:
        return _DrawnTensors(self.folder, self.config)


class _DrawnTensors(TensorFiles):
    def __init__(self, folder: Path, config: ModelConfig) -> None:
        super().__init__([])
        self._folder = folder
        self._specs = {spec.name: spec for spec in _specs(config, [])}

    def names(self) -> set[str]:
        return set(self._specs)

    def file_of(self, name: str) -> Path:
        return self._folder / name

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        return DTYPE_NAMES[self._specs[name].dtype], self._specs[name].shape

    def read(self, name: str) -> NDArray[Any]:
        return next(_random([self._specs[name]], zlib.crc32(name.encode()), _DRAWN_ROWS))


def _write_companions(folder: Path, fields: dict[str, Any], seed: int) -> None:
    """Write all files of a checkpoint but its weights. fields: of ``config.json``."""
    config = ModelConfig.model_validate(fields)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    adapter = folder / ADAPTER_FOLDER
    adapter.mkdir()
    matrices = [TensorSpec(name, BF16, size) for name, size in adapter_shapes(config, RANK).items()]
    write_tensors(adapter, matrices, _random(matrices, seed + 1))
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": RANK, "lora_alpha": 4 * RANK, "target_modules": ["o_proj"], "bias": "none"}
        )
    )
    write_random_tokenizer(folder, config.vocab_size)


def _specs(config: ModelConfig, int4: Collection[str]) -> Iterator[TensorSpec]:
    """int4: the modules whose matrices have 4 bits."""
    for name, size in vector_shapes(config).items():
        yield TensorSpec(name, BF16, size)
    for module, (rows, columns) in linear_shapes(config).items():
        if module not in int4:
            yield TensorSpec(f"{module}.weight", BF16, (rows, columns))
            continue
        yield TensorSpec(f"{module}.weight", np.dtype(np.uint8), (rows // 2, columns))
        yield TensorSpec(f"{module}.weight_scale", BF16, (rows, columns // GROUP))


def _random(specs: list[TensorSpec], seed: int, drawn: int | None = None) -> Iterator[NDArray[Any]]:
    """drawn: rows of a matrix of floats, which are repeated; None for all."""
    rng = np.random.default_rng(seed)
    for spec in specs:
        if spec.dtype == np.uint8:
            yield np.frombuffer(rng.bytes(spec.bytes), np.uint8).reshape(spec.shape)
        elif spec.name.endswith("weight_scale"):
            yield (SCALE * rng.uniform(0.5, 1.5, spec.shape)).astype(spec.dtype)
        elif "norm" in spec.name:
            yield np.ones(spec.shape, spec.dtype)
        else:
            yield _normal(rng, spec, drawn or spec.shape[0])


def _normal(rng: np.random.Generator, spec: TensorSpec, drawn: int) -> NDArray[Any]:
    """Normal values, drawn in parts to save memory: the generator returns fp32."""
    array = np.empty(spec.shape, spec.dtype)
    for first in range(0, min(drawn, len(array)), 4096):
        part = array[first : min(first + 4096, drawn)]
        part[...] = rng.standard_normal(part.shape, np.float32) * np.float32(0.02)
    for first in range(drawn, len(array), drawn):
        part = array[first : first + drawn]
        part[...] = array[: len(part)]
    return array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="number of layers [default: the shape's]")
    parser.add_argument("--vocab-size", type=int, help="size of the vocabulary [default: the shape's]")
    parser.add_argument("--head", choices=["int4", "16bit"], default="int4")
    arguments = parser.parse_args()
    write_checkpoint(
        arguments.out,
        arguments.shape,
        arguments.layers,
        arguments.vocab_size,
        int4_head=arguments.head == "int4",
    )
    print(arguments.out)


if __name__ == "__main__":
    main()
