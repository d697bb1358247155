"""Print the tables of docs/kernels.md: resources and traffic of the kernels of plugins/. Needs no GPU.

    python -m scripts.gpu.kernel_table resources  registers and shared memory of every kernel
    python -m scripts.gpu.kernel_table resources --real fp16 --head-dim 64  the same for another type and head size
    python -m scripts.gpu.kernel_table instructions  instructions a weight of the int4 products' loops, by GPU
    python -m scripts.gpu.kernel_table traffic  bytes that each kernel moves on the 8B checkpoint, and its least bytes

A kernel that spills or needs more shared memory than its GPU has is marked; a build omits it. The exit code is 1 if
that leaves a GPU without a tactic of an operator, or if a kernel moves more than 1.1 times its least bytes in a step of
up to 64 tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

from scripts.gpu import graph_checks
from scripts.gpu.kernel_launch import tile_name
from scripts.gpu.kernels_8b import ATTENTION, HIDDEN, PRODUCTS, QKV, SPLITS, VOCABULARY, Product, qkv_node
from trimode.build.roofline import REAL_BYTES
from trimode.engine.precision import Real
from trimode.plugins.operators import (
    Attend,
    Head,
    Int4Head,
    KvWrite,
    MergeCandidates,
    MergeSplits,
    Node,
    Operator,
    Pattern,
    Tactic,
)
from trimode.plugins.traffic import (
    KernelTraffic,
    attend_traffic,
    cache_bytes,
    int4_product_traffic,
    merge_traffic,
    moved_bytes,
    needed_bytes,
    operator_traffic,
    qkv_product_traffic,
)

STEPS, WINDOWS, LIMIT = (1, 8, 32, 64, 256), (512, 4096, 32768), 1.1
LAUNCHED_PATTERNS: tuple[Pattern, ...] = ("bidirectional", "masked")
# Up to this many rows, memory bounds a step or a product; above, arithmetic.
LONGEST_BOUND_BY_BYTES = 64


class Kernel(NamedTuple):
    operator: Operator
    node: Node
    tactic: Tactic


def all_kernels(head_dim: int) -> Iterator[Kernel]:
    """The kernels that engines launch, with every tactic. Of attention, products and heads, those with most terms; of
    the merge, that of most candidates.
    """
    sizes = {**ATTENTION, "head_dim": head_dim}
    nodes: list[tuple[Operator, Node]] = [(write := KvWrite(), write.node(batch=1, step=1, capacity=1, **sizes))]
    attends = [Attend(pattern) for pattern in LAUNCHED_PATTERNS]
    nodes += [(attend, attend.node(batch=1, step=1, capacity=1, splits=SPLITS, **sizes)) for attend in attends]
    merging = MergeSplits(output_scale=True)
    nodes.append((merging, merging.node(batch=1, step=1, splits=SPLITS, **sizes)))
    if head_dim == ATTENTION["head_dim"]:  # products do not depend on it
        nodes.append((QKV, qkv_node(1, capacity=1)))
        nodes += [(PRODUCTS[name].operator, PRODUCTS[name].node(1)) for name in ("gate_up", "down", "o with adapter")]
        around = {operator.name: (operator, node) for operator, node in graph_checks.used_nodes(graph_checks.SIZES_8B)}
        nodes += [(o, node) for o, node in around.values() if not isinstance(o, Head) or o.masked]
    for operator, node in nodes:
        for tactic in operator.tactics(node).values():
            yield Kernel(operator, node, tactic)


def print_resources(real: Real, head_dim: int, capabilities: list[int]) -> bool:
    """Registers of a thread and KiB of shared memory of a block, by GPU. Returns whether every GPU has a
    tactic that fits.
    """
    from trimode.plugins.compilation import SHARED_MEMORY, compile_operator

    needed, fitting = set(), set()
    print("| kernel | tactic | warps |", *(f"sm_{capability} |" for capability in capabilities))
    print("|---|---|---|" + "---|" * len(capabilities))
    for operator, node, tactic in all_kernels(head_dim):
        cells = []
        for capability in capabilities:
            kernel = compile_operator(operator, operator.constants(node), tactic, real, capability)
            used = kernel.resources
            cell = f"{used.registers} / {kernel.shared_bytes / 1024:.0f}"
            if used.spills:
                cell += f" **spills {used.spilled_bytes} bytes**"
            if kernel.shared_bytes > SHARED_MEMORY[capability]:
                cell += " **too much shared memory**"
            needed.add((operator.name, capability))
            if kernel.fits:
                fitting.add((operator.name, capability))
            cells.append(cell)
        blocks = " ".join(f"{name[-1]}={value}" for name, value in tactic.constants.items() if name.startswith("BLOCK"))
        blocks += " steps" if "STEPS" in tactic.constants else ""
        print(f"| {operator.name} | {blocks} | {tactic.warps} |", *(f"{cell} |" for cell in cells), flush=True)
    return needed == fitting


def print_instructions(capabilities: list[int]) -> None:
    """Instructions of all threads for each weight, in the main loop of the products in bf16."""
    from scripts.gpu.disassembly import disassembled, instructions_per_weight, main_loop
    from trimode.plugins.compilation import compile_operator

    print("| product | tile |", *(f"sm_{capability} |" for capability in capabilities))
    print("|---|---|" + "---|" * len(capabilities))
    for name in ("qkv", "o", "gate_up", "down"):
        product = PRODUCTS[name]
        operator, node = product.operator, product.node(1)
        constants = operator.constants(node)
        for tactic in operator.tactics(node).values():
            cells = []
            for capability in capabilities:
                kernel = compile_operator(operator, constants, tactic, "bf16", capability)
                loop = main_loop(disassembled(kernel))
                count = instructions_per_weight(loop, kernel.warps, tactic.constants["BLOCK_N"] * constants["UNIT"])
                cells.append(f"{count:.2f}" if kernel.fits else "-")
            print(f"| {name} | {tile_name(tactic)} |", *(f"{cell} |" for cell in cells), flush=True)


def smallest_fitting(tactics: dict[int, Tactic], rows: int) -> Tactic:
    """The smallest tile that holds all rows, so that weights or KV rows are read once; if none does, the largest."""
    ordered = list(tactics.values())
    return next((tactic for tactic in ordered if tactic.constants["BLOCK_M"] >= rows), ordered[-1])


def default_product_tactic(product: Product, node: Node) -> Tactic:
    tactics = product.operator.tactics(node)
    return tactics[product.operator.default_tactic(node, tactics.keys())]


def print_traffic() -> bool:
    """Bytes of each kernel for one request. For masked attention and its merge together, the least bytes exclude the
    splits' results. Returns whether every kernel is within :data:`LIMIT` of its least bytes.
    """
    ratios, merging = [], MergeSplits(output_scale=True)
    print("| kernel | KV rows | step | least MB | moved MB | ratio | L2 MB |\n" + "|---" * 7 + "|")

    def row(name: str, window: object, step: int, bound: float, moved: float, cached: float) -> None:
        megabytes = f"{bound / 1e6:.3f} | {moved / 1e6:.3f} | {moved / bound:.3f} | {cached / 1e6:.2f}"
        print(f"| {name} | {window} | {step} | {megabytes} |")

    def kernel(name: str, window: object, step: int, traffic: KernelTraffic) -> None:
        if step <= LONGEST_BOUND_BY_BYTES:
            ratios.append(moved_bytes(traffic) / needed_bytes(traffic))
        row(name, window, step, needed_bytes(traffic), moved_bytes(traffic), cache_bytes(traffic))

    for step in STEPS:
        node = qkv_node(step, capacity=step)
        tactics = QKV.tactics(node)
        tactic = tactics[QKV.default_tactic(node, tactics.keys())]
        kernel(QKV.name, "-", step, qkv_product_traffic(QKV, node, tactic, REAL_BYTES))
        for name in ("o with adapter", "gate_up", "down"):
            product = PRODUCTS[name]
            node = product.node(step)
            tactic = default_product_tactic(product, node)
            kernel(f"Int4Product, {name}", "-", step, int4_product_traffic(product.operator, node, tactic, REAL_BYTES))
        head, merge = Int4Head(normed=True), MergeCandidates()
        sizes = {"batch": 1, "rows": step, "vocabulary": VOCABULARY, "top_k": 1}
        node = head.head_node(**sizes, inner=HIDDEN, mask_token=graph_checks.MASK_TOKEN)
        tactics = head.tactics(node)
        tactic = tactics[head.default_tactic(node, tactics.keys())]
        kernel(head.name, "-", step, operator_traffic(head, node, tactic, REAL_BYTES))
        node = merge.node(**sizes)
        kernel(merge.name, "-", step, operator_traffic(merge, node, merge.TACTICS[0], REAL_BYTES))
        for window in WINDOWS:
            for pattern in LAUNCHED_PATTERNS:
                attend = Attend(pattern)
                node = attend.node(batch=1, step=step, capacity=window + step, splits=SPLITS, **ATTENTION)
                tactic = smallest_fitting(attend.tactics(node), step * ATTENTION["group"])
                attended = attend_traffic(attend, node, tactic, [window], REAL_BYTES)
                kernel(attend.name, window, step, attended)
            node = merging.node(batch=1, step=step, splits=SPLITS, **ATTENTION)
            merged = merge_traffic(node, pattern, [window], REAL_BYTES)
            kernel(merging.name, window, step, merged)
            needed, moved, cached = (f(attended) + f(merged) for f in (needed_bytes, moved_bytes, cache_bytes))
            parts = sum(2 * attended[name].stored for name in ("partial", "log_sum_exp"))
            row("*both together*", window, step, needed - parts, moved, cached)
    return max(ratios) <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_resources = commands.add_parser("resources")
    of_resources.add_argument("--real", choices=["bf16", "fp16"], default="bf16")
    of_resources.add_argument("--head-dim", type=int, choices=[64, 128], default=ATTENTION["head_dim"])
    of_resources.add_argument("--sm", default="80,86,89,90,100,120,121")
    of_instructions = commands.add_parser("instructions")
    of_instructions.add_argument("--sm", default="80,86,89,90,100,120,121")
    commands.add_parser("traffic")
    options = parser.parse_args()
    if options.command == "resources":
        capabilities = [int(capability) for capability in options.sm.split(",")]
        return not print_resources(options.real, options.head_dim, capabilities)
    if options.command == "instructions":
        print_instructions([int(capability) for capability in options.sm.split(",")])
        return 0
    return not print_traffic()


if __name__ == "__main__":
    sys.exit(main())
