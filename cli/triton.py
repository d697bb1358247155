"""``trimode triton``."""

from __future__ import annotations

from pathlib import Path

import click

from trimode.cli.parameters import PATH
from trimode.engine.manifest import Manifest
from trimode.runtime.api.batch_size import batch_size_of
from trimode.runtime.triton.repository import ENSEMBLE_NAME, MODEL_NAME, write_repository


@click.command()
@click.argument("engine", type=PATH)
@click.argument("repository", type=PATH)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    help="Sequences that run at once [default: 16, or what the engine was built for if that is less].",
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
def command(engine: Path, repository: Path, max_batch: int | None, max_queue: int, decoupled: bool) -> None:
    """Write the new folder REPOSITORY, from which Triton Inference Server serves the engine directory ENGINE."""
    at_once = batch_size_of(Manifest.read(engine).limits, max_batch)
    write_repository(engine, repository, max_batch=at_once, max_queue=max_queue, decoupled=decoupled)
    print(f"{repository}: models {MODEL_NAME} and {ENSEMBLE_NAME}")
