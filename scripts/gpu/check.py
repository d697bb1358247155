"""Check TriMode on a GPU: the kernels one by one, and engines of target ``cuda``.

Kernels are compared with their references, and their times with their lower bounds. Engines of the shipped checkpoint
are compared with target cpu's tokens. An engine of the 8B checkpoint's sizes, with random weights, is timed.

    python -m scripts.gpu.check emit .gpu --sm 90         on any machine: compile kernels, build engines; needs no GPU
    python -m scripts.gpu.check run .gpu out/kernels      on the GPU's machine: writes check.json and check.md there
    python -m scripts.gpu.check run .gpu out/kernels --parts products,attention
    python -m scripts.gpu.check dry                       every part without a GPU, with small sizes

The GPU's machine needs a driver for CUDA 12.9 or later, Python 3.12, torch, transformers, ml-dtypes and cuda-bindings.
It needs no network, no compiler and no installation of TriMode: copy the working tree with ``.gpu``, which git ignores,
and run the command in the tree's root with ``PYTHONPATH=.:.gpu/site``. Kernels are loaded from the binaries that
``emit`` assembled; two are also loaded from their PTX.

Each part runs in a separate process with a time limit of its own (``LIMITS``), so a fault or a hang does not affect the
others. The results of a stopped part are kept. A run ends within six minutes: parts for which no time is left are named
with the command that runs them. The limits of ``--parts engines`` add up to less than six minutes, and so do those of
``--parts kernels``; these two runs together are all parts. The exit code is 1 if a kernel is wrong or a part fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from scripts.gpu import graph_checks, kernel_checks
from scripts.gpu.check_report import markdown
from scripts.gpu.command_line import emit_run_dry
from scripts.gpu.kernel_checks import Host, Result
from scripts.gpu.part_runner import LARGEST, NO_TIME, lines_of, read_lines, run_parts, write_lines
from trimode.plugins.operators import Node, Operator

KERNEL_PARTS: tuple[str, ...] = (*kernel_checks.PARTS, graph_checks.PART)
DEVICE_PART = "device"
# The kernel tests, executed on the GPU.
TEST_PART = "tests"
# Seconds of each part. Those that run engines, and the PyTorch reference of the same size:
ENGINE_LIMITS = {
    "tiny-fp32": 60.0,
    "tiny-bf16": 60.0,
    "memcheck": 50.0,
    "8b": 60.0,
    "8b-bits": 50.0,
    "8b-reference": 50.0,
}
ENGINE_PARTS = tuple(ENGINE_LIMITS)
LIMITS = {
    DEVICE_PART: 25.0,
    **ENGINE_LIMITS,
    TEST_PART: 160.0,
    "kv write": 20.0,
    "attention": 30.0,
    "products": 40.0,
    "qkv products": 25.0,
    "same bits": 20.0,
    graph_checks.PART: 40.0,
}
PARTS = tuple(part for part in LIMITS if part != DEVICE_PART)
# Names of several parts.
GROUPS = {"engines": ENGINE_PARTS, "kernels": (TEST_PART, *KERNEL_PARTS)}
# Also loaded from PTX, to check that the driver accepts it.
PTX_OPERATORS = ("AttendMasked", "MergeCandidates")
ROOT = Path(__file__).resolve().parents[2]


def run_part(part: str, host: Host, *, small: bool) -> Iterator[Result]:
    """Check the kernels of one part. small: with sizes for the interpreter, in place of the 8B checkpoint's."""
    if part == graph_checks.PART:
        return graph_checks.run_part(host, graph_checks.SMALL_SIZES if small else graph_checks.SIZES_8B)
    sizes = kernel_checks.SMALL_SIZES if small else kernel_checks.SIZES_8B
    return kernel_checks.run_part(cast(kernel_checks.Part, part), host, sizes)


def used_nodes(*, small: bool) -> Iterator[tuple[Operator, Node]]:
    """Every operator of a run, with the sizes that its kernel is compiled for."""
    yield from kernel_checks.used_nodes(kernel_checks.SMALL_SIZES if small else kernel_checks.SIZES_8B)
    yield from graph_checks.used_nodes(graph_checks.SMALL_SIZES if small else graph_checks.SIZES_8B)


def emit(folder: Path, sm: int, prompts: int, largest: int) -> None:
    """Write all that ``run`` needs. sm: compute capability, 90 for 9.0. prompts: of the comparison with target cpu.
    largest: MiB of all of it.
    """
    from scripts.gpu.engine_emission import (
        emit_engines,
        held_out,
        refuse_large,
        remove_engine_ptx,
        remove_ptx,
        write_packages,
    )
    from scripts.gpu.kernel_tests import KERNELS, emit_test_kernels
    from scripts.gpu.random_weights import TIMED
    from trimode.build.gpu.kernel_emission import NeededKernel, kernels_of, write_kernels
    from trimode.common.progress import no_progress
    from trimode.engine.kernel_library import library_folder

    target = library_folder(folder, sm)
    if target.exists():
        raise SystemExit(f"{folder} exists; remove it to emit everything again")
    needed: dict[str, NeededKernel] = {}
    for operator, node in used_nodes(small=False):
        needed |= kernels_of(operator, node)
    write_kernels(needed, "bf16", (sm,), folder, no_progress)
    print(f"{len(needed)} kernels in {target}", flush=True)
    print(f"{emit_test_kernels(folder, sm)} kernels of the kernel tests", flush=True)
    emit_engines(folder, sm, held_out(prompts))
    remove_ptx(target, PTX_OPERATORS)
    for unchecked in (folder / KERNELS, folder / "engines" / TIMED):
        remove_ptx(unchecked)
    for engine in (folder / "engines").glob("tiny-*"):
        remove_engine_ptx(engine)
    write_packages(folder / "site")
    refuse_large(folder, largest)


def run(folder: Path, out: Path, parts: list[str]) -> bool:
    """Run the parts one after the other and write the report. Returns whether all parts ended with right results."""
    limits = {part: LIMITS[part] for part in (DEVICE_PART, *parts)}
    states = run_parts("scripts.gpu.check", limits, folder, out)
    device = next(iter(read_lines(lines_of(out, DEVICE_PART))), {})
    kernel_parts = [part for part in parts if part in KERNEL_PARTS]
    results = [result for part in kernel_parts for result in read_lines(lines_of(out, part))]
    engines = [record for part in parts if part not in KERNEL_PARTS for record in read_lines(lines_of(out, part))]
    report = {
        "date": _now(),
        "command": " ".join(["python -m scripts.gpu.check", *sys.argv[1:]]),
        "device": device,
        "parts": states,
        "engines": engines,
        "results": results,
    }
    (out / "check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "check.md").write_text(markdown(report), encoding="utf-8")
    wrong = [result for result in results if not result["right"]]
    print(f"{len(results)} results, {len(wrong)} wrong; see {out / 'check.md'}")
    if rest := [part for part, state in states.items() if state == NO_TIME and part != DEVICE_PART]:
        print(f"no time left for some parts: run again with --parts '{','.join(rest)}'")
    return not wrong and all(state.startswith("ended") for state in states.values())


def run_in_this_process(part: str, folder: Path, lines: Path) -> None:
    """Run one part on this machine's GPU. Each result is written immediately, as one line of JSON."""
    import torch

    from scripts.gpu.cuda_host import CudaHost

    if part in (TEST_PART, *ENGINE_PARTS):
        _run_engine_part(part, folder, lines)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    major, minor = torch.cuda.get_device_capability()
    kernels = folder / f"sm_{10 * major + minor}"
    if not kernels.is_dir():
        raise SystemExit(f"{kernels} is missing: emit the kernels with --sm {10 * major + minor}")
    host = CudaHost(kernels)
    with lines.open("w", encoding="utf-8") as file:
        if part == DEVICE_PART:
            for operator, node in used_nodes(small=False):
                if operator.name in PTX_OPERATORS:
                    host.function(operator.kernel_name(node, 1), "ptx")
            described = {
                **host.description(),
                "copy_bandwidth": host.copy_bandwidth(),
                "read_bandwidth": host.read_bandwidth(),
            }
            print(json.dumps(described), file=file)
            return
        for result in run_part(_known(part), host, small=False):
            print(json.dumps(result.record()), file=file, flush=True)
            _show(result)


def _run_engine_part(part: str, folder: Path, lines: Path) -> None:
    write_lines(lines, engine_records(part, folder))


def engine_records(part: str, folder: Path) -> Iterable[dict[str, Any]]:
    from scripts.gpu.engine_times import SIZES_8B, times_of_engine
    from scripts.gpu.kernel_tests import results_of_tests
    from scripts.gpu.memcheck import checked_memory
    from scripts.gpu.reference_times import PASSES, times_of_reference
    from scripts.gpu.step_bits import STEPS_8B, bits_of_steps
    from scripts.gpu.token_check import tokens_of_tiny
    from scripts.gpu.torch_device import TorchGpu

    if part == TEST_PART:
        return results_of_tests(folder)
    if part == "memcheck":
        return checked_memory(folder)
    if part.startswith("tiny-"):
        return tokens_of_tiny(folder, part.removeprefix("tiny-"))
    if part.endswith("-bits"):
        return bits_of_steps(folder, part.removesuffix("-bits"), TorchGpu(), STEPS_8B)
    if part.endswith("-reference"):
        return times_of_reference(folder, part.removesuffix("-reference"), TorchGpu(), PASSES)
    return times_of_engine(folder, part, TorchGpu(), SIZES_8B)


def dry() -> bool:
    """Run every part without a GPU, and print the report. Returns whether every result is right."""
    from scripts.gpu.dry_run import dry_engine_records
    from tests.support.interpreter_host import InterpreterHost

    results, engines, parts = [], [], {}
    for part in KERNEL_PARTS:
        for result in run_part(part, InterpreterHost(), small=True):
            _show(result)
            results.append(result)
    for part, record in dry_engine_records(ENGINE_PARTS):
        engines.append(record)
        parts[part] = "ended"
    report = {"date": _now(), "command": "dry", "device": {}, "parts": parts, "engines": engines}
    print(markdown({**report, "results": [result.record() for result in results]}))
    wrong = sum(not result.right for result in results)
    different = [record["what"] for record in engines if must_be_equal(record) and record["equal"] < record["of"]]
    print(f"{len(results)} results, {wrong} wrong; {len(engines)} records of engines, {len(different)} different")
    return not wrong and not different


def must_be_equal(record: dict[str, Any]) -> bool:
    """Tokens in fp32, and bits. In bf16, tokens may differ by rounding."""
    return "equal" in record and "bf16" not in record["what"]


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _parts(text: str) -> list[str]:
    """Parts and groups of parts, separated by commas."""
    named = [part for name in text.split(",") for part in GROUPS.get(name, (name,))]
    return [_known(part) for part in dict.fromkeys(named)]


def _known(part: str) -> str:
    if part not in PARTS:
        raise SystemExit(f"no part {part}; there are {', '.join((*GROUPS, *PARTS))}")
    return part


def _show(result: Result) -> None:
    took = "" if result.microseconds is None else f"{result.microseconds:9.1f} us"
    wrong = "" if result.right else "  WRONG"
    print(f"{result.kernel:34} {result.case:36} {result.tactic:12} error {result.error:.1e} {took}{wrong}", flush=True)


def main() -> int:
    parser, commands, of_emit, of_run = emit_run_dry(
        __doc__,
        emit="compile kernels and build engines",
        run="check and time the kernels",
        out="folder of the report",
        dry="every part with small sizes",
    )
    of_emit.add_argument("--prompts", type=int, default=200, help="prompts of the comparison with target cpu")
    of_emit.add_argument("--most-mib", type=int, default=LARGEST, help="largest size of the folder")
    of_run.add_argument("--parts", type=_parts, default=list(PARTS), help=f"some of {', '.join((*GROUPS, *PARTS))}")
    of_part = commands.add_parser("part", help="one part, in this process")
    of_part.add_argument("part")
    of_part.add_argument("folder", type=Path)
    of_part.add_argument("lines", type=Path)
    options = parser.parse_args()
    if options.command == "emit":
        emit(options.folder, options.sm, options.prompts, options.most_mib)
        return 0
    if options.command == "run":
        return not run(options.folder, options.out, options.parts)
    if options.command == "part":
        run_in_this_process(options.part, options.folder, options.lines)
        return 0
    return not dry()


if __name__ == "__main__":
    sys.exit(main())
