"""Audit an engine directory for several shapes of pass: a record, tables, and a plot."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from trimode.build.roofline import find_gpu, pass_seconds, published_comparison
from trimode.build.rtx.audit.counting import PassAudit, audit_pass, cycle_bytes_to_host, read_plans
from trimode.build.scale_out import LINKS, RankEstimate, estimates, find_link

BLOCK_LENGTH = 32
DEFAULT_STEPS = (1, 8, 32)
DEFAULT_WINDOWS = (512, 4096)


class TimeBound(BaseModel):
    """The shortest time of each pass in milliseconds, and the resulting tokens per second of one request: the plan's
    bytes at the GPU's full bandwidth. Self-speculation drafts and verifies blocks of ``block_length``."""

    window: int
    block_length: int
    ar_ms: float
    draft_ms: float
    verify_ms: float
    ar_tokens_per_second: float
    linear_spec_tokens_per_second: float


class AuditReport(BaseModel):
    """ranks: of the engine. link: between its GPUs. of_ranks: estimates for other numbers of GPUs, by window, for the
    sizes and the types of this engine's network."""

    engine: str
    gpu: str
    ranks: int
    link: str
    acceptance: float
    weights_shared: int
    weights_private: int
    cycle_bytes_to_host: int
    passes: list[PassAudit]
    bounds: list[TimeBound]
    of_ranks: dict[int, list[RankEstimate]]


def audit_engine(
    folder: Path,
    *,
    gpu: str,
    acceptance: float,
    batch: int = 1,
    steps: tuple[int, ...] | None = None,
    windows: tuple[int, ...] | None = None,
    link: str | None = None,
) -> AuditReport:
    """Audit both plans at every step and window.

    gpu: a key of :data:`trimode.build.roofline.GPUS`. acceptance: tokens per self-speculation cycle. steps,
    windows: None for :data:`DEFAULT_STEPS` and :data:`DEFAULT_WINDOWS`, each lowered to the plans' limits. Raises
    TriModeError for a shape beyond these limits. link: a key of
    :data:`trimode.build.scale_out.LINKS`; None for the GPU's usual one.
    """
    card = find_gpu(gpu)
    between = find_link(link, gpu)
    ar, diffusion = read_plans(folder)
    limits = ar.manifest.limits
    _, max_step = limits.largest_pass
    if windows is None:
        windows = _at_most(DEFAULT_WINDOWS, limits.capacity)
    if steps is None:
        steps = _at_most(DEFAULT_STEPS, min(max_step, *windows))
    passes = [
        audit_pass(plan, batch, step, window, card.cache)
        for plan in (ar, diffusion)
        for window in windows
        for step in steps
    ]
    bounds = []
    for window in windows:
        block = min(BLOCK_LENGTH, window, max_step)
        one, verify, draft = (
            audit_pass(ar, 1, 1, window),
            audit_pass(ar, 1, block, window),
            audit_pass(diffusion, 1, block, window),
        )
        seconds = [
            pass_seconds(card, counted.bytes, counted.flops)
            + counted.exchanges * between.latency
            + counted.link_bytes / between.bandwidth
            for counted in (one, draft, verify)
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
    # Bytes between two runs of the pool are a constant of one plan that the other plan lacks.
    private = [
        following.plan_offset - splice.plan_offset
        for entry in (ar.rtx.ar, ar.rtx.diffusion)
        for splice, following in zip(entry.splices, entry.splices[1:], strict=False)
    ]
    return AuditReport(
        engine=str(folder),
        gpu=card.key,
        ranks=ar.manifest.ranks,
        link=between.key,
        acceptance=acceptance,
        weights_shared=sum(splice.bytes for splice in ar.rtx.ar.splices),
        weights_private=sum(private),
        cycle_bytes_to_host=cycle_bytes_to_host(ar.manifest, BLOCK_LENGTH),
        passes=passes,
        bounds=bounds,
        of_ranks={
            window: estimates(card, between, ar.manifest.model, ar.manifest.precision, window=window)
            for window in windows
        },
    )


def _at_most(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """The sizes, each lowered to ``largest``, without repetitions."""
    return tuple(dict.fromkeys(min(size, largest) for size in sizes))


def print_report(report: AuditReport, console: Console) -> None:
    first = report.passes[0]
    console.print(f"{report.engine}: counted from the compiled plans; nothing was run on a GPU")
    table = _table(
        "engine", "step", "window", "kernels", "a layer", "int4", "alone", "copies", "MB", "/bound", "whole", "cache"
    )
    for row in report.passes:
        table.add_row(
            row.engine,
            str(row.step),
            str(row.window),
            str(row.kernels),
            str(row.kernels_a_layer),
            f"{row.int4_products}/{row.int4_matrices}",
            str(row.lone_dequantisations),
            str(row.kv_copies),
            f"{row.bytes / 1e6:.1f}",
            f"{row.ratio:.3f}",
            f"{row.ratio_whole_pool:.3f}",
            f"{row.ratio_with_cache:.3f}",
        )
    console.print(table)
    console.print(
        f"batch {first.batch}; int4: matrices multiplied as int4, of all int4 matrices; alone: kernels that only "
        "dequantise; copies: of keys and values; /bound: bytes divided by the lower bound; whole: the same if "
        "attention reads the whole pool; cache: the same if each kernel reads the previous one's results from the L2 "
        f"cache of {find_gpu(report.gpu).name}; not counted: {first.unresolved} tensors internal to the builder"
    )
    console.print(
        f"weights: {report.weights_shared / 1e6:.1f} MB shared by both plans, {report.weights_private} bytes in only "
        f"one; copied to the host per self-speculation cycle of {BLOCK_LENGTH} tokens: {report.cycle_bytes_to_host} "
        "bytes"
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
    console.print(f"minimum time on {card}: the plan's bytes at full bandwidth, {report.acceptance} tokens per cycle")
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
