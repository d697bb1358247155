"""The table of results that `make prove` and `make prove-runtime` print."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass
class ProofRow:
    """A quantity, its bar, and the measured value. ``holds`` is None for speeds, which have no bar: they depend on the
    machine.
    """

    what: str
    bar: str
    found: str
    holds: bool | None


def print_table(rows: list[ProofRow], as_json: bool, caption: str | None = None) -> None:
    """Print the rows. Exit with code 1 if a row with a bar does not hold."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        table = Table("what", "bar", "found", "holds", caption=caption)
        words = {True: "yes", False: "[bold red]no", None: "reported"}
        for row in rows:
            table.add_row(row.what, row.bar, row.found, words[row.holds])
        Console(width=150).print(table)
    sys.exit(1 if any(row.holds is False for row in rows) else 0)
