"""The report of ``trimode audit``: tables on the terminal, and a plot."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from trimode.build.audit import BLOCK_LENGTH, AuditReport
from trimode.build.roofline import find_gpu, published_comparison
from trimode.build.scale_out import LINKS


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
