"""The kernels of plugins/ in numbers, without a GPU: what docs/kernels.md shows.

    python -m scripts.gpu.kernel_table resources  registers and shared memory of the shipped kernels, by binary
    python -m scripts.gpu.kernel_table resources --real fp16 --head-dim 64  the same for another type, another head size
    python -m scripts.gpu.kernel_table traffic  bytes that each kernel moves on the 8B checkpoint, against its floor

Exit code 1 where a kernel spills, asks for more shared memory than its GPU has, or moves over 1.1 times its floor in a
step of up to 64 tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

from scripts.gpu.traffic import (
    Asked,
    asked_bytes,
    attend_traffic,
    int4_product_traffic,
    kv_write_traffic,
    merge_traffic,
    moved_bytes,
    needed_bytes,
)
from trimode.build.audit.roofline import ADAPTER_RANK, CONFIG_8B, REAL_BYTES
from trimode.engine.precision import Real
from trimode.plugins import contracts
from trimode.plugins.contracts import AttentionShape, Constants, Operator, Pattern, ProductShape, Tactic

STEPS, WINDOWS, LIMIT = (1, 8, 32, 64, 256), (512, 4096, 32768), 1.1
# Rows of a step, or of a product, that are bound by bytes; more are bound by arithmetic.
LONGEST_HELD = 64

ATTENTION = AttentionShape(
    kv_heads=CONFIG_8B.num_key_value_heads,
    group=CONFIG_8B.num_attention_heads // CONFIG_8B.num_key_value_heads,
    head_dim=CONFIG_8B.head_dim,
    splits=16,
)


_HIDDEN, _INNER = CONFIG_8B.hidden_size, CONFIG_8B.intermediate_size
PRODUCTS_8B = {
    "qkv": ProductShape(_HIDDEN, CONFIG_8B.query_width + 2 * CONFIG_8B.kv_width),
    "o": ProductShape(_HIDDEN, _HIDDEN, input_scale=True, rank=ADAPTER_RANK, residual=True),
    "gate_up": ProductShape(_HIDDEN, 2 * _INNER),
    "down": ProductShape(_INNER, _HIDDEN, input_scale=True, residual=True),
}


class Shipped(NamedTuple):
    operator: Operator
    constants: Constants
    tactic: Tactic


def shipped(attention: AttentionShape) -> Iterator[Shipped]:
    """Every kernel in every tactic; products with the least and with the most that is fused."""
    for tactic in contracts.KV_WRITE_TACTICS:
        yield Shipped(contracts.KV_WRITE, contracts.kv_write_constants(attention), tactic)
    for pattern in get_args(Pattern):
        for tactic in contracts.ATTEND_TACTICS:
            yield Shipped(contracts.attend(pattern), contracts.attend_constants(attention), tactic)
    for tactic in contracts.MERGE_TACTICS:
        yield Shipped(contracts.MERGE, contracts.merge_constants(attention), tactic)
    if attention.head_dim != ATTENTION.head_dim:  # of which products know nothing
        return
    for shape in (PRODUCTS_8B["qkv"], PRODUCTS_8B["o"]):
        for tactic in contracts.INT4_PRODUCT_TACTICS:
            yield Shipped(contracts.int4_product(shape), contracts.int4_product_constants(shape), tactic)


def print_resources(real: Real, attention: AttentionShape, capabilities: list[int]) -> bool:
    """Registers a thread and KiB of shared memory a block, by GPU; what spills says so."""
    from trimode.plugins.compilation import SHARED_MEMORY, compile_operator

    sound = True
    print("| kernel | tactic | warps |", *(f"sm_{capability} |" for capability in capabilities))
    print("|---|---|---|" + "---|" * len(capabilities))
    for operator, constants, tactic in shipped(attention):
        cells = []
        for capability in capabilities:
            kernel = compile_operator(operator, constants, tactic, real, capability)
            used = kernel.resources
            cell = f"{used.registers} / {kernel.shared_bytes / 1024:.0f}"
            if used.spills:
                cell += f" **spills {used.spilled_bytes} bytes**"
            if kernel.shared_bytes > SHARED_MEMORY[capability]:
                cell += " **too much shared memory**"
            sound &= "**" not in cell
            cells.append(cell)
        blocks = " ".join(f"{name[-1]}={value}" for name, value in tactic.constants.items() if name.startswith("BLOCK"))
        print(f"| {operator.name} | {blocks} | {tactic.warps} |", *(f"{cell} |" for cell in cells), flush=True)
    return sound


def fitting(tactics: tuple[Tactic, ...], rows: int) -> Tactic:
    """The smallest tile that holds all rows, and so reads weights or KV rows once; the largest if none does."""
    return next((tactic for tactic in tactics if int(tactic.constants["BLOCK_M"] or 0) >= rows), tactics[-1])


def print_traffic() -> bool:
    """Bytes of each kernel for one request beside what it needs at least, and of attention's two kernels together
    beside what they would need if the splits' results stayed on the chip."""
    ratios = []
    print("| kernel | KV rows | step | floor MB | moved MB | ratio | asked of L2, MB |\n" + "|---" * 7 + "|")

    def row(name: str, window: object, step: int, floor: float, moved: float, asked: float) -> None:
        megabytes = f"{floor / 1e6:.3f} | {moved / 1e6:.3f} | {moved / floor:.3f} | {asked / 1e6:.2f}"
        print(f"| {name} | {window} | {step} | {megabytes} |")

    def kernel(name: str, window: object, step: int, asked: dict[str, Asked]) -> None:
        if step <= LONGEST_HELD:
            ratios.append(moved_bytes(asked) / needed_bytes(asked))
        row(name, window, step, needed_bytes(asked), moved_bytes(asked), asked_bytes(asked))

    for step in STEPS:
        kernel("KvWrite", "-", step, kv_write_traffic(ATTENTION, 1, step, REAL_BYTES))
        for name, shape in PRODUCTS_8B.items():
            tactic = fitting(contracts.INT4_PRODUCT_TACTICS, step)
            kernel(f"Int4Product, {name}", "-", step, int4_product_traffic(shape, tactic, step, REAL_BYTES))
        for window in WINDOWS:
            tactic = fitting(contracts.ATTEND_TACTICS, step * ATTENTION.group)
            for pattern in ("bidirectional", "masked"):
                attended = attend_traffic(ATTENTION, tactic, pattern, [window], step, REAL_BYTES)
                kernel(f"Attend{pattern.capitalize()}", window, step, attended)
            merged = merge_traffic(ATTENTION, attended, 1, step, REAL_BYTES)
            kernel("MergeSplits", window, step, merged)
            needed, moved, asked = (f(attended) + f(merged) for f in (needed_bytes, moved_bytes, asked_bytes))
            parts = sum(2 * attended[name].stored for name in ("partial", "log_sum_exp"))
            row("*the two together*", window, step, needed - parts, moved, asked)
    return max(ratios) <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_resources = commands.add_parser("resources")
    of_resources.add_argument("--real", choices=["bf16", "fp16"], default="bf16")
    of_resources.add_argument("--head-dim", type=int, choices=[64, 128], default=ATTENTION.head_dim)
    of_resources.add_argument("--sm", default="80,86,89,90,100,120,121")
    commands.add_parser("traffic")
    options = parser.parse_args()
    if options.command == "resources":
        attention = replace(ATTENTION, head_dim=options.head_dim)
        return not print_resources(options.real, attention, [int(capability) for capability in options.sm.split(",")])
    return not print_traffic()


if __name__ == "__main__":
    sys.exit(main())
