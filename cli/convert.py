"""``trimode convert``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from trimode.build.gpu.kernel_target import KernelTarget
from trimode.build.registry import TARGETS
from trimode.cli.extras import requires_extra
from trimode.cli.manifest_table import print_manifest
from trimode.cli.parameters import PATH, json_option
from trimode.cli.target_options import chosen_options
from trimode.common.progress_bars import progress_bars
from trimode.engine.targets.tensorrt import Operators

_TARGETS = {name: target for name, target in TARGETS.items() if issubclass(target, KernelTarget)}


@click.command()
@click.argument("engine", type=PATH)
@click.argument("out", type=PATH)
@click.option("--target", type=click.Choice(list(_TARGETS)), required=True)
@click.option("--operators", type=click.Choice(get_args(Operators)), help="tensorrt: as in `trimode build`.")
@json_option
def command(engine: Path, out: Path, target: str, operators: Operators | None, as_json: bool) -> None:
    """Write ENGINE for another target into the new folder OUT, without its checkpoint.

    ENGINE was built for target cuda or tensorrt. Both use the same weights and kernels. These are hard-linked, or
    copied if the file system has no hard links.
    """
    with requires_extra("build"):
        from trimode.build.conversion import convert_engine

    chosen = _TARGETS[target](**chosen_options(target, {"operators": operators}))
    with progress_bars() as progress:
        manifest = convert_engine(engine, out, chosen, progress)
    print_manifest(out, manifest, as_json)
