"""``trimode doctor``."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from trimode.cli.machine_report import examine
from trimode.cli.parameters import json_option


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show what this machine can build and run."""
    findings = examine()
    if as_json:
        print(findings.model_dump_json())
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, finding in findings.lines():
        table.add_row(name, finding)
    Console(highlight=False).print(table)
