"""``trimode triton``."""

from __future__ import annotations

from pathlib import Path

import click

from trimode.cli.parameters import PATH
from trimode.engine.manifest import Manifest
from trimode.runtime.triton.repository import ENSEMBLE_NAME, MODEL_NAME, write_repository


@click.command()
@click.argument("engine", type=PATH)
@click.argument("repository", type=PATH)
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences that run at once."
)
@click.option(
    "--max-queue", type=click.IntRange(min=1), default=1024, show_default=True, help="Sequences that may wait."
)
@click.option(
    "--decoupled/--no-decoupled",
    default=True,
    show_default=True,
    help="Decoupled models stream. TensorRT-LLM's own client needs --no-decoupled.",
)
def command(engine: Path, repository: Path, max_batch: int, max_queue: int, decoupled: bool) -> None:
    """Write the new folder REPOSITORY, from which Triton Inference Server serves the engine directory ENGINE."""
    Manifest.read(engine)
    write_repository(engine, repository, max_batch=max_batch, max_queue=max_queue, decoupled=decoupled)
    print(f"{repository}: models {MODEL_NAME} and {ENSEMBLE_NAME}")
