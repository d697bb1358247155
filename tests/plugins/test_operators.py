"""The operators' descriptions: usable without any package, and consistent with each other and with the kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trimode.plugins.compilation import kernel_of
from trimode.plugins.operators import (
    OPERATORS,
    AllReduce,
    Attend,
    DenseProduct,
    Embed,
    Head,
    Int4Product,
    KvWrite,
    MergeCandidates,
    MergeSplits,
    Node,
    QkvProduct,
    RmsNorm,
    Rotations,
    SelectRows,
    SwiGlu,
)
from trimode.plugins.operators.attention import SPLIT_STEP, split_count
from trimode.plugins.operators.head_product import Int4Head
from trimode.plugins.operators.int4_product import TILE_COLUMNS

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"kv_heads": 8, "group": 4, "head_dim": 128}
NODES: dict[str, Node] = {
    "KvWrite": KvWrite.node(batch=2, step=5, capacity=64, **SIZES),
    **{
        name: Attend(pattern).node(batch=2, step=5, capacity=64, splits=16, **SIZES)
        for name, pattern in (
            ("AttendCausal", "causal"),
            ("AttendBidirectional", "bidirectional"),
            ("AttendMasked", "masked"),
        )
    },
    **{
        f"MergeSplits{suffix}": MergeSplits(output_scale=bool(suffix)).node(batch=2, step=5, splits=16, **SIZES)
        for suffix in ("", "Scaled")
    },
    **{
        name: operator.node(rows=10, inner=512, columns=384, rank=16)
        for name, operator in OPERATORS.items()
        if isinstance(operator, Int4Product) and not isinstance(operator, QkvProduct | Head)
    },
    **{
        name: operator.qkv_node(batch=2, step=5, capacity=64, inner=512, **SIZES)
        for name, operator in OPERATORS.items()
        if isinstance(operator, QkvProduct)
    },
    "Embed": Embed().node(batch=2, step=5, vocabulary=1000, width=512),
    "EmbedForNorm": Embed(for_norm=True).node(batch=2, step=5, vocabulary=1000, width=512),
    "Rotations": Rotations.node(batch=2, step=5, head_dim=128, scales=16, length=16384),
    "RmsNorm": RmsNorm.node(rows=10, width=512),
    "SwiGlu": SwiGlu.node(rows=10, width=1536),
    **{
        name: operator.node(batch=2, step=5, inner=512, columns=384, rank=16)
        for name, operator in OPERATORS.items()
        if isinstance(operator, DenseProduct)
    },
    "AllReduce": AllReduce().node(batch=2, step=5, width=512, ranks=2),
    "AllReduceForNorm": AllReduce(for_norm=True).node(batch=2, step=5, width=512, ranks=2),
    "SelectRows": SelectRows.node(batch=2, step=5, rows=3, width=512),
    **{
        name: operator.head_node(batch=2, rows=3, inner=512, vocabulary=5000, top_k=4, mask_token=100, asked=7)
        for name, operator in OPERATORS.items()
        if isinstance(operator, Head)
    },
    "MergeCandidates": MergeCandidates.node(batch=2, rows=3, vocabulary=5000, top_k=4),
}


def test_shapes_tactics_grids_and_scalars_need_no_package() -> None:
    """In a fresh process in which only the standard library and TriMode can be imported."""
    program = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        if root not in sys.stdlib_module_names and root != "trimode":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Forbidden())
from trimode.plugins.operators import OPERATORS, Attend, Int4Product

attend = Attend("masked")
node = attend.node(batch=1, step=32, capacity=4096, kv_heads=8, group=4, head_dim=128, splits=16)
print(attend.output_shapes(node), attend.grid(node, attend.tactics(node)[2]), attend.scalar_values(node))
print(attend.kernel_name(node, 2), OPERATORS["AttendMasked"].constants(node))
product = Int4Product(residual=True)
node = product.node(rows=32, inner=4096, columns=6144)
tactic = product.tactics(node)[product.default_tactic(node, product.tactics(node).keys())]
print(product.output_shapes(node), product.grid(node, tactic), product.scalar_values(node))
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        "[(1, 16, 32, 32, 128), (1, 16, 32, 32)] (1, 128, 1) (32, 4096)",
        "AttendMasked.KV_HEADS8.GROUP4.HEAD_DIM128.tactic2 {'KV_HEADS': 8, 'GROUP': 4, 'HEAD_DIM': 128}",
        "[(32, 6144)] (1, 96, 1) (32,)",
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_node_has_every_input_and_gives_every_output(name: str) -> None:
    operator, node = OPERATORS[name], NODES[name]
    assert list(node.shapes) == [operand.name for operand in operator.inputs]
    for operand in operator.inputs:
        assert len(node.shapes[operand.name]) == len(operand.shape)
    assert [len(shape) for shape in operator.output_shapes(node)] == [len(o.shape) for o in operator.outputs]
    assert len(operator.scalar_values(node)) == len(operator.scalars)
    assert node.attributes.keys() == set(operator.attributes)


@pytest.mark.parametrize("name", OPERATORS)
def test_parameters_and_constants_are_the_kernels(name: str) -> None:
    """Every parameter of the kernel is the operator's, a constant, or an input that this operator lacks."""
    operator, node = OPERATORS[name], NODES[name]
    lacking = name.startswith(
        (
            "Attend",
            "MergeSplits",
            "Int4Product",
            "QkvProduct",
            "DenseProduct",
            "Int4Head",
            "DenseHead",
            "Embed",
            "AllReduce",
        )
    )
    known = kernel_of(operator).arg_names
    for tactic in operator.tactics(node).values():
        constants = {**operator.constants(node), **tactic.constants}
        given = [*operator.parameters, *constants]
        assert [argument for argument in known if argument in given] == given
        # Without those of the compilation, and one that most tactics lack.
        absent = set(known) - set(given) - {"CAPABILITY", "STAGES", "STEPS"}
        assert not absent or lacking
        assert absent <= {
            *("step_lengths", "block_mask", "token_mask"),
            *("output_scale", "row_scale", "step", "narrow", "adapter_up", "residual"),
            *("counters", "partial", "counters_out"),
            *("squares", "epsilon", "next_weight", "weighted", "next_squares"),
        }


@pytest.mark.parametrize("splits", [1, 5, 16])
def test_longer_steps_have_fewer_splits(splits: int) -> None:
    for step in range(1, 20 * SPLIT_STEP):
        chunks = -(-step // SPLIT_STEP)
        assert split_count(splits, step) == -(-splits // chunks)


@pytest.mark.parametrize("operator", [Int4Product, QkvProduct, Int4Head], ids=lambda operator: operator.__name__)
def test_a_program_reads_columns_of_one_tile_of_the_layout(operator: type[Int4Product]) -> None:
    """The kernels compute one address of words for all columns of a program."""
    assert all(TILE_COLUMNS % tactic.constants["BLOCK_N"] == 0 for tactic in operator.TACTICS)
