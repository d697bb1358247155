"""``trimode quantize``."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import get_args

import click

from trimode.cli.parameters import PATH, json_option
from trimode.common.progress_bars import progress_bars
from trimode.model.checkpoint import open_checkpoint
from trimode.model.quantization import HeadFormat, Method
from trimode.quantize import quantize_checkpoint


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=PATH)
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    default="awq",
    show_default=True,
    help="awq (activation-aware) needs calibration text; rtn rounds to nearest.",
)
@click.option("--group", type=int, default=128, show_default=True, help="Input channels that share a scale.")
@click.option(
    "--head", type=click.Choice(get_args(HeadFormat)), default="16bit", show_default=True, help="Type of the LM head."
)
@click.option(
    "--calibration",
    type=PATH,
    help="JSONL of texts or conversations for AWQ [default: the checkpoint's calibration.jsonl].",
)
@json_option
def command(
    checkpoint: str,
    out: Path,
    method: Method,
    group: int,
    head: HeadFormat,
    calibration: Path | None,
    as_json: bool,
) -> None:
    """Quantise CHECKPOINT (a folder or a Hugging Face model ID) to w4a16, into the new folder OUT."""
    with progress_bars() as progress:
        report = quantize_checkpoint(
            open_checkpoint(checkpoint),
            out,
            method=method,
            group=group,
            head=head,
            calibration=calibration,
            progress=progress,
        )
    if as_json:
        print(report.model_dump_json())
        return
    errors = report.weight_error
    worst = max(errors, key=errors.__getitem__)
    print(f"{out}: {len(errors)} matrices to int4 by {method}, groups of {group}")
    print(f"relative weight error: mean {fmean(errors.values()):.4f}, worst {errors[worst]:.4f} ({worst})")
