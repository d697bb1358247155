"""An estimate of self-speculation on the 8B checkpoint with the kernels of plugins/: what docs/kernels.md shows.

    python -m scripts.gpu.cycle_estimate                tables of a pass and of a cycle; no GPU is asked
    python -m scripts.gpu.cycle_estimate --real fp16    the same for a build in fp16

A kernel takes the longest of three times, and a launch: its bytes through memory, its products on the tensor cores,
its instructions through the schedulers. Bytes are counted by scripts/gpu/traffic.py, instructions in the binary's loop.
Kernels that TensorRT brings itself (norms, SwiGLU, the adapter's first half, the head) count by their bytes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from scripts.gpu.kernel_table import smallest_fitting
from scripts.gpu.kernels_8b import ATTENTION, PRODUCTS, SPLITS
from scripts.gpu.traffic import (
    attend_traffic,
    int4_product_traffic,
    kv_write_traffic,
    merge_traffic,
    moved_bytes,
)
from trimode.build.audit.roofline import (
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
from trimode.plugins.operators import Attend, KvWrite, MergeSplits, Tactic

BLOCK = 32
# Assumed: the gap between two kernels of a CUDA graph that wait for each other. Not measured here.
LAUNCH = 1.5e-6
# fp32 FLOP/s of the data sheets: a scheduler issues 32 fused multiply-adds, 64 FLOP, an instruction.
FP32_PEAK = {"dgx-spark": 31e12, "rtx-pro-6000": 125e12, "h100": 67e12, "b200": 75e12}
FLOP_AN_INSTRUCTION = 64
PUBLISHED_AT = {"dgx-spark": "dgx-spark", "rtx-pro-6000": "rtx-pro-6000", "b200": "gb200"}


class Work(NamedTuple):
    """``count`` kernels of a pass, each with so many bytes, FLOPs, and instructions of a warp."""

    name: str
    count: int
    moved: float
    flops: float = 0
    instructions: float = 0


def pass_work(step: int, window: int, adapter: bool, capability: int, real: Real) -> Iterator[Work]:
    """A pass over a block; with the adapter it is a draft, without a verification."""
    config, layers, hidden = CONFIG_8B, CONFIG_8B.num_hidden_layers, CONFIG_8B.hidden_size
    row, inner = step * hidden * REAL_BYTES, config.intermediate_size
    yield Work("norms", 2 * layers + 1, 2 * row)
    for name, key in (
        ("qkv", "qkv"),
        ("o", "o with adapter" if adapter else "o"),
        ("gate_up", "gate_up"),
        ("down", "down"),
    ):
        product = PRODUCTS[key]
        node, rank = product.node(step), product.rank
        tactic = smallest_fitting(product.operator.tactics(node), step)
        flops = 2 * step * product.columns * (product.inner + rank)
        instructions = product.inner * product.columns * _per_weight(tactic, capability, real)
        moved = moved_bytes(int4_product_traffic(node, tactic, REAL_BYTES))
        yield Work(f"{name} product", layers, moved, flops, instructions)
        if rank:
            yield Work("adapter down", layers, row + hidden * rank * REAL_BYTES, 2 * step * hidden * rank)
    write = KvWrite.node(batch=1, step=step, capacity=window + step, **ATTENTION)
    yield Work("KV write", layers, moved_bytes(kv_write_traffic(write, REAL_BYTES)))
    attend = Attend("bidirectional" if adapter else "masked")
    node = attend.node(batch=1, step=step, capacity=window + step, splits=SPLITS, **ATTENTION)
    tactic = smallest_fitting(attend.tactics(node), step * ATTENTION["group"])
    attended = attend_traffic(attend, node, tactic, [window], REAL_BYTES)
    yield Work("attention", layers, moved_bytes(attended), 4 * step * (window + step) * config.query_width)
    merged = merge_traffic(MergeSplits.node(batch=1, step=step, splits=SPLITS, **ATTENTION), attended, REAL_BYTES)
    yield Work("merge", layers, moved_bytes(merged))
    yield Work("SwiGLU", layers, 3 * step * inner * REAL_BYTES)
    head = config.vocab_size * hidden
    yield Work("head", 1, head * REAL_BYTES + step * config.vocab_size * 4, 2 * step * head)
    # Three reads of the fp32 logits: best, sum, and the bias of the mask token.
    yield Work("top-k, log-sum-exp", 3, step * config.vocab_size * 4 + step * TOP_K * 12)
    yield Work("embedding, angles", 10, row)


@cache
def _per_weight(tactic: Tactic, capability: int, real: Real) -> float:
    """Instructions of a warp for each weight, in the product's loop."""
    product = PRODUCTS["gate_up"]
    constants = product.operator.constants(product.node(1))
    kernel = compile_operator(product.operator, constants, tactic, real, capability)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.ptx)
        target = f"--gpu-name={sm_arch_from_capability(capability)}"
        subprocess.run([get_ptxas(capability).path, target, source, "-o", binary], check=True)
        nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        listing = subprocess.run([nvdisasm, "-c", binary], check=True, capture_output=True, text=True).stdout
    block = tactic.constants["BLOCK_N"] * tactic.constants["BLOCK_K"]
    return _longest_loop(listing) * tactic.warps / block


def _longest_loop(listing: str) -> int:
    """Instructions between a label and the farthest branch back to it."""
    labels: dict[str, int] = {}
    longest = count = 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            count += 1
            if branch := re.search(r"BRA.*\((\.L_x_\d+)\)", instruction[1]):
                longest = max(longest, count - labels.get(branch[1], count))
    return longest


def seconds(gpu: GpuModel, work: Work) -> tuple[float, str]:
    """Of one such kernel, launch aside, and what bounds it."""
    issue = FP32_PEAK[gpu.key] / FLOP_AN_INSTRUCTION
    bounds = {
        "memory": work.moved / gpu.bandwidth,
        "tensor cores": work.flops / gpu.peak,
        "instructions": work.instructions / issue,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", choices=["bf16", "fp16"], default="bf16")
    real: Real = parser.parse_args().real
    window = 4096
    for key in FP32_PEAK:
        gpu = GPUS[key]
        print(f"\n### {gpu.name}, {BLOCK} tokens over {window} rows: microseconds of a kernel\n")
        print("| kernel | a pass | MB | GFLOP | draft | verify | bound by |\n|---|---|---|---|---|---|---|")
        draft, verify = (
            {work.name: work for work in pass_work(BLOCK, window, adapter, gpu.compute_capability, real)}
            for adapter in (True, False)
        )
        for name, work in draft.items():
            took, bound = seconds(gpu, work)
            other = f"{seconds(gpu, verify[name])[0] * 1e6:.1f}" if name in verify else "-"
            print(
                f"| {name} | {work.count} | {work.moved / 1e6:.1f} | {work.flops / 1e9:.1f} "
                f"| {took * 1e6:.1f} | {other} | {bound} |"
            )
    print("\n### A cycle: a draft and a verification\n")
    print("| GPU | rows | draft ms | verify ms | of it launches | tokens a second | at 0.75 of it | published |")
    print("|---|---|---|---|---|---|---|---|")
    for key in FP32_PEAK:
        gpu = GPUS[key]
        for rows in (512, 4096, 32768):
            kernels = launches = 0.0
            passes = []
            for adapter in (True, False):
                works = list(pass_work(BLOCK, rows, adapter, gpu.compute_capability, real))
                busy = sum(work.count * seconds(gpu, work)[0] for work in works)
                waits = LAUNCH * sum(work.count for work in works)
                passes.append((busy + waits) * 1e3)
                kernels, launches = kernels + busy, launches + waits
            speed = ACCEPTANCE_LENGTH / (kernels + launches)
            published = ", ".join(
                f"{figure:g} ({weights})"
                for name, weights, mode, figure in PUBLISHED
                if name == PUBLISHED_AT.get(key) and mode == "linear_spec"
            )
            print(
                f"| {gpu.name} | {rows} | {passes[0]:.2f} | {passes[1]:.2f} | {launches * 1e3:.2f} "
                f"| {speed:.0f} | {0.75 * speed:.0f} | {published or '-'} |"
            )


if __name__ == "__main__":
    main()
