"""The main loop of a listing, and the int4 product's on an H100."""

from __future__ import annotations

import pytest

from scripts.gpu.disassembly import blocking_loads, disassembled, instructions_per_weight, main_loop
from scripts.gpu.kernels_8b import PRODUCTS
from trimode.plugins.compilation import compile_operator


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


@pytest.mark.parametrize(("rows", "most"), [(16, 3.0), (32, 3.0), (64, 3.5)])
def test_a_weight_takes_few_instructions_and_no_load_blocks(rows: int, most: float) -> None:
    """The widest tiles, which the largest matrices have. cp.async fills every tile in the loop."""
    product = PRODUCTS["gate_up"]
    node = product.node(rows)
    tactic = product.operator.tactics(node)[product.operator.default_tactic(node, range(1, 9))]
    assert tactic.constants == {"BLOCK_M": rows, "BLOCK_N": 128}
    constants = product.operator.constants(node)
    kernel = compile_operator(product.operator, constants, tactic, "bf16", 90)
    assert not kernel.resources.spills
    assert instructions_per_weight(kernel, 128 * constants["UNIT"]) <= most
    loop = main_loop(disassembled(kernel))
    assert not blocking_loads(loop)
    assert any("LDGSTS" in line for line in loop)
