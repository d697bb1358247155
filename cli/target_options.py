"""The options of ``trimode build`` that belong to targets, made from the fields of the targets themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click

from trimode.build.registry import TARGETS
from trimode.build.target import TargetOption, options_of
from trimode.cli.parameters import integers
from trimode.common.errors import TriModeError


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every target. Targets that have the same flag share the option."""
    by_flag: dict[str, dict[str, TargetOption]] = {}
    for target, kind in TARGETS.items():
        for option in options_of(kind):
            by_flag.setdefault(option.flag, {})[target] = option
    for flag, uses in reversed(by_flag.items()):
        option = next(iter(uses.values()))
        command = click.option(flag, option.name, help=_help(uses), **_form(option.type))(command)
    return command


def chosen_options(target: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values that were given. Raises TriModeError for one that is not an option of ``target``."""
    given = {name: value for name, value in values.items() if value is not None}
    allowed = {option.name for option in options_of(TARGETS[target])}
    flags = {option.name: option.flag for kind in TARGETS.values() for option in options_of(kind)}
    for name in given.keys() - allowed:
        raise TriModeError(f"{flags[name]} is not an option of target {target}")
    return given


def _help(uses: dict[str, TargetOption]) -> str:
    """E.g. ``rtx, tensorrt: Type of activations [default: bf16].``"""
    targets_of: dict[str, list[str]] = {}
    for target, option in uses.items():
        targets_of.setdefault(option.help.removesuffix(".") + _default(option.default), []).append(target)
    return " ".join(f"{', '.join(targets)}: {text}." for text, targets in targets_of.items())


def _default(value: Any) -> str:
    if value is None or value is False:  # the help explains it, or it is a flag
        return ""
    return f" [default: {','.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _form(kind: Any) -> dict[str, Any]:
    """The arguments of ``click.option`` for a field of type ``kind``."""
    if kind is bool:
        return {"is_flag": True, "default": None}
    if kind is int:
        return {"type": click.IntRange(min=1)}
    if get_origin(kind) is Literal:
        return {"type": click.Choice(get_args(kind))}
    if tuple[int, ...] in (kind, *get_args(kind)):
        return {"callback": integers, "metavar": "N,N,..."}
    raise TypeError(f"no form of option for a field of type {kind}")
