"""``trimode export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from trimode.cli.parameters import PATH, json_option
from trimode.common.progress_bars import progress_bars
from trimode.model.checkpoint import open_checkpoint
from trimode.quantize import export_trtllm


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=PATH)
@click.option(
    "--format", "form", type=click.Choice(["trtllm"]), required=True, help="trtllm: a checkpoint for TensorRT-LLM."
)
@json_option
def command(checkpoint: str, out: Path, form: Literal["trtllm"], as_json: bool) -> None:
    """Export the AR network of CHECKPOINT (a folder or a Hugging Face model ID) for another program, into the new
    folder OUT.
    """
    with progress_bars() as progress:
        report = export_trtllm(open_checkpoint(checkpoint), out, progress)
    if as_json:
        print(report.model_dump_json())
        return
    print(
        f"{out}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB, quantisation {report.quantization}, "
        f"for {form}; the same network up to {report.max_tokens} tokens"
    )
