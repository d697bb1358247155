"""``trimode audit``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from trimode.cli.extras import requires_extra
from trimode.cli.parameters import PATH, integers, json_option


@click.command()
@click.argument("engine", type=PATH)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences in a pass.")
@click.option(
    "--step",
    "steps",
    callback=integers,
    metavar="N,N,...",
    help="Tokens of a sequence in a pass [default: 1,8,32, as far as ENGINE allows].",
)
@click.option(
    "--window",
    "windows",
    callback=integers,
    metavar="N,N,...",
    help="KV entries of each sequence [default: 512,4096, as far as ENGINE allows].",
)
@click.option(
    "--gpu", help="GPU to compute lower bounds of times for, such as h100 [default: one that ENGINE is built for]."
)
@click.option("--link", help="Link between GPUs, such as nvlink4 or pcie5 [default: the usual one of --gpu].")
@click.option(
    "--acceptance", type=float, default=6.82, show_default=True, help="Tokens that a self-speculation cycle generates."
)
@click.option("--plot", type=PATH, help="Write the bytes of each kind of kernel to this PNG.")
@json_option
def command(
    engine: Path,
    batch: int,
    steps: tuple[int, ...] | None,
    windows: tuple[int, ...] | None,
    gpu: str | None,
    link: str | None,
    acceptance: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """List the GPU kernels of ENGINE (target cuda or rtx) and the bytes that they move. Needs no GPU."""
    with requires_extra("build"):
        from trimode.build.audit import audit_engine
        from trimode.build.audit_report import print_report, write_plot

    report = audit_engine(engine, batch=batch, steps=steps, windows=windows, gpu=gpu, acceptance=acceptance, link=link)
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        print(report.model_dump_json())
    else:
        print_report(report, Console(highlight=False))
