"""Options and option types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from trimode.engine.targets import SECTIONS
from trimode.model.quantization import Method

PATH = click.Path(path_type=Path)


def integers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Callback of an option: whole numbers separated by commas, without repetitions."""
    if value is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        message = f"{value!r} is not a list of whole numbers separated by commas"
        raise click.BadParameter(message, ctx=ctx, param=param) from None


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``, as the parameter ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


def build_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--target``, ``--method`` and ``--group``: options for building the engine of a checkpoint."""
    for option in (
        click.option(
            "--group",
            type=int,
            help="For a checkpoint: input channels that share a scale [default: 128, or less if a matrix requires it].",
        ),
        click.option(
            "--method",
            type=click.Choice(get_args(Method)),
            help="For a checkpoint: quantisation [default: awq if it has a calibration.jsonl, else rtn].",
        ),
        click.option(
            "--target", type=click.Choice(list(SECTIONS)), help="For a checkpoint: target to build for [default: cpu]."
        ),
    ):
        command = option(command)
    return command
