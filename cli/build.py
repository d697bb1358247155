"""``trimode build``."""

from __future__ import annotations

from pathlib import Path

import click

from trimode.build.registry import TARGETS
from trimode.cli.extras import requires_extra
from trimode.cli.interrupts import exit_on_interrupt
from trimode.cli.manifest_table import print_manifest
from trimode.cli.parameters import PATH, json_option
from trimode.cli.target_options import chosen_options, target_options
from trimode.common.progress_bars import progress_bars
from trimode.model.checkpoint import open_checkpoint


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=PATH)
@click.option("--target", type=click.Choice(list(TARGETS)), default="cpu", show_default=True)
@click.option(
    "--capacity",
    type=click.IntRange(min=1),
    help="Longest sequence in tokens [default: the model's limit on cpu, 4096 on GPUs].",
)
@click.option(
    "--prefill-step",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Most prompt tokens of a pass.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Logits that the engine returns for each position; sampling is restricted to them "
    "[default: 64 on cpu, 4 on GPUs].",
)
@target_options
@json_option
def command(
    checkpoint: str,
    out: Path,
    target: str,
    capacity: int | None,
    prefill_step: int,
    top_k: int | None,
    as_json: bool,
    **options: object,
) -> None:
    """Build the AR and the diffusion engine of CHECKPOINT (a folder or a Hugging Face model ID), into the new folder
    OUT.
    """
    with requires_extra("build"):
        from trimode.build.engine_builder import build_engine

    build_target = TARGETS[target](**chosen_options(target, options))
    with exit_on_interrupt():
        build_target.import_packages()
    with progress_bars() as progress:
        manifest = build_engine(
            open_checkpoint(checkpoint),
            out,
            target=build_target,
            capacity=capacity,
            prefill_step=prefill_step,
            top_k=top_k,
            progress=progress,
        )
    print_manifest(out, manifest, as_json)
