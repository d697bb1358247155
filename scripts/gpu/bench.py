"""Measure TriMode's kernels and an engine of the 8B checkpoint's sizes on a GPU, in one call of at most six minutes.

    python -m scripts.gpu.bench emit .gpu --sm 90        on any machine: compile kernels, write the engine; needs no GPU
    python -m scripts.gpu.bench run .gpu out/bench       on the GPU's machine: writes bench.json and bench.md there
    python -m scripts.gpu.bench run .gpu out/bench --parts products,passes --change TEXT --prediction TEXT
    python -m scripts.gpu.bench dry                      every part without a GPU, with small sizes

Parts, each in a process of its own with its own time limit:

- ``device``: bandwidth of a copy and of a read, and the peak of a bf16 product, which other parts are compared with;
- ``products``: the int4 products beside torch's ``_weight_int4pack_mm`` and bf16 by cuBLAS;
- ``variants``: the head with candidates beside a product, an int4 head beside a 16-bit one;
- ``passes``: AR, draft, verification and cycle of one request, and the kernels of each pass;
- ``bits``: the logits of 10,000 tokens in steps of 1, 8, 32 and 64 and in batches of 1 and 16, bit for bit;
- ``prefill``: a prompt of 2,048 tokens against the measured peak;
- ``requests``: one request, and 64 at the same time, by mode, and what ``auto`` chose.

--change and --prediction describe what differs from the last run and what it should gain. The report repeats them
beside the results, for the log in docs/kernels.md. The GPU's machine needs what ``scripts.gpu.check`` needs. The exit
code is 1 if a result is wrong, if bits differ, or if a part fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from scripts.gpu.command_line import emit_run_dry
from scripts.gpu.part_runner import LARGEST, Record, lines_of, read_lines, run_parts, write_lines

# Seconds of each part; together at most six minutes.
LIMITS = {
    "device": 20.0,
    "products": 40.0,
    "variants": 20.0,
    "passes": 45.0,
    "bits": 150.0,
    "prefill": 25.0,
    "requests": 60.0,
}


def emit(folder: Path, sm: int) -> None:
    """Write all that ``run`` needs. sm: compute capability, 90 for 9.0."""
    from scripts.gpu import kernel_checks, variants
    from scripts.gpu.bench_parts import write_tokenizer
    from scripts.gpu.engine_emission import (
        EmittedSizes,
        emit_timed_engine,
        refuse_large,
        remove_ptx,
        write_packages,
    )
    from scripts.gpu.random_weights import TIMED
    from trimode.build.gpu.kernel_emission import NeededKernel, kernels_of, write_kernels
    from trimode.common.progress import no_progress
    from trimode.engine.kernel_library import library_folder
    from trimode.engine.manifest import Limits

    needed: dict[str, NeededKernel] = {}
    for product in kernel_checks.SIZES_8B.products.values():
        needed |= kernels_of(product.operator, product.node(1))
    for operator, node in variants.used_nodes(small=False):
        needed |= kernels_of(operator, node)
    write_kernels(needed, "bf16", (sm,), folder, no_progress)
    limits = Limits(capacity=4096, prefill_step=256, top_k=4, max_batch=64, max_step=256)
    emit_timed_engine(folder, sm, EmittedSizes(timed=limits))
    write_tokenizer(folder)
    for unchecked in (library_folder(folder, sm), folder / "engines" / TIMED):
        remove_ptx(unchecked)
    # The requests' tokenizer. Not every GPU machine has transformers, which requires these.
    write_packages(folder / "site", ("jinja2", "safetensors", "tokenizers"))
    refuse_large(folder, LARGEST)


def run(folder: Path, out: Path, parts: list[str], change: str, prediction: str) -> bool:
    """Run the parts and write the report. Returns whether all ended with right results."""
    states = run_parts("scripts.gpu.bench", {part: LIMITS[part] for part in parts}, folder, out)
    report = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": " ".join(["python -m scripts.gpu.bench", *sys.argv[1:]]),
        "change": change,
        "prediction": prediction,
        "parts": states,
        "records": {part: list(read_lines(lines_of(out, part))) for part in parts},
    }
    write_report(report, out)
    print(f"see {out / 'bench.md'}")
    return not faults(report) and all(state.startswith("ended") for state in states.values())


def write_report(report: Record, out: Path) -> None:
    from scripts.gpu.bench_report import markdown

    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(markdown(report), encoding="utf-8")


def faults(report: Record) -> list[str]:
    """Products that are wrong, and texts whose bits differ."""
    records = [record for found in report["records"].values() for record in found]
    wrong = [f"{record['kernel']}, {record['case']}" for record in records if record.get("right") is False]
    return wrong + [record["what"] for record in records if "equal" in record and record["equal"] < record["of"]]


def records_of(part: str, folder: Path) -> Iterable[Record]:
    """On this machine's GPU."""
    import torch

    from scripts.gpu.cuda_host import CudaHost

    if part not in ("device", "products", "variants"):
        from scripts.gpu import bench_parts
        from scripts.gpu.torch_device import TorchGpu

        return bench_parts.engine_records(part, folder, TorchGpu(), bench_parts.SIZES_8B)
    torch.backends.cuda.matmul.allow_tf32 = False
    major, minor = torch.cuda.get_device_capability()
    host = CudaHost(folder / f"sm_{10 * major + minor}")
    if part in ("products", "variants"):
        return kernel_records(part, host)
    return [
        {
            **host.description(),
            "copy_bandwidth": host.copy_bandwidth(),
            "read_bandwidth": host.read_bandwidth(),
            "bf16_peak": host.product_peak(),
        }
    ]


def kernel_records(part: str, host: object, *, small: bool = False) -> Iterator[Record]:
    """Of part ``products`` or ``variants``. small: with sizes for the interpreter."""
    from scripts.gpu import kernel_checks, variants

    if part == "variants":
        yield from (result.record() for result in variants.variants(host, small=small))  # type: ignore[arg-type]
        return
    sizes = kernel_checks.SMALL_SIZES if small else kernel_checks.SIZES_8B
    for result in kernel_checks.run_part("products", host, sizes):  # type: ignore[arg-type]
        yield result.record()


def main() -> int:
    parser, commands, _, of_run = emit_run_dry(
        __doc__,
        emit="compile kernels and write the engine",
        run="measure",
        out="folder of the report",
        dry="every part with small sizes",
    )
    of_run.add_argument("--parts", type=lambda text: [_known(part) for part in text.split(",")], default=list(LIMITS))
    of_run.add_argument("--change", default="-", help="what differs from the last run")
    of_run.add_argument("--prediction", default="-", help="what the change should gain")
    of_part = commands.add_parser("part", help="one part, in this process")
    of_part.add_argument("part", type=_known)
    of_part.add_argument("folder", type=Path)
    of_part.add_argument("lines", type=Path)
    options = parser.parse_args()
    if options.command == "emit":
        emit(options.folder, options.sm)
        return 0
    if options.command == "run":
        return not run(options.folder, options.out, options.parts, options.change, options.prediction)
    if options.command == "part":
        write_lines(options.lines, records_of(options.part, options.folder))
        return 0
    from scripts.gpu.dry_run import dry_bench

    report = dry_bench(list(LIMITS))
    from scripts.gpu.bench_report import markdown

    print(markdown(report))
    return bool(faults(report))


def _known(part: str) -> str:
    if part not in LIMITS:
        raise SystemExit(f"no part {part}; there are {', '.join(LIMITS)}")
    return part


if __name__ == "__main__":
    sys.exit(main())
