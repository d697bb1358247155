"""Memory and time of what a large checkpoint goes through: it is quantised, built for a GPU, and audited.

    python -m scripts.prove.large_shape [14b] [--layers N] [--target cuda] [--sm 90] [--tp N] [--folder FOLDER]

The weights are random; those of the 16-bit checkpoint are drawn when they are read, so that they need no disk. Each
stage is a process of its own. Its *peak memory* is the most that it needs of its own; pages of files, which the kernel
can drop at any time, are not counted. The folder needs twice the bytes of the int4 checkpoint, 17 GB for the 14B shape.
Everything in it is deleted as soon as no stage needs it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from scripts.gpu.random_w4a16_checkpoint import SHAPES, DrawnCheckpoint
from scripts.prove.proof_table import ProofRow, print_table
from trimode.common.progress_bars import progress_bars
from trimode.quantize import quantize_checkpoint

LIMIT = 24 << 30  # bytes
_INTERVAL = 0.1  # seconds between two samples of a process's memory


class Stage(NamedTuple):
    """A finished process. peak: bytes. seconds: of wall-clock time; processor: of all its threads."""

    name: str
    peak: int
    seconds: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="14b")
    parser.add_argument("--layers", type=int, help="of the network [default: the shape's]")
    parser.add_argument("--folder", type=Path, help="where to write [default: the system's temporary folder]")
    parser.add_argument("--target", choices=["cuda", "rtx"], default="cuda")
    parser.add_argument("--sm", default="90", help="compute capability to build for")
    parser.add_argument("--tp", default="1", help="ranks to build for")
    parser.add_argument("--quantize-to", type=Path, metavar="OUT", help="the stage quantize alone, into the folder OUT")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.quantize_to is not None:
        quantize(arguments.shape, arguments.layers, arguments.quantize_to)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        stages = list(run_stages(Path(folder), arguments))
    of_layers = f", {arguments.layers} layers" if arguments.layers else ""
    rows = [
        ProofRow(
            f"{arguments.shape} shape{of_layers}, {stage.name}: peak memory",
            f"<= {LIMIT / 2**30:.0f} GiB",
            f"{stage.peak / 2**30:.1f} GiB; {stage.seconds:.0f} s, {stage.processor:.0f} s of processor time",
            stage.peak <= LIMIT,
        )
        for stage in stages
    ]
    print_table(rows, arguments.json)


def run_stages(folder: Path, arguments: argparse.Namespace) -> Iterator[Stage]:
    int4, engine = (str(folder / name) for name in ("int4", "engine"))
    trimode = ("-m", "trimode")
    layers = ("--layers", str(arguments.layers)) if arguments.layers else ()
    yield run("quantize", "-m", "scripts.prove.large_shape", arguments.shape, *layers, "--quantize-to", int4)
    options = ("--target", arguments.target, "--sm", arguments.sm, "--tp", arguments.tp)
    yield run("build", *trimode, "build", int4, engine, *options)
    shutil.rmtree(int4)
    yield run("audit", *trimode, "audit", engine)


def quantize(shape: str, layers: int | None, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, progress_bars() as progress:
        checkpoint = DrawnCheckpoint(Path(folder) / shape, shape, layers)
        quantize_checkpoint(checkpoint, out, method="rtn", head="int4", progress=progress)


def run(name: str, *command: str) -> Stage:
    """Run a stage. Raises SystemExit if it fails."""
    begun, peak, processor = time.perf_counter(), 0, 0.0
    with subprocess.Popen([sys.executable, *command], stdout=sys.stderr) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, anonymous_bytes(process.pid))
                processor = sum(watched.cpu_times()[:4])
            except (psutil.Error, OSError):
                break
            time.sleep(_INTERVAL)
    if process.returncode:
        raise SystemExit(f"{name} ended with exit code {process.returncode}")
    print(f"{name}: {peak / 2**30:.2f} GiB, {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return Stage(name, peak, time.perf_counter() - begun, processor)


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process and its children without pages of files."""
    pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    total = 0
    for each in pids:
        for line in Path(f"/proc/{each}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) << 10
    return total


if __name__ == "__main__":
    main()
