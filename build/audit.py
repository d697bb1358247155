"""Audit an engine directory without a GPU: what a pass runs, the bytes that it moves, and the least times.

A target's :meth:`trimode.build.target.BuildTarget.open_audit` opens its directories. The record, the tables and the
plot are the same for all targets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, SerializeAsAny
from rich.console import Console
from rich.table import Table

from trimode.build.registry import TARGETS
from trimode.build.roofline import (
    GPUS,
    INTEGER_BYTES,
    LOGIT_BYTES,
    REAL_BYTES,
    GpuModel,
    PassShape,
    find_gpu,
    least_bytes,
    least_flops,
    pass_seconds,
    published_comparison,
    stored_matrix_bytes,
)
from trimode.build.scale_out import LINKS, RankEstimate, estimates, find_link
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.model.shards import Shard

BLOCK_LENGTH = 32
DEFAULT_STEPS = (1, 8, 32)
DEFAULT_WINDOWS = (512, 4096)


class PassAudit(BaseModel):
    """One pass of one engine, of one rank if there are several. Bytes are of device memory.

    kernels_a_layer: the most frequent count. int4_products: kernels that multiply int4 matrices. bound: bytes that any
    implementation must move. ratio: bytes / bound. exchanges: kernels in which ranks exchange partial sums. link_bytes:
    that a rank receives in them.
    """

    engine: str
    batch: int
    step: int
    window: int
    kernels: int
    kernels_a_layer: int
    int4_products: int
    int4_matrices: int
    bytes: int
    bound: int
    ratio: float
    flops: int
    bytes_by_kind: dict[str, int]
    exchanges: int
    link_bytes: int

    def cells(self) -> dict[str, str]:
        """The pass's row of the table, by heading."""
        return {
            "engine": self.engine,
            "step": str(self.step),
            "window": str(self.window),
            "kernels": str(self.kernels),
            "a layer": str(self.kernels_a_layer),
            "int4": f"{self.int4_products}/{self.int4_matrices}",
            "MB": f"{self.bytes / 1e6:.1f}",
            "/bound": f"{self.ratio:.3f}",
        }

    def parts(self) -> list[dict[str, str]]:
        """Rows of a table of the pass's kernels, by heading; none if the target does not tell them apart."""
        return []


class EngineAudit(Protocol):
    """An engine directory of a target.

    sms: compute capabilities that it was built for, 121 for 12.1. candidates: that a greedy pass returns of a row.
    """

    @property
    def manifest(self) -> Manifest: ...

    @property
    def sms(self) -> tuple[int, ...]: ...

    @property
    def candidates(self) -> int: ...

    def count(self, engine: str, batch: int, step: int, window: int, gpu: GpuModel) -> PassAudit:
        """A pass of ``step`` tokens for each of ``batch`` sequences over ``window`` KV rows, with logits for every
        token. :func:`refuse_impossible` has accepted the sizes. Raises TriModeError if ``gpu`` cannot run it.
        """
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of device memory, by what they hold, of one rank if there are several."""
        ...

    def notes(self) -> list[str]:
        """Lines for below the table of the passes: its headings, and what else was checked."""
        ...


class HostBytes(BaseModel):
    """Bytes that one request's self-speculation cycle copies between the host and a GPU."""

    to_device: int
    to_host: int


class TimeBound(BaseModel):
    """The shortest time of each pass in milliseconds, and the resulting tokens per second of one request: the engine's
    bytes at the GPU's full bandwidth. Self-speculation drafts and verifies blocks of ``block_length``."""

    window: int
    block_length: int
    ar_ms: float
    draft_ms: float
    verify_ms: float
    ar_tokens_per_second: float
    linear_spec_tokens_per_second: float


class AuditReport(BaseModel):
    """ranks: of the engine. link: between its GPUs. memory: bytes on one GPU, by what they hold. of_ranks: estimates
    for other numbers of GPUs, by window, for the sizes and the types of this engine's network. notes: lines of text."""

    engine: str
    target: str
    gpu: str
    ranks: int
    link: str
    acceptance: float
    memory: dict[str, int]
    cycle: HostBytes
    passes: list[SerializeAsAny[PassAudit]]
    bounds: list[TimeBound]
    of_ranks: dict[int, list[RankEstimate]]
    notes: list[str]


def audit_engine(
    folder: Path,
    *,
    acceptance: float,
    gpu: str | None = None,
    batch: int = 1,
    steps: tuple[int, ...] | None = None,
    windows: tuple[int, ...] | None = None,
    link: str | None = None,
) -> AuditReport:
    """Audit both engines of an engine directory at every step and window.

    gpu: a key of :data:`trimode.build.roofline.GPUS`; None for the first of them that the directory was built for.
    acceptance: tokens per self-speculation cycle. steps, windows: None for :data:`DEFAULT_STEPS` and
    :data:`DEFAULT_WINDOWS`, each lowered to the engine's limits. Raises TriModeError for a shape beyond these limits,
    for a changed file, and for a target that has no kernels to count. link: a key of
    :data:`trimode.build.scale_out.LINKS`; None for the GPU's usual one.
    """
    manifest = Manifest.read(folder)
    audit = TARGETS[manifest.target.name].open_audit(folder, manifest)
    card = find_gpu(gpu or _built_for(audit.sms))
    between = find_link(link, card.key)
    limits = manifest.limits
    _, max_step = limits.largest_pass
    if windows is None:
        windows = _at_most(DEFAULT_WINDOWS, limits.capacity)
    if steps is None:
        steps = _at_most(DEFAULT_STEPS, min(max_step, *windows))

    def counted(engine: str, batch: int, step: int, window: int) -> PassAudit:
        refuse_impossible(manifest, batch, step, window)
        return audit.count(engine, batch, step, window, card)

    passes = [
        counted(name, batch, step, window) for name in ("ar", "diffusion") for window in windows for step in steps
    ]
    bounds = []
    for window in windows:
        block = min(BLOCK_LENGTH, window, max_step)
        seconds = [
            pass_seconds(card, found.bytes, found.flops)
            + found.exchanges * between.latency
            + found.link_bytes / between.bandwidth
            for found in (
                counted("ar", 1, 1, window),
                counted("diffusion", 1, block, window),
                counted("ar", 1, block, window),
            )
        ]
        bounds.append(
            TimeBound(
                window=window,
                block_length=block,
                ar_ms=seconds[0] * 1e3,
                draft_ms=seconds[1] * 1e3,
                verify_ms=seconds[2] * 1e3,
                ar_tokens_per_second=1 / seconds[0],
                linear_spec_tokens_per_second=acceptance / (seconds[1] + seconds[2]),
            )
        )
    return AuditReport(
        engine=str(folder),
        target=manifest.target.name,
        gpu=card.key,
        ranks=manifest.ranks,
        link=between.key,
        acceptance=acceptance,
        memory=audit.memory(),
        cycle=host_bytes(manifest, audit.candidates, BLOCK_LENGTH),
        passes=passes,
        bounds=bounds,
        of_ranks={
            window: estimates(card, between, manifest.model, manifest.precision, window=window) for window in windows
        },
        notes=audit.notes(),
    )


def refuse_impossible(manifest: Manifest, batch: int, step: int, window: int) -> None:
    """Raise TriModeError for a pass that the engine does not take."""
    max_batch, max_step = manifest.limits.largest_pass
    limits = {
        "batch": (batch, max_batch),
        "step": (step, max_step),
        "window": (window, manifest.limits.capacity),
    }
    for name, (value, largest) in limits.items():
        if not 1 <= value <= largest:
            raise TriModeError(f"{name} {value} is outside the engine's 1 to {largest}; build with a larger limit")
    if step > window:
        raise TriModeError(f"step {step} exceeds the window {window}: a step's own rows are part of it")


def no_kernels(folder: Path, target: str) -> TriModeError:
    """The error of a target without lists of kernels."""
    return TriModeError(
        f"{folder} is for target {target}, which has no list of kernels to audit; build for cuda or rtx"
    )


def least_work(manifest: Manifest, engine: str, batch: int, step: int, window: int, top_k: int) -> tuple[int, int]:
    """The bytes that any implementation of a rank's pass must move, and its FLOPs. top_k: candidates of a row."""
    config = Shard(0, manifest.ranks).config(manifest.model)
    rank = manifest.adapter.rank if manifest.adapter and engine == "diffusion" else 0
    shape = PassShape(batch, step, window, step, top_k, rank)
    return least_bytes(config, shape, stored_matrix_bytes(config, manifest.precision)), least_flops(config, shape)


def host_bytes(manifest: Manifest, candidates: int, block_length: int) -> HostBytes:
    """Of a draft and its verification, with results for every token."""
    integers = INTEGER_BYTES * (3 * block_length + 1)  # ids, positions, rows with logits; the first row to write
    draft = integers + INTEGER_BYTES + (REAL_BYTES if manifest.adapter else 0)  # its length; the adapter's factor
    verification = integers + block_length**2  # the mask
    results = block_length * (candidates * (LOGIT_BYTES + INTEGER_BYTES) + LOGIT_BYTES)
    return HostBytes(to_device=draft + verification, to_host=2 * results)


def kv_pool_bytes(manifest: Manifest) -> int:
    """Of a rank: keys and values of every sequence up to the capacity."""
    config, limits = Shard(0, manifest.ranks).config(manifest.model), manifest.limits
    return 2 * config.num_hidden_layers * config.kv_width * REAL_BYTES * limits.capacity * limits.largest_pass[0]


def _built_for(sms: tuple[int, ...]) -> str:
    """The first known GPU of these compute capabilities."""
    found = [key for key, gpu in GPUS.items() if gpu.compute_capability in sms]
    if not found:
        raise TriModeError(f"no GPU is known of compute capability {', '.join(map(str, sms))}; name one by --gpu")
    return found[0]


def _at_most(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """The sizes, each lowered to ``largest``, without repetitions."""
    return tuple(dict.fromkeys(min(size, largest) for size in sizes))


def print_report(report: AuditReport, console: Console) -> None:
    console.print(f"{report.engine}: counted from the kernels of target {report.target}; nothing was run on a GPU")
    _print_table([row.cells() for row in report.passes], console)
    console.print(
        f"batch {report.passes[0].batch}; a layer: kernels of a layer; int4: kernels that multiply int4 matrices, and "
        "such matrices; /bound: bytes divided by the lower bound"
    )
    for note in report.notes:
        console.print(note)
    for name in dict.fromkeys(row.engine for row in report.passes):
        first = next(row for row in report.passes if row.engine == name)
        if parts := first.parts():
            console.print(f"{name}, step {first.step}, window {first.window}")
            _print_table(parts, console)
    held = ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in report.memory.items())
    console.print(f"memory of a GPU: {held}")
    console.print(
        f"copied in a self-speculation cycle of {BLOCK_LENGTH} tokens: {report.cycle.to_device} bytes to the GPU, "
        f"{report.cycle.to_host} to the host"
    )
    bounds = _table("window", "AR ms", "draft ms", "verify ms", "AR tok/s", "linear_spec tok/s")
    for bound in report.bounds:
        numbers = (bound.ar_ms, bound.draft_ms, bound.verify_ms, bound.ar_tokens_per_second)
        bounds.add_row(
            str(bound.window),
            *(f"{number:.2f}" for number in numbers),
            f"{bound.linear_spec_tokens_per_second:.1f}",
        )
    card = find_gpu(report.gpu).name
    console.print(f"minimum time on {card}: the engine's bytes at full bandwidth, {report.acceptance} tokens per cycle")
    console.print(bounds)
    _print_ranks(report, console)
    console.print("the roofline against published speeds of the 8B checkpoint (arXiv 2607.05722), one request")
    published = _table("GPU", "weights", "mode", "published", "bound", "ratio", "model", "residual")
    for line in published_comparison():
        published.add_row(
            line.gpu,
            line.weights,
            line.mode,
            f"{line.published:g}",
            f"{line.bound:.1f}",
            f"{line.ratio:.2f}",
            f"{line.predicted:.1f}",
            f"{line.residual:+.1%}",
        )
    console.print(published)


def _print_ranks(report: AuditReport, console: Console) -> None:
    link = LINKS[report.link]
    if report.ranks > 1:
        one = report.passes[0]
        console.print(
            f"{report.ranks} ranks; the tables above are of one of them. It exchanges partial sums in {one.exchanges} "
            f"kernels a pass, and receives {one.link_bytes / 1e3:.1f} kB in a step of {one.step}"
        )
    console.print(
        f"this network on several GPUs, one request, {link.name}: estimates at the lower bound, with "
        f"{1e6 * link.latency:.0f} microseconds (assumed) for an exchange; N replicas serve N times the requests"
    )
    table = _table("window", "GPUs", "AR ms", "cycle ms", "AR speed-up", "cycle speed-up", "exchanges of AR")
    for window, rows in report.of_ranks.items():
        for row in rows:
            times = (f"{1e3 * row.ar:.2f}", f"{1e3 * row.cycle:.2f}")
            gains = (f"{row.ar_speedup:.2f}", f"{row.cycle_speedup:.2f}", f"{row.sums:.0%}")
            table.add_row(str(window), str(row.ranks), *times, *gains)
    console.print(table)


def _print_table(rows: list[dict[str, str]], console: Console) -> None:
    """Rows of cells by heading."""
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


def write_plot(report: AuditReport, path: Path) -> None:
    """Write a PNG: one bar for each pass, its bytes by kind of kernel, and its lower bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(kind for row in report.passes for kind in row.bytes_by_kind))
    labels = [f"{row.engine}\nstep {row.step}, window {row.window}" for row in report.passes]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(labels) + 1.6), layout="constrained")
    left = [0.0] * len(labels)
    for kind in kinds:
        sizes = [row.bytes_by_kind.get(kind, 0) / 1e9 for row in report.passes]
        axes.barh(labels, sizes, left=left, label=kind, height=0.7)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    bounds = [row.bound / 1e9 for row in report.passes]
    axes.plot(bounds, labels, "k|", markersize=12, markeredgewidth=2, label="bound")
    axes.invert_yaxis()
    axes.set_xlabel("GB per pass, counted from the compiled kernels (not run)")
    axes.tick_params(labelsize=7)
    axes.margins(y=0.02)
    figure.legend(fontsize=7, loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
