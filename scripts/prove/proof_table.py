"""A table of what was promised and what was found: for the scripts that measure the README's tables."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """A bar and what was found."""

    what: str
    bar: str
    found: str
    holds: bool


def tell(rows: list[Row], as_json: bool, caption: str | None = None) -> None:
    """Print the rows, and exit with 1 if one does not hold."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        table = Table("what", "bar", "found", "holds", caption=caption)
        for row in rows:
            table.add_row(row.what, row.bar, row.found, "yes" if row.holds else "[bold red]no")
        Console(width=150).print(table)
    sys.exit(0 if all(row.holds for row in rows) else 1)
