"""``trimode compile``."""

from __future__ import annotations

from pathlib import Path

import click

from trimode.cli.extras import requires_extra
from trimode.cli.manifest_table import print_manifest
from trimode.cli.parameters import PATH, json_option
from trimode.common.progress_bars import progress_bars


@click.command()
@click.argument("emitted", type=PATH)
@click.argument("out", type=PATH)
@json_option
def command(emitted: Path, out: Path, as_json: bool) -> None:
    """Compile EMITTED for this machine's GPU, into the new folder OUT.

    EMITTED is what `trimode build --target tensorrt --emit-only` wrote.
    """
    with requires_extra("build"):
        from trimode.build.tensorrt.compiled_directory import compile_engine

    with progress_bars() as progress:
        manifest = compile_engine(emitted, out, progress)
    print_manifest(out, manifest, as_json)
