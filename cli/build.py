"""``trimode build``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import click

from trimode.cli.extras import requires_extra
from trimode.cli.interrupts import exit_on_interrupt
from trimode.cli.manifest_table import print_manifest
from trimode.cli.parameters import PATH, integers, json_option
from trimode.common.errors import TriModeError
from trimode.common.progress_bars import progress_bars
from trimode.engine.targets import SECTIONS
from trimode.engine.targets.cpu import Activations
from trimode.model.checkpoint import open_checkpoint


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=PATH)
@click.option("--target", type=click.Choice(list(SECTIONS)), default="cpu", show_default=True)
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
    help="Tokens of a prefill pass.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Logits that the engine returns for each position; sampling is restricted to them "
    "[default: 64 on cpu, 4 on GPUs].",
)
@click.option(
    "--activations",
    type=click.Choice(get_args(Activations)),
    help="cpu: inputs of int4 products; int8 is several times as fast, fp32 is exact [default: int8].",
)
@click.option(
    "--sm",
    "sms",
    callback=integers,
    metavar="N,N,...",
    help="GPUs: compute capabilities, 121 for 12.1 [default: 121,120,89 for rtx; for tensorrt this machine's GPU, "
    "with --emit-only every supported one].",
)
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), help="GPUs: activations and KV pool [default: bf16].")
@click.option("--max-batch", type=click.IntRange(min=1), help="GPUs: sequences in a pass [default: 8].")
@click.option("--max-step", type=click.IntRange(min=1), help="GPUs: tokens of a sequence in a pass [default: 256].")
@click.option(
    "--emit-only",
    is_flag=True,
    default=None,
    help="tensorrt: write everything but the plans; `trimode compile` makes them on a machine with a GPU.",
)
@json_option
def command(
    checkpoint: str,
    out: Path,
    target: str,
    capacity: int | None,
    prefill_step: int,
    top_k: int | None,
    activations: Activations | None,
    sms: tuple[int, ...] | None,
    dtype: Literal["bf16", "fp16"] | None,
    max_batch: int | None,
    max_step: int | None,
    emit_only: bool | None,
    as_json: bool,
) -> None:
    """Build the AR and the diffusion engine of CHECKPOINT (a folder or a hub id), into the new folder OUT."""
    with requires_extra("build"):
        from trimode.build.engine_builder import build_engine
        from trimode.build.registry import TARGETS
        from trimode.build.target import options_of

    options: dict[str, Any] = {
        "activations": activations,
        "sms": sms,
        "dtype": dtype,
        "max_batch": max_batch,
        "max_step": max_step,
        "emit_only": emit_only,
    }
    given = {name: value for name, value in options.items() if value is not None}
    kind = TARGETS[target]
    for name in given.keys() - {option.name for option in options_of(kind)}:
        flag = "--sm" if name == "sms" else f"--{name.replace('_', '-')}"
        raise TriModeError(f"{flag} is not an option of target {target}")
    build_target = kind(**given)
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
