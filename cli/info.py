"""``trimode info``."""

from __future__ import annotations

from pathlib import Path

import click

from trimode.cli.manifest_table import print_manifest
from trimode.cli.parameters import PATH, json_option
from trimode.engine.manifest import Manifest


@click.command()
@click.argument("engine", type=PATH)
@json_option
def command(engine: Path, as_json: bool) -> None:
    """Describe the engine directory ENGINE."""
    print_manifest(engine, Manifest.read(engine), as_json)
