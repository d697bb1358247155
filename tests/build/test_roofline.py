"""The roofline: bytes and FLOPs against counts by tensor, times against hand calculations, figures of the docstring."""

from __future__ import annotations

from dataclasses import replace
from math import log, prod

import pytest

from trimode.build.roofline import (
    ACCEPTANCE_LENGTH,
    CONFIG_8B,
    FORMATS,
    GPUS,
    PUBLISHED,
    PassShape,
    WeightFormat,
    find_gpu,
    least_bytes,
    least_flops,
    pass_seconds,
    published_comparison,
    stored_matrix_bytes,
    tokens_per_second,
    uniform_matrix_bytes,
)
from trimode.common.errors import TriModeError
from trimode.engine.precision import Precision
from trimode.model.checkpoint import linear_shapes
from trimode.model.config import ModelConfig

ONE_TOKEN = PassShape(batch=1, step=1, window=1, rows=1, top_k=1)
BLOCK = PassShape(batch=2, step=32, window=1024, rows=32, top_k=64)
SPARK = GPUS["dgx-spark"]
# [out, in] of an 8B layer's matrices: q, k, v, o, gate, up, down.
LAYER_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
SIZES = {
    "3B": ({"hidden_size": 3072, "num_hidden_layers": 26, "intermediate_size": 9216}, 3.83e9, 104),
    "8B": ({}, 8.49e9, 136),
    "14B": ({"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 16384}, 13.51e9, 160),
}


def uniform_bound(config: ModelConfig, shape: PassShape, weights: WeightFormat) -> int:
    return least_bytes(config, shape, uniform_matrix_bytes(config, weights))


@pytest.mark.parametrize("size", SIZES)
def test_a_pass_reads_all_parameters_but_the_embedding(size: str) -> None:
    changes, parameters, _ = SIZES[size]
    config = CONFIG_8B.model_copy(update=changes)
    embedding = 131072 * config.hidden_size
    assert uniform_bound(config, ONE_TOKEN, FORMATS["bf16"]) == pytest.approx(2 * (parameters - embedding), rel=2e-3)


@pytest.mark.parametrize("size", SIZES)
def test_a_kv_row_has_the_published_size(size: str) -> None:
    changes, _, kib = SIZES[size]
    config = CONFIG_8B.model_copy(update=changes)
    longer = replace(BLOCK, window=BLOCK.window + 1)
    precision = FORMATS["w4a16"]
    assert (
        uniform_bound(config, longer, precision) - uniform_bound(config, BLOCK, precision) == BLOCK.batch * kib * 1024
    )


def test_one_more_token_writes_a_kv_row_and_reads_an_embedding_row() -> None:
    longer = replace(ONE_TOKEN, step=2)
    more = uniform_bound(CONFIG_8B, longer, FORMATS["fp8"]) - uniform_bound(CONFIG_8B, ONE_TOKEN, FORMATS["fp8"])
    assert more == 136 * 1024 + 4096 * 2 + 8 + 8  # KV row, embedding row, id and position


def test_an_int4_weight_takes_four_bits_and_a_share_of_a_scale() -> None:
    layers, head = 34 * sum(map(prod, LAYER_8B)), 131072 * 4096
    wide = uniform_bound(CONFIG_8B, BLOCK, WeightFormat(16, 16))
    assert wide - uniform_bound(CONFIG_8B, BLOCK, FORMATS["w4a16"]) == layers * (16 - 4.125) / 8
    assert wide - uniform_bound(CONFIG_8B, BLOCK, WeightFormat(4, 4, group=32)) == (layers + head) * (16 - 4.5) / 8
    assert wide - uniform_bound(CONFIG_8B, BLOCK, FORMATS["fp8"]) == layers


def test_every_matrix_of_an_engine_counts_in_its_own_type() -> None:
    shapes = linear_shapes(CONFIG_8B)
    mixed = {module: "int4" if ".mlp." in module else "bf16" for module in shapes}
    precision = Precision(matrices=mixed, embedding="bf16", activations="bf16", kv_cache="bf16", group=64)
    mlp = sum(rows * columns for module, (rows, columns) in shapes.items() if ".mlp." in module)
    others = sum(rows * columns for module, (rows, columns) in shapes.items() if ".mlp." not in module)
    assert stored_matrix_bytes(CONFIG_8B, precision) == mlp * 4.25 / 8 + 2 * others
    uniform = precision.model_copy(update={"matrices": dict.fromkeys(shapes, "bf16")})
    assert stored_matrix_bytes(CONFIG_8B, uniform) == uniform_matrix_bytes(CONFIG_8B, FORMATS["bf16"])


def test_every_byte_of_a_token() -> None:
    norms = 34 * 2 * 4096 + 4096
    weights = 34 * sum(map(prod, LAYER_8B)) + 131072 * 4096 + norms
    kv_rows = 2 * 136 * 1024  # the one read and the one written
    inputs = 2 * 4096 + 8 * 4  # embedding row; id, position, first KV row, logit row
    outputs = 4 + 8 + 4  # logit, token, log-sum-exp
    assert uniform_bound(CONFIG_8B, ONE_TOKEN, FORMATS["bf16"]) == 2 * weights + kv_rows + inputs + outputs


def test_the_adapter_is_about_36_million_parameters_read_once() -> None:
    with_adapter = replace(BLOCK, adapter_rank=128)
    more = uniform_bound(CONFIG_8B, with_adapter, FORMATS["w4a16"]) - uniform_bound(CONFIG_8B, BLOCK, FORMATS["w4a16"])
    assert more == 34 * 2 * (128 * 4096 + 4096 * 128)
    assert more / 2 == pytest.approx(36e6, rel=0.02)


def test_flops_are_those_of_every_product() -> None:
    tokens = BLOCK.batch * BLOCK.step
    # [m, k] by [k, n]; an attention head has a product with keys and one with values.
    layer = [(tokens, columns, rows) for rows, columns in LAYER_8B]
    layer += [(BLOCK.step, 128, BLOCK.window), (BLOCK.step, BLOCK.window, 128)] * 32 * BLOCK.batch
    layer += [(tokens, 4096, 8), (tokens, 8, 4096)]
    head = (BLOCK.batch * BLOCK.rows, 4096, 131072)
    found = least_flops(CONFIG_8B, replace(BLOCK, adapter_rank=8))
    assert found == 34 * sum(2 * prod(product) for product in layer) + 2 * prod(head)


@pytest.mark.parametrize("field", ["batch", "step", "window", "rows", "top_k", "adapter_rank"])
def test_a_larger_pass_moves_more_bytes(field: str) -> None:
    larger = replace(BLOCK, **{field: getattr(BLOCK, field) + 1})
    assert uniform_bound(CONFIG_8B, larger, FORMATS["w4a16"]) > uniform_bound(CONFIG_8B, BLOCK, FORMATS["w4a16"])
    if field != "top_k":
        assert least_flops(CONFIG_8B, larger) > least_flops(CONFIG_8B, BLOCK)


def test_the_slower_of_memory_and_tensor_cores_bounds_a_pass() -> None:
    assert pass_seconds(SPARK, 546_000_000_000, 1) == pytest.approx(2)
    assert pass_seconds(SPARK, 1, 375_000_000_000_000) == pytest.approx(3)
    assert pass_seconds(SPARK, 546_000_000_000, 375_000_000_000_000) == pytest.approx(3)


def test_autoregression_by_hand() -> None:
    # 8.49 B parameters less 0.54 B of the embedding, 2 bytes each, at 273 GB/s; 15.9 GB leave 1000 KV rows 1 %.
    found = tokens_per_second(SPARK, CONFIG_8B, FORMATS["bf16"], "ar", window=1000)
    assert found == pytest.approx(273 / (2 * (8.49 - 0.537) + 0.139), rel=1e-3)
    # On this GPU, a block is bound by the tensor cores, and a single token by memory.
    found = tokens_per_second(GPUS["rtx-3090"], CONFIG_8B, FORMATS["w4a16"], "ar", window=1)
    assert found == pytest.approx(936e9 / uniform_bound(CONFIG_8B, ONE_TOKEN, FORMATS["w4a16"]), rel=1e-5)


def test_if_memory_bounds_the_pass_speculation_is_half_its_acceptance_times_ar() -> None:
    for gpu in ("dgx-spark", "rtx-pro-6000", "gb200"):
        for precision in FORMATS.values():
            ar = tokens_per_second(GPUS[gpu], CONFIG_8B, precision, "ar", window=512)
            found = tokens_per_second(
                GPUS[gpu], CONFIG_8B, precision, "linear_spec", window=512, acceptance_length=10, block_length=16
            )
            assert 0.98 * 5 * ar < found < 5 * ar


def test_a_long_block_is_bound_by_the_tensor_cores() -> None:
    precision, gpu = FORMATS["w4a16"], GPUS["rtx-3090"]
    times = [
        1 / tokens_per_second(gpu, CONFIG_8B, precision, "linear_spec", window=512, block_length=block)
        for block in (8, 16, 256, 512)
    ]
    assert times[1] < 1.01 * times[0]
    assert times[3] == pytest.approx(2 * times[2], rel=1e-3)


def test_more_context_is_slower_and_more_bandwidth_is_faster() -> None:
    speeds = [tokens_per_second(SPARK, CONFIG_8B, FORMATS["w4a16"], "ar", window=rows) for rows in (1, 4096, 65536)]
    assert speeds == sorted(speeds, reverse=True)
    by_bandwidth = sorted(GPUS.values(), key=lambda gpu: gpu.bandwidth)
    speeds = [tokens_per_second(gpu, CONFIG_8B, FORMATS["w4a16"], "ar", window=1) for gpu in by_bandwidth]
    assert speeds == sorted(speeds)


def test_the_error_for_an_unknown_gpu_lists_the_known_ones() -> None:
    assert find_gpu("dgx-spark").compute_capability == 121
    with pytest.raises(TriModeError, match="tpu-v5") as error:
        find_gpu("tpu-v5")
    assert all(key in str(error.value) for key in GPUS)


def test_the_comparison_agrees_with_the_docstring() -> None:
    rows = published_comparison()
    assert [row[:4] for row in rows] == list(PUBLISHED)
    assert all(row.ratio < 1 for row in rows), "a published speed beats the lower bound"
    residuals = {(row.gpu, row.weights, row.mode): row.residual for row in rows}
    assert min(residuals.values()) == residuals["dgx-spark", "w4a16", "linear_spec"] == pytest.approx(-0.15, abs=0.005)
    assert max(residuals.values()) < 0.09
    # The slope of the squared logarithms is zero at the best efficiency.
    for gpu in {row.gpu for row in rows}:
        assert sum(log(row.published / row.predicted) for row in rows if row.gpu == gpu) == pytest.approx(0, abs=1e-9)
    spark_ar = [row.ratio for row in rows if (row.gpu, row.mode) == ("dgx-spark", "ar")]
    assert spark_ar == pytest.approx([0.78, 0.77], abs=0.005)


def test_with_the_assumed_acceptance_length_passes_of_both_modes_take_equally_long() -> None:
    speeds = {(gpu, mode): speed for gpu, weights, mode, speed in PUBLISHED if weights == "fp8"}
    for gpu in ("gb200", "rtx-pro-6000", "dgx-spark"):
        cycles = speeds[gpu, "linear_spec"] / speeds[gpu, "ar"]
        assert 2 * cycles / ACCEPTANCE_LENGTH == pytest.approx(1, abs=0.09)
        assert 2 * cycles / 11.98 < 0.6


def test_no_single_acceptance_length_turns_the_lower_bounds_into_the_published_limits() -> None:
    speed_of_light = {
        ("gb200", "fp8"): 1471,
        ("rtx-pro-6000", "fp8"): 567,
        ("rtx-pro-6000", "w4a16"): 989,
        ("dgx-spark", "fp8"): 176,
        ("dgx-spark", "w4a16"): 223,
    }
    bounds = {(row.gpu, row.weights): row for row in published_comparison() if row.mode == "linear_spec"}
    per_pass = {key: ACCEPTANCE_LENGTH / 2 * speed / bounds[key].bound for key, speed in speed_of_light.items()}
    assert per_pass["dgx-spark", "w4a16"] == pytest.approx(4.2, abs=0.06)
    assert (min(per_pass.values()), max(per_pass.values())) == pytest.approx((1.6, 5.6), abs=0.05)
    real = [ACCEPTANCE_LENGTH / 2 * speed / bounds[key].published for key, speed in speed_of_light.items()]
    assert (min(real), max(real)) == pytest.approx((5.9, 7.7), abs=0.05)
