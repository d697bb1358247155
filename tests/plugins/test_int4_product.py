"""The int4 product, interpreted, against the reference; its bits; the layout against the checkpoint's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from scripts.gpu.kernel_checks import distance
from scripts.gpu.kernel_launch import prepare
from scripts.gpu.kernels_8b import PRODUCTS, Product
from tests.support.kernel_cases import ProductCase, product_cases
from tests.support.kernel_functions import TOLERANCES, int4_product, launch
from trimode.build.graph.int4_tiles import pack_tiles, pair_rows
from trimode.model import int4
from trimode.plugins.kernels import int4_product as kernels
from trimode.plugins.operators import Int4Product, Tactic
from trimode.plugins.operators.int4_product import LEAST_GROUP, LONGEST_UNIT, SPLIT_ROWS, split_count, unit_of
from trimode.plugins.reference import int4_product as reference

SPLIT = ProductCase(9, 16, 70, split=True, rank=24, residual=True, dtype=torch.bfloat16)
by_shape = pytest.mark.parametrize(
    "tactic", Int4Product.TACTICS, ids=lambda tactic: "x".join(map(str, (*tactic.constants.values(), tactic.warps)))
)


def reference_of(inputs: dict[str, Tensor], *, gated: bool) -> Tensor:
    given_ = {name: tensor for name, tensor in inputs.items() if name not in ("counters", "next_weight")}
    return reference.int4_product(**given_, gated=gated)


def check(case: ProductCase) -> None:
    inputs = case.inputs()
    found, _ = int4_product(**inputs, tactic=case.tactic, gated=case.gated)
    assert distance(found, reference_of(inputs, gated=case.gated)) <= TOLERANCES[case.dtype]


@given(product_cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_product_equals_the_reference(case: ProductCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@by_shape
def test_every_tactic_with_more_rows_than_a_tile(tactic: Tactic, dtype: torch.dtype) -> None:
    rows = tactic.constants["BLOCK_M"] + 1
    check(ProductCase(rows, 2, 130, rank=128, residual=True, tactic=tactic, dtype=dtype))


@by_shape
def test_the_gated_activation_in_every_tactic(tactic: Tactic) -> None:
    """With one row more than a tile, and in the last program of a tile that has two parts."""
    rows = tactic.constants["BLOCK_M"] + 1
    check(ProductCase(rows, 2, 272, gated=True, tactic=tactic, dtype=torch.bfloat16))
    if tactic.constants["BLOCK_M"] <= 32:
        check(ProductCase(rows, 16, 144, split=True, gated=True, tactic=tactic, dtype=torch.float16))


def test_pairs_are_the_columns_of_two_matrices() -> None:
    """From the checkpoint's gate and up to the activation: the layout, the scales and the order of the pairs."""
    generator = np.random.default_rng(0)
    half, inner = 40, 64
    integers = generator.integers(-8, 8, (2 * half, inner)).astype(np.int8)
    scale = generator.uniform(0.01, 0.02, (2 * half, inner // 32)).astype(np.float32)
    x = torch.from_numpy(generator.standard_normal((3, inner), np.float32))
    gate, up = (x @ torch.from_numpy(integers * scale.repeat(32, 1)).T.float()).chunk(2, -1)
    packed, factors = pack_tiles(pair_rows(integers, half), 32), pair_rows(scale, half).T.copy()
    found, _ = int4_product(
        x=x, packed=torch.from_numpy(packed), scale=torch.from_numpy(factors), tactic=Int4Product.TACTICS[0], gated=True
    )
    assert distance(found, gate * gate.sigmoid() * up) < TOLERANCES[torch.float32]


@by_shape
@pytest.mark.parametrize("residual", [False, True], ids=["behind a norm", "before a norm"])
def test_the_terms_of_norms_in_every_tactic(tactic: Tactic, residual: bool) -> None:
    """The launch compares ``weighted`` and ``next_squares`` with the reference's."""
    rows = tactic.constants["BLOCK_M"] + 1
    terms = {"normed": not residual, "residual": residual, "for_norm": residual}
    check(ProductCase(rows, 2, 272, **terms, tactic=tactic, dtype=torch.bfloat16))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e4, 1e16])
def test_squares_are_summed_accurately_at_any_size(size: float) -> None:
    """Of a stream whose columns differ by far, from squares of 1e-36 to 1e36."""
    case = ProductCase(3, 1, 200, residual=True, for_norm=True)
    inputs = case.inputs()
    inputs["scale"] *= 0
    inputs["residual"] = torch.randn(3, 200, generator=torch.Generator().manual_seed(1)) * size
    inputs["residual"][:, ::7] *= 100
    int4_product(**inputs, tactic=case.tactic)


@pytest.mark.parametrize("group", [16, 32, 48, 64, 256])
def test_every_group(group: int) -> None:
    unit = unit_of(group)
    assert group % unit == 0
    assert LEAST_GROUP <= unit <= LONGEST_UNIT
    check(ProductCase(3, 5, 130, group=group, dtype=torch.bfloat16))


def rows_of(inputs: dict[str, Tensor], first: int, rows: int, tactic: Tactic, *, gated: bool = False) -> Tensor:
    """The bits of these rows of all outputs, computed in a step of their own."""
    activations = ("x", "narrow", "residual")
    given = {
        name: tensor[first : first + rows].contiguous() if name in activations else tensor.clone()
        for name, tensor in inputs.items()
    }
    if "squares" in given:
        given["squares"] = inputs["squares"][:, first : first + rows].contiguous()
    flags = {name: operand in given for name, operand in FLAGS.items()}
    launched = prepare(Int4Product(**flags, gated=gated), given, tactic)
    launch(launched)
    y, *others = launched.outputs
    if "next_weight" not in given:
        return y.view(torch.int16)
    return torch.cat([y.view(torch.int16), others[0].view(torch.int16), others[1].T.contiguous().view(torch.int16)], 1)


# The operator's flags, and the inputs that they add.
FLAGS = {
    "split": "counters",
    "normed": "squares",
    "adapter": "narrow",
    "residual": "residual",
    "for_norm": "next_weight",
}


@pytest.mark.parametrize("split", [False, True], ids=["one program", "separate programs"])
@pytest.mark.parametrize(("groups", "gated"), [(3, False), (16, False), (16, True)])
def test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_tile(groups: int, gated: bool, split: bool) -> None:
    """Steps of 1 to 128 rows, and a chunk, in every tactic; the matrix of 16 groups is summed in two parts."""
    case = replace(SPLIT, rows=SPLIT_ROWS + 6, groups=groups, split=split, for_norm=True)
    if gated:
        case = replace(case, columns=80, rank=0, residual=False, for_norm=False, normed=True, gated=True)
    inputs = case.inputs()
    *_, chunk = case.operator.tactics(case.node).values()
    expected = rows_of(inputs, 0, SPLIT_ROWS + 6, chunk, gated=gated)
    for first, rows in ((129, 1), (3, 8), (99, 32), (5, 64), (6, SPLIT_ROWS)):
        tactics = case.operator.tactics(replace(case, rows=rows).node).values()
        assert any("STEPS" in tactic.constants for tactic in tactics)
        for tactic in tactics:
            found = rows_of(inputs, first, rows, tactic, gated=gated)
            assert torch.equal(found, expected[first : first + rows]), (tactic, first, rows)


def test_separate_programs_give_the_bits_of_one_program() -> None:
    case = replace(SPLIT, groups=32, rank=0, residual=False, dtype=torch.float32)
    assert case.operator.constants(case.node)["SPLITS"] == 4
    inputs = case.inputs()
    separate, _ = int4_product(**inputs, tactic=SPLIT.tactic)
    one, _ = int4_product(**{name: t for name, t in inputs.items() if name != "counters"}, tactic=SPLIT.tactic)
    assert torch.equal(separate, one)


def test_parts_and_their_order_depend_on_the_matrix_alone() -> None:
    """The number of parts is a constant of the kernel that no number of rows and no tactic changes."""
    for product in PRODUCTS.values():
        constants = [product.operator.constants(product.node(rows)) for rows in (1, 16, 64, 65, 4096)]
        assert all(found == constants[0] for found in constants)
        splits = constants[0]["SPLITS"]
        assert splits == split_count(product.inner, product.columns, 128)
        assert product.operator.split == (splits > 1)
        for tactic in product.operator.tactics(product.node(1)).values():
            assert tactic.constants.keys() - {"STEPS"} == {"BLOCK_M", "BLOCK_N"}
            parts = [product.operator.grid(product.node(rows), tactic)[2] for rows in (1, SPLIT_ROWS, SPLIT_ROWS + 1)]
            assert parts == [splits, splits, 1]
    assert {name: split_count(p.inner, p.columns, 128) for name, p in PRODUCTS.items()} == {
        "qkv": 4,
        "o": 4,
        "o with adapter": 4,
        "gate_up": 1,
        "down": 8,
    }


def test_a_tactic_for_steps_is_used_for_steps_only() -> None:
    """It is compiled, but neither a chunk nor a number of rows that is not known has it."""
    for product in (PRODUCTS["down"], PRODUCTS["gate_up"]):
        _check_the_tactic_for_steps(product)


def _check_the_tactic_for_steps(product: Product) -> None:
    node = product.node(1)
    compiled = product.operator.compiled_tactics(node)
    for_steps = {number for number, tactic in compiled.items() if "STEPS" in tactic.constants}
    assert len(for_steps) == 2
    assert for_steps <= product.operator.tactics(product.node(SPLIT_ROWS)).keys()
    others = compiled.keys() - for_steps
    assert product.operator.tactics(product.node(SPLIT_ROWS + 1)).keys() == others
    for x in ((-1, product.inner), (1, -1, product.inner), (-1, -1, product.inner)):
        unknown = node._replace(fixed={**node.fixed, "x": x})
        assert for_steps <= product.operator.compiled_tactics(unknown).keys()
        assert product.operator.tactics(unknown).keys() == others


def test_the_counters_are_zero_after_each_launch() -> None:
    """So the same buffer serves all products, and a graph can be replayed."""
    inputs = SPLIT.inputs()
    first, _ = int4_product(**inputs, tactic=SPLIT.tactic)
    assert not inputs["counters"].any()
    again, _ = int4_product(**inputs, tactic=Int4Product.TACTICS[1])
    assert torch.equal(first, again)


@pytest.mark.parametrize("missing", [0, 1])
def test_only_the_last_program_of_a_tile_writes_it(missing: int) -> None:
    """Without the programs of one part, a tile stays unwritten and its counter shows how many arrived."""
    launched = prepare(SPLIT.operator, SPLIT.inputs(), SPLIT.tactic)
    splits = launched.constants["SPLITS"]
    assert launched.grid[2] == splits == 2
    launch(launched._replace(grid=(*launched.grid[:2], splits - 1 + missing)))
    y, _, counters = launched.outputs
    assert y.isnan().all() == (missing == 0)
    used = launched.grid[0] * launched.grid[1]
    assert counters[:used].tolist() == [0 if missing else 1] * used
    assert not counters[used:].any()


def test_counters_suffice_for_every_tactic() -> None:
    for product in PRODUCTS.values():
        for tactic in product.operator.tactics(product.node(SPLIT_ROWS)).values():
            row_tiles, strips, _ = product.operator.grid(product.node(SPLIT_ROWS), tactic)
            assert row_tiles * strips <= Int4Product.counters(product.columns)


def test_the_default_tactic_has_a_kernel_and_holds_all_rows_of_a_step() -> None:
    for product in PRODUCTS.values():
        for rows in (1, 16, 17, 32, 33, 64, 65, 256, 4096):
            node = product.node(rows)
            tactics = product.operator.tactics(node)
            block_m = tactics[product.operator.default_tactic(node, tactics.keys())].constants["BLOCK_M"]
            assert block_m >= min(rows, 64)
            for only in tactics:
                assert product.operator.default_tactic(node, {only}) == only


@pytest.mark.parametrize(
    ("name", "rows", "block_n", "warps", "steps"),
    [
        ("gate_up", 128, 128, 4, True),
        ("gate_up", 129, 128, 8, False),
        ("down", 128, 128, 4, True),
        ("down", 129, 64, 4, False),
        ("qkv", 33, 64, 4, True),
        ("o", 256, 64, 4, False),
    ],
)
def test_the_default_tactic_of_many_rows(name: str, rows: int, block_n: int, warps: int, steps: bool) -> None:
    """As measured on an H100 (docs/results-h100.md)."""
    product = PRODUCTS[name]
    tactics = product.operator.tactics(product.node(rows))
    tactic = tactics[product.operator.default_tactic(product.node(rows), tactics)]
    assert (tactic.constants["BLOCK_M"], tactic.constants["BLOCK_N"], tactic.warps) == (64, block_n, warps)
    assert ("STEPS" in tactic.constants) == steps


@pytest.mark.parametrize("group", [16, 48, 64, 128])
@pytest.mark.parametrize("columns", [96, 128, 130])
def test_the_layout_holds_the_checkpoints_weights(columns: int, group: int) -> None:
    weight = np.random.default_rng(0).standard_normal((columns, 4 * group)).astype(np.float32)
    integers, scale = int4.quantize(weight, group)
    tiles = pack_tiles(integers, group)
    node = Int4Product().node(rows=1, inner=4 * group, columns=columns, group=group)
    assert tiles.shape == node.shapes["packed"]
    found = reference.dequantize(torch.from_numpy(tiles), torch.from_numpy(scale.T.copy()))
    assert np.array_equal(found, int4.dequantize(integers, scale).T)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "bf16 by fma"])
def test_the_assembly_unpacks_exactly(dtype: str) -> None:
    """Its instructions, executed one by one on random words, against the plain form."""
    assembly = {"fp16": kernels._FP16, "bf16": kernels._BF16, "bf16 by fma": kernels._BF16_BY_FMA}[dtype].value
    words = np.random.default_rng(0).integers(0, 2**32, (2, 1000), np.uint32)
    found = execute(assembly, words, np.float16 if dtype == "fp16" else None)
    for j in range(8):
        assert np.array_equal(found[j], (words >> np.uint32(4 * j) & 15).astype(np.float32) - 8)


def execute(assembly: str, words: np.ndarray, half: type | None) -> list[np.ndarray]:
    """The pairs that these instructions make of two words, as fp32. half: fp16; None for bf16."""
    registers: dict[str, np.ndarray] = {"$8": words[0], "$9": words[1]}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full(words.shape[1], int(name, 0), np.uint32)

    def floats(bits: np.ndarray) -> np.ndarray:
        halves = np.stack([bits & 0xFFFF, bits >> 16]).astype(np.uint16)
        if half:
            return halves.view(half).astype(np.float32)
        return (halves.astype(np.uint32) << 16).view(np.float32)

    def bits(pair: np.ndarray) -> np.ndarray:
        low, high = pair.astype(half).view(np.uint16) if half else (pair.view(np.uint32) >> 16)
        return low.astype(np.uint32) | high.astype(np.uint32) << 16

    for line in assembly.replace("{", "").replace("}", "").split(";"):
        name, *rest = line.split(maxsplit=1)[:2] or [""]
        operands = [operand.strip() for operand in "".join(rest).split(",")]
        kind = name.split(".")[0]
        if kind == "mov":
            registers[operands[0]] = value(operands[1])
        elif kind == "prmt":
            joined = np.stack([value(operands[1]).view(np.uint8).reshape(-1, 4)[:, i] for i in range(4)])
            joined = np.concatenate([joined, value(operands[2]).view(np.uint8).reshape(-1, 4).T])
            chosen = [joined[int(operands[3], 16) >> (4 * i) & 15] for i in range(4)]
            registers[operands[0]] = np.stack(chosen, axis=1).copy().view(np.uint32)[:, 0]
        elif kind == "shr":
            registers[operands[0]] = value(operands[1]) >> value(operands[2])
        elif kind == "lop3":
            assert operands[4] == "0xea"  # a & b | c
            registers[operands[0]] = value(operands[1]) & value(operands[2]) | value(operands[3])
        elif kind == "add":
            registers[operands[0]] = bits(floats(value(operands[1])) + floats(value(operands[2])))
        elif kind == "fma":
            a, b, c = (floats(value(operand)) for operand in operands[1:])
            registers[operands[0]] = bits(a * b + c)
        else:
            assert kind in ("", ".reg") or line.split()[:1] == [".reg"], line
    return [floats(registers[f"${j}"]) for j in range(8)]
