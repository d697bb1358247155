"""Roofline of a pass: the shortest time that the memory bandwidth and the tensor cores of a GPU allow.

The *lower bound* is the number of bytes that any implementation must move: every weight of the layers and the head
once, the KV window once, the step's own KV rows, inputs and outputs, and the looked-up rows of the embedding table.
Activations between layers stay on chip.

:func:`published_comparison` compares the lower bound with the speeds that arXiv 2607.05722 reports for the 8B
checkpoint with one request. The report does not state everything that the bound depends on. The assumptions below are
those for which a single efficiency per platform (published speed / bound) explains all nine figures best. Numbers in
parentheses are the root mean square of the logarithms of the residuals:

- Linear self-speculation emits 6.82 tokens per cycle (0.07): the acceptance length on SPEED-Bench with the adapter,
  bonus token included. A pass over a block then takes about as long as an AR pass. With 11.98 tokens per cycle (5.99
  tokens per pass on the report's own tasks) it would take up to twice as long (0.31). The best fit is 6.4 (0.07).
- The head has 16 bits in both FP8 and w4a16 (0.07; 0.09 if it has the layers' bits). AR on DGX Spark then reaches 78
  and 77 % of the lower bound. Only RTX PRO 6000 fits better with the narrow head.
- The context has 1024 rows. They are 2 to 3 % of the bytes, so this value matters little.

A second parameter, a constant time per pass, becomes negative for RTX PRO 6000. The largest residual is -15 %: w4a16
self-speculation on DGX Spark.

The report's "speed of light" is not this bound. The model card presents it as what better sampling could still gain. At
the lower bound it needs 1.6 (GB200) to 5.6 (DGX Spark, FP8) tokens per pass; at the pass times that the published
self-speculation implies, 5.9 to 7.7. DGX Spark's 223 tokens per second in w4a16 are 4.2 tokens per pass (8.3 per cycle)
at the lower bound, and 6.8 per pass at those pass times.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean
from typing import Literal, NamedTuple

from trimode.common.errors import TriModeError
from trimode.engine.precision import Precision
from trimode.model.checkpoint import linear_shapes
from trimode.model.config import ModelConfig, RopeParameters

PublishedMode = Literal["ar", "linear_spec"]
REAL_BYTES = 2  # activations, scales, norms, KV and adapter are fp16 or bf16
INTEGER_BYTES, LOGIT_BYTES = 8, 4
ACCEPTANCE_LENGTH = 6.82  # tokens per cycle, bonus token included: see above
ADAPTER_RANK = 128  # of the published draft adapters
TOP_K = 64


@dataclass(frozen=True)
class GpuModel:
    """compute_capability: 121 is 12.1. bandwidth: bytes/s of device memory. peak: dense 16-bit FLOP/s of the tensor
    cores with fp32 accumulation, at the data sheet's boost clock; cards can exceed this clock. cache: bytes of L2."""

    key: str
    name: str
    compute_capability: int
    bandwidth: float
    peak: float
    cache: int


# From NVIDIA's data sheets and architecture whitepapers. GeForce cards accumulate in fp32 at half rate, others do not.
GPUS: dict[str, GpuModel] = {
    gpu.key: gpu
    for gpu in (
        # The data sheet only states 1 PFLOP/s of sparse FP4. This is an eighth of it, the ratio of the RTX PRO cards.
        # Users measure 97e12 in fp16 (github.com/GuigsEvt/dgx_spark_config, issue 1), so the rate is not halved.
        GpuModel("dgx-spark", "DGX Spark (GB10)", 121, 273e9, 125e12, 24 << 20),
        GpuModel("rtx-pro-6000", "RTX PRO 6000 Blackwell Workstation Edition", 120, 1792e9, 503.8e12, 128 << 20),
        GpuModel("rtx-5090", "GeForce RTX 5090", 120, 1792e9, 209.5e12, 96 << 20),
        GpuModel("rtx-4090", "GeForce RTX 4090", 89, 1008e9, 165.2e12, 72 << 20),
        GpuModel("rtx-3090", "GeForce RTX 3090", 86, 936e9, 71e12, 6 << 20),
        GpuModel("a100-80gb", "A100 80GB SXM", 80, 2039e9, 312e12, 40 << 20),
        GpuModel("h100", "H100 SXM", 90, 3350e9, 989.4e12, 50 << 20),
        # HGX B200 data sheet: 36 PFLOP/s of sparse 16-bit tensor work in eight GPUs; DGX B200's: 64 TB/s in eight.
        GpuModel("b200", "B200 SXM", 100, 8000e9, 2250e12, 126 << 20),
        GpuModel("gb200", "GB200 NVL72, one of its GPUs", 100, 8000e9, 2500e12, 126 << 20),
    )
}


@dataclass(frozen=True)
class WeightFormat:
    """Bits of a weight in the layers and in the head. group: weights below 16 bits that share a scale; 0 to ignore the
    scales.
    """

    layer_bits: int
    head_bits: int
    group: int = 0


FORMATS = {"bf16": WeightFormat(16, 16), "fp8": WeightFormat(8, 16), "w4a16": WeightFormat(4, 16, group=128)}


@dataclass(frozen=True)
class PassShape:
    """A pass: ``step`` tokens for each of ``batch`` sequences, each with ``window`` KV rows (including the step's own),
    logits for ``rows`` tokens of each and ``top_k`` candidates for each row. adapter_rank: 0 without the draft adapter.
    """

    batch: int
    step: int
    window: int
    rows: int
    top_k: int
    adapter_rank: int = 0


def find_gpu(key: str) -> GpuModel:
    """Raises TriModeError that names the known GPUs."""
    if key not in GPUS:
        raise TriModeError(f"GPU {key} is not known; known are {', '.join(GPUS)}")
    return GPUS[key]


def uniform_matrix_bytes(config: ModelConfig, weights: WeightFormat) -> int:
    """Bytes of all matrices with one format in every layer."""
    head = config.vocab_size * config.hidden_size
    return _matrix_bytes(_layer_weights(config), weights.layer_bits, weights.group) + _matrix_bytes(
        head, weights.head_bits, weights.group
    )


def stored_matrix_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes of all matrices of an engine, each in its own type."""
    return sum(
        _matrix_bytes(rows * columns, 4 if precision.matrices[module] == "int4" else 16, precision.group or 0)
        for module, (rows, columns) in linear_shapes(config).items()
    )


def least_bytes(config: ModelConfig, shape: PassShape, matrix_bytes: int) -> int:
    """Bytes that a pass must move through device memory; ``matrix_bytes`` are those of the weight matrices."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    norms = REAL_BYTES * hidden * (2 * layers + 1)
    adapter = REAL_BYTES * _adapter_weights(config, shape.adapter_rank)
    kv_row = REAL_BYTES * 2 * config.kv_width * layers
    inputs = REAL_BYTES * shape.step * hidden + INTEGER_BYTES * (2 * shape.step + shape.rows + 1)
    outputs = shape.rows * (shape.top_k * (LOGIT_BYTES + INTEGER_BYTES) + LOGIT_BYTES)
    per_sequence = kv_row * (shape.window + shape.step) + inputs + outputs
    return norms + matrix_bytes + adapter + shape.batch * per_sequence


def least_flops(config: ModelConfig, shape: PassShape) -> int:
    """FLOPs of a pass, counting a multiplication and an addition as two; every token attends to the whole window."""
    weights = _layer_weights(config) + _adapter_weights(config, shape.adapter_rank)
    attention = 4 * shape.window * config.query_width * config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size
    return shape.batch * (shape.step * (2 * weights + attention) + shape.rows * head)


def pass_seconds(gpu: GpuModel, moved: int, flops: int) -> float:
    """The shortest time of a pass in seconds: the larger of memory time and tensor-core time, which overlap."""
    return max(moved / gpu.bandwidth, flops / gpu.peak)


def tokens_per_second(
    gpu: GpuModel,
    config: ModelConfig,
    weights: WeightFormat,
    mode: PublishedMode,
    *,
    window: int,
    block_length: int = 32,
    acceptance_length: float = ACCEPTANCE_LENGTH,
) -> float:
    """Tokens per second of one request at the lower bound. ``ar``: one token per pass. ``linear_spec``:
    ``acceptance_length`` tokens per cycle, which is a draft (adapter on) and a verification (adapter off) of a block.
    """

    matrix_bytes = uniform_matrix_bytes(config, weights)

    def seconds(step: int, rank: int) -> float:
        shape = PassShape(1, step, window, step, TOP_K, rank)
        return pass_seconds(gpu, least_bytes(config, shape, matrix_bytes), least_flops(config, shape))

    if mode == "ar":
        return 1 / seconds(1, 0)
    return acceptance_length / (seconds(block_length, ADAPTER_RANK) + seconds(block_length, 0))


class Comparison(NamedTuple):
    """Tokens per second: published, at the lower bound, and predicted (the bound times the platform's efficiency)."""

    gpu: str
    weights: str
    mode: PublishedMode
    published: float
    bound: float
    ratio: float  # published / bound
    predicted: float
    residual: float  # published / predicted - 1


# The sizes of Nemotron-Labs-Diffusion-8B, as its config.json has them.
CONFIG_8B = ModelConfig(
    model_type="nemotron_labs_diffusion",
    vocab_size=131072,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=34,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=262144,
    rms_norm_eps=1e-5,
    rope_parameters=RopeParameters(
        rope_type="yarn", rope_theta=1e6, factor=16, original_max_position_embeddings=16384, llama_4_scaling_beta=0.1
    ),
    mask_token_id=100,
    eos_token_id=(11,),
    bos_token_id=1,
)
CONTEXT = 1024  # KV rows: see above
PUBLISHED: tuple[tuple[str, str, PublishedMode, float], ...] = (
    ("gb200", "fp8", "ar", 256),
    ("gb200", "fp8", "linear_spec", 851),
    ("rtx-pro-6000", "fp8", "ar", 80),
    ("rtx-pro-6000", "fp8", "linear_spec", 277),
    ("rtx-pro-6000", "w4a16", "linear_spec", 525),
    ("dgx-spark", "fp8", "ar", 24.7),
    ("dgx-spark", "fp8", "linear_spec", 77.5),
    ("dgx-spark", "w4a16", "ar", 41.8),
    ("dgx-spark", "w4a16", "linear_spec", 112.5),
)


def published_comparison() -> tuple[Comparison, ...]:
    """Each published speed and its lower bound. A platform's efficiency is the geometric mean of its ratios, which is
    the least-squares fit of their logarithms.
    """
    bounds = [
        tokens_per_second(GPUS[gpu], CONFIG_8B, FORMATS[weights], mode, window=CONTEXT)
        for gpu, weights, mode, _ in PUBLISHED
    ]
    ratios: dict[str, list[float]] = {}
    for (gpu, _, _, published), bound in zip(PUBLISHED, bounds, strict=True):
        ratios.setdefault(gpu, []).append(published / bound)
    rows = []
    for (gpu, weights, mode, published), bound in zip(PUBLISHED, bounds, strict=True):
        predicted = bound * geometric_mean(ratios[gpu])
        rows.append(
            Comparison(gpu, weights, mode, published, bound, published / bound, predicted, published / predicted - 1)
        )
    return tuple(rows)


def _layer_weights(config: ModelConfig) -> int:
    attention = 2 * (config.query_width + config.kv_width)  # q and o, k and v
    return config.num_hidden_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def _adapter_weights(config: ModelConfig, rank: int) -> int:
    return config.num_hidden_layers * rank * (config.query_width + config.hidden_size)


def _matrix_bytes(weights: int, bits: int, group: int) -> int:
    scales = weights // group if group and bits < 16 else 0
    return weights * bits // 8 + REAL_BYTES * scales
