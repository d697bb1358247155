"""``trimode cache``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from trimode.cli.parameters import json_option
from trimode.common.cache_folder import cache_folder, tactics_folder
from trimode.common.errors import TriModeError
from trimode.engine_cache import list_entries, remove_entry


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the engines that `trimode serve`, `trimode generate` and `trimode.LLM` built from checkpoints, and the
    tactics that were timed for target cuda.

    The cache is $TRIMODE_CACHE, else $XDG_CACHE_HOME/trimode, else ~/.cache/trimode.
    """
    if context.invoked_subcommand is not None:
        return
    entries, tactics = list_entries(), _tactics()
    if as_json:
        engines = [entry.model_dump() for entry in entries]
        files = [str(file) for file in tactics]
        print(json.dumps({"folder": str(cache_folder()), "engines": engines, "tactics": files}))
        return
    total = sum(entry.bytes for entry in entries)
    print(f"{cache_folder()}: {len(entries)} engine{'' if len(entries) == 1 else 's'}, {total / 1e6:.1f} MB")
    if tactics:
        print(f"{tactics_folder()}: tactics of {len(tactics)} set{'' if len(tactics) == 1 else 's'} of kernels")
    if not entries:
        return
    table = Table("KEY", "model", "target", "quantised by", "size", box=None, pad_edge=False)
    for entry in entries:
        method = "-" if entry.method is None else f"{entry.method}, groups of {entry.group}"
        table.add_row(entry.key, entry.source, entry.target, method, f"{entry.bytes / 1e6:.1f} MB")
    Console(highlight=False, soft_wrap=True).print(table)


@command.command()
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Remove every engine, and all timed tactics.")
def remove(keys: tuple[str, ...], every: bool) -> None:
    """Remove the engines with these KEYs from the cache."""
    if every == bool(keys):
        raise TriModeError("give the keys of the engines to remove, or --all")
    for key in [entry.key for entry in list_entries()] if every else keys:
        entry = remove_entry(key)
        print(f"removed {entry.key}, {entry.bytes / 1e6:.1f} MB")
    for file in _tactics() if every else ():
        file.unlink(missing_ok=True)
        print(f"removed {file}")


def _tactics() -> list[Path]:
    return sorted(tactics_folder().glob("*.json"))
