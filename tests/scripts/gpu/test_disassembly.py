"""The main loop of a listing, and those of the int4 products on an H100."""

from __future__ import annotations

import pytest

from scripts.gpu.disassembly import blocking_loads, disassembled, instructions_per_weight, main_loop
from scripts.gpu.kernels_8b import PRODUCTS, QKV, qkv_node
from trimode.plugins.compilation import compile_operator
from trimode.plugins.operators import Int4Product, Node


def test_the_main_loop_is_found_in_a_listing() -> None:
    """Neither the loop around it nor a loop without products."""
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   MOV R4, R5 ;
.L_x_2:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0060*/              @P1  BRA `(.L_x_2) ;
        /*0070*/              @P2  BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""
    assert [line.split()[0] for line in main_loop(listing)] == ["LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16", "@P1"]


MATRICES: dict[str, tuple[Int4Product, Node]] = {
    "qkv": (QKV, qkv_node(1, capacity=1)),
    **{name: (PRODUCTS[name].operator, PRODUCTS[name].node(1)) for name in ("o", "gate_up", "down")},
}


@pytest.mark.parametrize(("rows", "most"), [(16, 3.0), (32, 3.0), (64, 3.5)])
@pytest.mark.parametrize("matrix", MATRICES)
def test_a_weight_takes_few_instructions_and_no_load_blocks(matrix: str, rows: int, most: float) -> None:
    """In tiles of 128 columns. cp.async fills every tile in the loop."""
    operator, node = MATRICES[matrix]
    size = {"BLOCK_M": rows, "BLOCK_N": 128}
    tactic = next(tactic for tactic in operator.tactics(node).values() if size.items() <= tactic.constants.items())
    constants = operator.constants(node)
    kernel = compile_operator(operator, constants, tactic, "bf16", 90)
    assert not kernel.resources.spills
    loop = main_loop(disassembled(kernel))
    assert instructions_per_weight(loop, kernel.warps, 128 * constants["UNIT"]) <= most
    assert not blocking_loads(loop)
    assert any("LDGSTS" in line for line in loop)


def test_steps_of_64_rows_have_the_tile_with_fewest_instructions() -> None:
    """In matrices with enough tiles. On an H100, tiles of 64 columns were faster in the others."""
    for operator, node in (MATRICES["gate_up"], MATRICES["down"]):
        step = node._replace(shapes={**node.shapes, "x": (1, 64, node.fixed["x"][-1])})
        step = step._replace(fixed=step.shapes)
        tactics = operator.tactics(step)
        chosen = tactics[operator.default_tactic(step, tactics)]
        assert (chosen.constants["BLOCK_M"], chosen.constants["BLOCK_N"], chosen.warps) == (64, 128, 4)
