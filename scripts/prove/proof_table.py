"""The table that the scripts of `make prove` and `make prove-runtime` print."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """A quantity, its bar, and the value found. ``holds`` is None for speeds: they depend on the machine and are
    reported, not judged.
    """

    what: str
    bar: str
    found: str
    holds: bool | None


def print_table(rows: list[Row], as_json: bool, caption: str | None = None) -> None:
    """Print the rows, and exit with 1 if one that is judged does not hold."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        table = Table("what", "bar", "found", "holds", caption=caption)
        words = {True: "yes", False: "[bold red]no", None: "reported"}
        for row in rows:
            table.add_row(row.what, row.bar, row.found, words[row.holds])
        Console(width=150).print(table)
    sys.exit(1 if any(row.holds is False for row in rows) else 0)
