"""A lower bound of the time of target cuda's passes on the 8B checkpoint with an int4 head: tables of docs/kernels.md.

    python -m scripts.gpu.cycle_estimate                kernels, passes, cycles and a prompt; needs no GPU
    python -m scripts.gpu.cycle_estimate --gpus h100    the same for one GPU, which compiles a quarter of the kernels
    python -m scripts.gpu.cycle_estimate --real fp16    the same for a build in fp16

The launches are those of an engine. Each takes at least the longest of four times:

- memory: its bytes (plugins/traffic.py) at the GPU's bandwidth;
- latency: a program waits for memory once for every tile that is not prefetched, and programs beyond those that fit on
  the GPU at once wait for an earlier one to end (waves);
- tensor cores: the products of the programs on the busiest multiprocessor;
- instructions: of the warps on its busiest scheduler, counted in the loop of the compiled product.

Every kernel has its default tactic. The gap before each launch is added.
"""

from __future__ import annotations

import argparse
import math
import re
from functools import cache
from typing import NamedTuple

from scripts.gpu.disassembly import disassembled, main_loop
from scripts.gpu.kernels_8b import ATTENTION
from scripts.gpu.pool_layout import pool_layout
from trimode.build.gpu.kernel_network import KernelNetwork
from trimode.build.roofline import (
    ACCEPTANCE_LENGTH,
    ADAPTER_RANK,
    CONFIG_8B,
    GPUS,
    PUBLISHED,
    REAL_BYTES,
    GpuModel,
)
from trimode.engine.launch_list import LaunchList
from trimode.engine.manifest import Limits
from trimode.engine.precision import Real
from trimode.model.step import ENGINES
from trimode.plugins.compilation import compile_operator
from trimode.plugins.launches import PassShape, PlannedLaunch, plan_pass
from trimode.plugins.operators import (
    OPERATORS,
    Attend,
    DenseHead,
    DenseProduct,
    Int4Product,
    Node,
    Operator,
    Tactic,
)
from trimode.plugins.operators.operator import ceil_div, row_count
from trimode.plugins.traffic import (
    launch_traffic,
    moved_bytes,
    split_rows,
)

BLOCK, GROUP, PREFILL_STEP, PROMPT, SHORT = 32, 128, 256, 2048, 512
# Round trips of a program besides those of its loop: its first loads, and what depends on them.
_WAITS = 2
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
    """``count`` kernels of a pass, each with so many bytes and FLOPs. launch: None to count these alone."""

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


class Pass(NamedTuple):
    """tokens: of the one request's step. rows: of logits. window: KV rows before the step."""

    engine: str
    tokens: int
    rows: int
    window: int


def pass_work(gpu: GpuModel, passed: Pass, real: Real) -> list[Work]:
    """The launches of a pass of target cuda, those of one kernel together, in the order of their first launch."""
    tokens, rows, window = passed.tokens, passed.rows, passed.window
    shape = PassShape(1, tokens, rows, window + tokens, top_k=1, masked=False, asked=0)
    alike: dict[str, list[PlannedLaunch]] = {}
    for planned in plan_pass(_launch_lists(real)[passed.engine], shape):
        alike.setdefault(planned.operator.kernel_name(planned.node, 0), []).append(planned)
    return [_work(gpu, launches, passed, real) for launches in alike.values()]


@cache
def _launch_lists(real: Real) -> dict[str, LaunchList]:
    """Of the 8B checkpoint with int4 matrices and an int4 head, by engine."""
    limits = Limits(capacity=65536, prefill_step=PREFILL_STEP, top_k=1, max_batch=1, max_step=PREFILL_STEP)
    pool = pool_layout(CONFIG_8B, real, GROUP)
    network = KernelNetwork(CONFIG_8B, pool, ADAPTER_RANK, real, limits)
    return {name: lowered.launches for name, lowered in network.lowered.items()}


def _work(gpu: GpuModel, launches: list[PlannedLaunch], passed: Pass, real: Real) -> Work:
    """Launches of one kernel, in its default tactic of those that fit the GPU."""
    operator, node = launches[0].operator, launches[0].node
    tactics = dict(operator.tactics(node))
    while True:
        number = operator.default_tactic(node, tactics.keys())
        binary = _binary(operator.name, tuple(operator.constants(node).items()), number, gpu.compute_capability, real)
        if binary is not None:
            break
        del tactics[number]
    tactic = tactics[number]
    launch = Launch(
        programs=math.prod(operator.grid(node, tactic)),
        warps=tactic.warps,
        resident=_resident(CHIPS[gpu.key], binary, tactic.warps),
        waits=_WAITS,
    )
    if isinstance(operator, Int4Product | DenseProduct | DenseHead):
        launch = _product_launch(operator, node, tactic, binary, launch)
    elif isinstance(operator, Attend):
        launch = _attention_launch(operator, node, tactic, passed.window, launch)
    tile = "x".join(str(size) for name, size in tactic.constants.items() if name in ("BLOCK_M", "BLOCK_N"))
    pattern = dict(ENGINES)[passed.engine]
    moved = moved_bytes(launch_traffic(operator, node, tactic, pattern, [passed.window], REAL_BYTES))
    return Work(operator.name, len(launches), moved, _flops(operator, node, passed.window), launch, tile)


def _flops(operator: Operator, node: Node, window: int) -> int:
    """On tensor cores."""
    constants = operator.constants(node)
    if isinstance(operator, Attend):
        step = node.shapes["q"][2]
        return 4 * step * (window + step) * CONFIG_8B.query_width
    if "INNER" not in constants:
        return 0
    return 2 * row_count(node.shapes["x"]) * constants["COLUMNS"] * (constants["INNER"] + constants.get("RANK", 0))


def _product_launch(operator: Operator, node: Node, tactic: Tactic, binary: Binary, launch: Launch) -> Launch:
    constants, (*_, parts) = operator.constants(node), operator.grid(node, tactic)
    block_m, block_n = tactic.constants["BLOCK_M"], tactic.constants["BLOCK_N"]
    unit = constants["UNIT"] if "UNIT" in constants else tactic.constants["BLOCK_K"]
    weight_bytes = unit * block_n // 2 if "UNIT" in constants else unit * block_n * REAL_BYTES
    ahead = tactic.stages - 1 if binary.async_bytes >= weight_bytes + block_m * unit * REAL_BYTES else 1
    iterations = constants["INNER"] // unit // parts
    # Before the loop, the norm's terms; behind it, the residual. The parts' sums: a store, the counter, and the loads
    # of the last program.
    waits = iterations / ahead + _WAITS + (3 if parts > 1 else 0)
    return launch._replace(waits=waits, instructions=iterations * binary.loop_instructions)


def _attention_launch(operator: Attend, node: Node, tactic: Tactic, window: int, launch: Launch) -> Launch:
    step, block = node.shapes["q"][2], tactic.constants["BLOCK_N"]
    tiles, heads, _ = operator.grid(node, tactic)
    splits = heads // ATTENTION["kv_heads"]
    busy = [rows for split in range(splits) if (rows := split_rows(window + step, split, splits, block))]
    # Of the tiles that every query attends to, several are prefetched; of the others, one.
    whole = (window + step if operator.pattern == "bidirectional" else window) // block * block
    waits = max(
        sum(row < whole for row in rows) / block / (tactic.stages - 1)
        + ceil_div(sum(row >= whole for row in rows), block)
        for rows in busy
    )
    return launch._replace(programs=tiles * len(busy) * ATTENTION["kv_heads"], waits=waits + _WAITS)


@cache
def _binary(
    name: str, constants: tuple[tuple[str, int], ...], number: int, capability: int, real: Real
) -> Binary | None:
    """The kernel of an operator's tactic; None if it does not fit the GPU."""
    operator = OPERATORS[name]
    tactic = operator.TACTICS[number - 1]  # type: ignore[attr-defined]
    kernel = compile_operator(operator, dict(constants), tactic, real, capability)
    if not kernel.fits:
        return None
    multiplies = isinstance(operator, Int4Product | DenseProduct | DenseHead)
    loop = main_loop(disassembled(kernel)) if multiplies else []
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


def pass_seconds(gpu: GpuModel, passed: Pass, real: Real) -> tuple[float, float]:
    """Of the kernels of a pass, and of the gaps before them."""
    works = pass_work(gpu, passed, real)
    busy = sum(work.count * seconds(gpu, work)[0] for work in works)
    return busy, LAUNCH_SECONDS * sum(work.count for work in works)


def print_kernels(real: Real, gpus: list[GpuModel]) -> None:
    for gpu in gpus:
        for title, passed in (
            ("AR, one token", Pass("ar", 1, 1, SHORT)),
            (f"a draft of {BLOCK} tokens", Pass("diffusion", BLOCK, BLOCK, SHORT)),
            (f"a chunk of {PREFILL_STEP} tokens", Pass("ar", PREFILL_STEP, 1, SHORT)),
        ):
            print(f"\n### {gpu.name}: {title}, {SHORT} rows\n")
            print("| kernel | a pass | tile | programs | waves | MB | GFLOP | us each | bound |")
            print("|---" * 9 + "|")
            for work in pass_work(gpu, passed, real):
                assert work.launch is not None
                took, bound = seconds(gpu, work)
                waves = _ceil(work.launch.programs, CHIPS[gpu.key].multiprocessors * work.launch.resident)
                size = f"{work.moved / 1e6:.2f} | {work.flops / 1e9:.2f}"
                print(f"| {work.name} | {work.count} | {work.tactic} | {work.launch.programs} | {waves} ", end="")
                print(f"| {size} | {took * 1e6:.1f} | {bound} |", flush=True)


def print_cycles(real: Real, gpus: list[GpuModel]) -> None:
    print("\n### Passes and cycles, one request\n")
    print(
        "| GPU | KV entries | AR, ms | AR, tokens/s at most | draft, ms | verify, ms | cycle, ms "
        "| cycle, tokens/s at most |",
        end="",
    )
    print(" published |\n" + "|---" * 9 + "|")
    for gpu in gpus:
        for window in (SHORT, 4096, 32768):
            passes = (
                Pass("ar", 1, 1, window),
                Pass("diffusion", BLOCK, BLOCK, window),
                Pass("ar", BLOCK, BLOCK, window),
            )
            ar, draft, verify = (sum(pass_seconds(gpu, passed, real)) for passed in passes)
            published = ", ".join(
                f"{figure:g} ({weights})"
                for name, weights, mode, figure in PUBLISHED
                if name == PUBLISHED_AT.get(gpu.key) and mode == "linear_spec"
            )
            print(
                f"| {gpu.name} | {window} | {ar * 1e3:.2f} | {1 / ar:.0f} | {draft * 1e3:.2f} | {verify * 1e3:.2f} "
                f"| {(draft + verify) * 1e3:.2f} | {ACCEPTANCE_LENGTH / (draft + verify):.0f} | {published or '-'} |",
                flush=True,
            )


def print_prefill(real: Real, gpus: list[GpuModel]) -> None:
    print(f"\n### A prompt of {PROMPT} tokens, in chunks of {PREFILL_STEP}\n")
    print("| GPU | ms at least | of the peak at most |\n|---|---|---|")
    for gpu in gpus:
        chunks = [Pass("ar", PREFILL_STEP, 1, start) for start in range(0, PROMPT, PREFILL_STEP)]
        took = sum(sum(pass_seconds(gpu, chunk, real)) for chunk in chunks)
        flops = sum(work.count * work.flops for chunk in chunks for work in pass_work(gpu, chunk, real))
        print(f"| {gpu.name} | {took * 1e3:.1f} | {flops / took / gpu.peak:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--gpus", default=",".join(CHIPS), help=f"of {', '.join(CHIPS)}")
    options = parser.parse_args()
    gpus = [GPUS[key] for key in options.gpus.split(",")]
    print_kernels(options.real, gpus)
    print_cycles(options.real, gpus)
    print_prefill(options.real, gpus)


if __name__ == "__main__":
    main()
