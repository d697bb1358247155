"""A lower bound of self-speculation's time on the 8B checkpoint with these kernels: tables of docs/kernels.md.

    python -m scripts.gpu.cycle_estimate                prints a draft's kernels and a cycle's time; needs no GPU
    python -m scripts.gpu.cycle_estimate --real fp16    the same for a build in fp16

A kernel takes at least the longest of four times:

- memory: its bytes (scripts/gpu/traffic.py) at the GPU's bandwidth;
- latency: a program waits for memory once for every tile that is not prefetched, and programs beyond those that fit on
  the GPU at once wait for an earlier one to end (waves);
- tensor cores: the products of the programs on the busiest multiprocessor;
- instructions: of the warps on its busiest scheduler, counted in the loop of the compiled kernel.

The int4 products have their default tactics. TensorRT's own
kernels (norms, SwiGLU, the adapter's down product, the head) count with their bytes only. The gap before each launch is
added.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from scripts.gpu.disassembly import disassembled, main_loop
from scripts.gpu.kernel_table import default_product_tactic, smallest_fitting
from scripts.gpu.kernels_8b import ATTENTION, PRODUCTS, SPLITS
from scripts.gpu.traffic import (
    attend_traffic,
    int4_product_traffic,
    kv_write_traffic,
    merge_traffic,
    moved_bytes,
    split_rows,
)
from trimode.build.roofline import (
    ACCEPTANCE_LENGTH,
    CONFIG_8B,
    GPUS,
    PUBLISHED,
    REAL_BYTES,
    TOP_K,
    GpuModel,
)
from trimode.engine.precision import Real
from trimode.plugins.compilation import compile_operator
from trimode.plugins.operators import Attend, KvWrite, MergeSplits, Operator
from trimode.plugins.operators.operator import ceil_div

BLOCK = 32
# Assumed: the gap between two dependent kernels of a CUDA graph. Not measured here.
LAUNCH_SECONDS = 1.5e-6
# Assumed: cycles from a load to its data, from an idle device memory; microbenchmarks of recent GPUs find 450 to 550
# (arXiv 2402.13499).
MEMORY_LATENCY = 450
SCHEDULERS, LANES = 4, 128  # of a multiprocessor
PUBLISHED_AT = {"dgx-spark": "dgx-spark", "rtx-pro-6000": "rtx-pro-6000", "b200": "gb200"}


class Chip(NamedTuple):
    """From the data sheets. fp32: peak FLOP/s. shared_bytes, threads: of a multiprocessor."""

    multiprocessors: int
    fp32: float
    shared_bytes: int
    threads: int

    @property
    def clock(self) -> float:
        """Hz of the fp32 peak, at which each scheduler issues an instruction a cycle."""
        return self.fp32 / (self.multiprocessors * LANES * 2)


CHIPS = {
    "dgx-spark": Chip(48, 31e12, 100 << 10, 1536),
    "rtx-pro-6000": Chip(188, 125e12, 100 << 10, 1536),
    "h100": Chip(132, 67e12, 228 << 10, 2048),
    "b200": Chip(148, 75e12, 228 << 10, 2048),
}
_REGISTERS, _RESERVED_SHARED_BYTES, _WARP = 65536, 1024, 32


class Binary(NamedTuple):
    """A compiled kernel. loop_instructions: of one warp in one iteration. prefetches: its loop loads tiles ahead by
    cp.async, W's or K's and V's among them.
    """

    registers: int
    shared_bytes: int
    loop_instructions: int
    async_bytes: int


class Launch(NamedTuple):
    """programs: with work. resident: programs that fit on a multiprocessor at once. waits: round trips to memory of
    one program, one after the other. instructions: of one warp.
    """

    programs: int
    warps: int
    resident: int
    waits: float
    instructions: float = 0


class Work(NamedTuple):
    """``count`` kernels of a pass, each with so many bytes and FLOPs. launch: None for TensorRT's own kernels."""

    name: str
    count: int
    moved: float
    flops: float = 0
    launch: Launch | None = None
    tactic: str = ""


def seconds(gpu: GpuModel, work: Work) -> tuple[float, str]:
    """The lower bound of one kernel's time without the gap before its launch, and the term that determines it."""
    bounds = {"memory": work.moved / gpu.bandwidth, "tensor cores": work.flops / gpu.peak}
    if work.launch is not None:
        chip, launch = CHIPS[gpu.key], work.launch
        busiest = _ceil(launch.programs, chip.multiprocessors)
        waves = _ceil(launch.programs, chip.multiprocessors * launch.resident)
        warps = _ceil(busiest * launch.warps, SCHEDULERS)
        bounds["tensor cores"] *= busiest * chip.multiprocessors / launch.programs
        bounds["latency"] = waves * launch.waits * MEMORY_LATENCY / chip.clock
        bounds["instructions"] = warps * launch.instructions / chip.clock
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound


def pass_work(gpu: GpuModel, step: int, window: int, adapter: bool, real: Real) -> Iterator[Work]:
    """The kernels of a pass over a block; with the adapter it is a draft, without it a verification."""
    config, layers, hidden = CONFIG_8B, CONFIG_8B.num_hidden_layers, CONFIG_8B.hidden_size
    row, inner = step * hidden * REAL_BYTES, config.intermediate_size
    yield Work("norms", 2 * layers + 1, 2 * row)
    for name in ("qkv", "o", "gate_up", "down"):
        yield _product(gpu, name, step, adapter and name == "o", real)
    if adapter:
        rank = PRODUCTS["o with adapter"].rank
        yield Work("adapter down", layers, row + hidden * rank * REAL_BYTES, 2 * step * hidden * rank)
    write = KvWrite.node(batch=1, step=step, capacity=window + step, **ATTENTION)
    yield Work(
        "KV write",
        layers,
        moved_bytes(kv_write_traffic(write, REAL_BYTES)),
        launch=Launch(step, KvWrite.TACTICS[0].warps, resident=1, waits=1),
    )
    yield from _attention(gpu, step, window, adapter, real)
    yield Work("SwiGLU", layers, 3 * step * inner * REAL_BYTES)
    head = config.vocab_size * hidden
    yield Work("head", 1, head * REAL_BYTES + step * config.vocab_size * 4, 2 * step * head)
    # Three reads of the fp32 logits: their maximum, their sum of exponentials, and the mask token's bias.
    yield Work("top-k, log-sum-exp", 3, step * config.vocab_size * 4 + step * TOP_K * 12)
    yield Work("embedding, angles", 10, row)


def _product(gpu: GpuModel, name: str, rows: int, adapter: bool, real: Real) -> Work:
    """The product in its default tactic."""
    product = PRODUCTS["o with adapter" if adapter else name]
    node = product.node(rows)
    tactic = default_product_tactic(product, node)
    number = next(n for n, other in product.operator.tactics(node).items() if other == tactic)
    constants, sizes = tactic.constants, product.operator.constants(node)
    block_m, block_n, unit = constants["BLOCK_M"], constants["BLOCK_N"], sizes["UNIT"]
    binary = _binary(f"product {name}", number, gpu.compute_capability, real)
    ahead = tactic.stages - 1 if binary.async_bytes >= unit * block_n // 2 + block_m * unit * REAL_BYTES else 1
    row_tiles, strips, parts = product.operator.grid(node, tactic)
    iterations = product.inner // unit // parts
    launch = Launch(
        programs=row_tiles * strips * parts,
        warps=tactic.warps,
        resident=_resident(CHIPS[gpu.key], binary, tactic.warps),
        # The parts' sums: a store, the counter, and the loads of the last program.
        waits=iterations / ahead + (3 if parts > 1 else 0),
        instructions=iterations * binary.loop_instructions,
    )
    flops = 2 * rows * product.columns * (product.inner + product.rank)
    moved = moved_bytes(int4_product_traffic(product.operator, node, tactic, REAL_BYTES))
    return Work(f"{name} product", CONFIG_8B.num_hidden_layers, moved, flops, launch, f"{block_m}x{block_n}")


def _attention(gpu: GpuModel, step: int, window: int, adapter: bool, real: Real) -> Iterator[Work]:
    layers, sizes = CONFIG_8B.num_hidden_layers, ATTENTION
    attend = Attend("bidirectional" if adapter else "masked")
    node = attend.node(batch=1, step=step, capacity=window + step, splits=SPLITS, **sizes)
    tactics = attend.tactics(node)
    tactic = smallest_fitting(tactics, step * sizes["group"])
    number = next(n for n, other in tactics.items() if other == tactic)
    constants = tactic.constants
    tiles, heads, _ = attend.grid(node, tactic)
    splits = heads // sizes["kv_heads"]
    block = constants["BLOCK_N"]
    busy = [rows for split in range(splits) if (rows := split_rows(window + step, split, splits, block))]
    # Tiles that every query attends to are prefetched; the others are not.
    whole = (window + step if adapter else window) // block * block
    waits = max(
        sum(row < whole for row in rows) / block / (tactic.stages - 1)
        + ceil_div(sum(row >= whole for row in rows), block)
        for rows in busy
    )
    binary = _binary(attend.name, number, gpu.compute_capability, real)
    launch = Launch(
        programs=tiles * len(busy) * sizes["kv_heads"],
        warps=tactic.warps,
        resident=_resident(CHIPS[gpu.key], binary, tactic.warps),
        waits=waits,
    )
    attended = attend_traffic(attend, node, tactic, [window], REAL_BYTES)
    flops = 4 * step * (window + step) * CONFIG_8B.query_width
    yield Work("attention", layers, moved_bytes(attended), flops, launch, f"{constants['BLOCK_M']}")
    merge = MergeSplits.node(batch=1, step=step, splits=SPLITS, **sizes)
    merged = moved_bytes(merge_traffic(merge, attended, REAL_BYTES))
    yield Work("merge", layers, merged, launch=Launch(step * sizes["kv_heads"], 2, resident=8, waits=2))


@cache
def _binary(name: str, number: int, capability: int, real: Real) -> Binary:
    """name: ``product`` and its name, or an attention operator's."""
    operator: Operator
    if name.startswith("product "):
        product = PRODUCTS[name.removeprefix("product ")]
        operator, node = product.operator, product.node(1)
    else:
        attend = operator = Attend("bidirectional" if name == "AttendBidirectional" else "masked")
        node = attend.node(batch=1, step=1, capacity=1, splits=SPLITS, **ATTENTION)
    tactic = operator.tactics(node)[number]
    kernel = compile_operator(operator, operator.constants(node), tactic, real, capability)
    loop = main_loop(disassembled(kernel))
    return Binary(
        kernel.resources.registers,
        kernel.shared_bytes,
        len(loop),
        sum(_async_bytes(instruction) for instruction in loop) * _WARP * tactic.warps,
    )


def _async_bytes(instruction: str) -> int:
    """Bytes that a thread copies to shared memory by one cp.async; 0 for other instructions."""
    found = re.search(r"\bLDGSTS\S*", instruction)
    if found is None:
        return 0
    return 16 if ".128" in found[0] else 8 if ".64" in found[0] else 4


def _resident(chip: Chip, binary: Binary, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    registers = _ceil(binary.registers, 8) * 8 * _WARP * warps
    return min(
        _REGISTERS // registers,
        chip.shared_bytes // (binary.shared_bytes + _RESERVED_SHARED_BYTES),
        chip.threads // (_WARP * warps),
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def print_kernels(real: Real, window: int) -> None:
    print(f"\n### Kernels of a draft of {BLOCK} tokens over {window} rows: microseconds at least\n")
    print("| kernel | a pass | MB | GFLOP |", *(f"{GPUS[key].name} |" for key in CHIPS))
    print("|---|---|---|---|" + "---|" * len(CHIPS))
    columns = [list(pass_work(GPUS[key], BLOCK, window, adapter=True, real=real)) for key in CHIPS]
    for works in zip(*columns, strict=True):
        cells = []
        for key, work in zip(CHIPS, works, strict=True):
            took, bound = seconds(GPUS[key], work)
            tactic = f" ({work.tactic})" if work.tactic else ""
            cells.append(f"{took * 1e6:.1f} {bound}{tactic}")
        first = works[0]
        print(f"| {first.name} | {first.count} | {first.moved / 1e6:.1f} | {first.flops / 1e9:.1f} |", end=" ")
        print(" | ".join(cells), "|")


def print_cycles(real: Real) -> None:
    print("\n### A cycle: a draft and a verification\n")
    print("| GPU | rows | draft ms | verify ms | gaps ms | tokens a second at most | published |")
    print("|---|---|---|---|---|---|---|")
    for key in CHIPS:
        gpu = GPUS[key]
        for window in (512, 4096, 32768):
            busy = gaps = 0.0
            passes = []
            for adapter in (True, False):
                works = list(pass_work(gpu, BLOCK, window, adapter, real))
                kernels = sum(work.count * seconds(gpu, work)[0] for work in works)
                launches = LAUNCH_SECONDS * sum(work.count for work in works)
                passes.append((kernels + launches) * 1e3)
                busy, gaps = busy + kernels, gaps + launches
            published = ", ".join(
                f"{figure:g} ({weights})"
                for name, weights, mode, figure in PUBLISHED
                if name == PUBLISHED_AT.get(key) and mode == "linear_spec"
            )
            print(
                f"| {gpu.name} | {window} | {passes[0]:.2f} | {passes[1]:.2f} | {gaps * 1e3:.2f} "
                f"| {ACCEPTANCE_LENGTH / (busy + gaps):.0f} | {published or '-'} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", choices=["bf16", "fp16"], default="bf16")
    real: Real = parser.parse_args().real
    print_kernels(real, window=4096)
    print_cycles(real)


if __name__ == "__main__":
    main()
