"""The kernels of plugins/ in numbers, without a GPU: what docs/kernels.md shows.

    python scripts/kernel_table.py resources    registers and shared memory of the shipped kernels, from their binaries
    python scripts/kernel_table.py traffic      bytes that each kernel moves on the 8B checkpoint, against its floor
    python scripts/kernel_table.py estimate     a cycle of self-speculation on 8B, pass by pass, estimated

Exit code 1 where a kernel spills, asks for more shared memory than its GPU has, or moves over 1.1 times its floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple, get_args

from trimode.build.roofline import ADAPTER_RANK, CONFIG_8B
from trimode.model.manifest import Real
from trimode.plugins import contracts
from trimode.plugins.contracts import AttentionShape, Constants, Operator, Pattern, ProductShape, Tactic

ATTENTION = AttentionShape(
    kv_heads=CONFIG_8B.num_key_value_heads,
    group=CONFIG_8B.num_attention_heads // CONFIG_8B.num_key_value_heads,
    head_dim=CONFIG_8B.head_dim,
    splits=16,
)


class Shipped(NamedTuple):
    operator: Operator
    constants: Constants
    tactic: Tactic


def shipped() -> Iterator[Shipped]:
    """Every kernel in every tactic; products with the least and with the most that is fused."""
    for tactic in contracts.KV_WRITE_TACTICS:
        yield Shipped(contracts.KV_WRITE, contracts.kv_write_constants(ATTENTION), tactic)
    for pattern in get_args(Pattern):
        for tactic in contracts.ATTEND_TACTICS:
            yield Shipped(contracts.attend(pattern), contracts.attend_constants(ATTENTION), tactic)
    for tactic in contracts.MERGE_TACTICS:
        yield Shipped(contracts.MERGE, contracts.merge_constants(ATTENTION), tactic)
    hidden = CONFIG_8B.hidden_size
    qkv = ProductShape(hidden, CONFIG_8B.query_width + 2 * CONFIG_8B.kv_width)
    adapted = ProductShape(hidden, hidden, input_scale=True, rank=ADAPTER_RANK, residual=True)
    for shape in (qkv, adapted):
        for tactic in contracts.INT4_PRODUCT_TACTICS:
            yield Shipped(contracts.int4_product(shape), contracts.int4_product_constants(shape), tactic)


def print_resources(real: Real, capabilities: list[int]) -> bool:
    """Registers a thread and KiB of shared memory a block, by GPU; what spills says so."""
    from trimode.plugins.compilation import SHARED_MEMORY, compile_operator, resources

    sound = True
    print("| kernel | tactic | warps |", *(f"sm_{capability} |" for capability in capabilities))
    print("|---|---|---|" + "---|" * len(capabilities))
    for operator, constants, tactic in shipped():
        cells = []
        for capability in capabilities:
            kernel = compile_operator(operator, constants, tactic, real, capability)
            used = resources(kernel)
            cell = f"{used.registers} / {kernel.shared_bytes / 1024:.0f}"
            if used.spilled_bytes or used.stack_bytes:
                cell += f" **spills {used.spilled_bytes} bytes**"
            if kernel.shared_bytes > SHARED_MEMORY[capability]:
                cell += " **too much shared memory**"
            sound &= "**" not in cell
            cells.append(cell)
        blocks = " ".join(f"{name[-1]}={value}" for name, value in tactic.constants.items() if name.startswith("BLOCK"))
        print(f"| {operator.name} | {blocks} | {tactic.warps} |", *(f"{cell} |" for cell in cells), flush=True)
    return sound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_resources = commands.add_parser("resources")
    of_resources.add_argument("--real", choices=["fp16", "bf16"], default="fp16")
    of_resources.add_argument("--sm", default="80,86,89,90,100,120,121")
    options = parser.parse_args()
    if options.command == "resources":
        return not print_resources(options.real, [int(capability) for capability in options.sm.split(",")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
