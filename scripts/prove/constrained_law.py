"""Check the distribution of constrained draws: 200,000 texts at each of three settings, drafted as chains or as trees.

    python -m scripts.prove.constrained_law
    python -m scripts.prove.constrained_law --tree-width 9

On a small language whose exact distribution is known, with an engine that reports 3 of its 7 tokens, so that many rows
are run again with their masks (tests/support/ruled_language.py). The law is that of AR: a draw from the best 3 legal
tokens.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from rich.console import Console
from rich.progress import track

from scripts.prove.proof_table import ProofRow, print_table
from tests.support.exact_law import total_variation
from tests.support.ruled_language import SETTINGS, constrained_law, drawn
from trimode import SamplingParams

PROMPTS = ((2, 3), (6,), (4, 5))
_AT_ONCE = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200_000, help="texts of three tokens for each setting")
    parser.add_argument("--tree-width", type=int, help="verify trees of so many tokens")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for setting, prompt in zip(SETTINGS, PROMPTS, strict=True):
        tree: dict[str, Any] = {"tree_width": arguments.tree_width} if arguments.tree_width else {}
        params = SamplingParams(max_tokens=3, mode="linear_spec", block_length=4, **tree, **setting)
        counts = Counter[tuple[int, ...]]()
        starts = range(0, arguments.draws, _AT_ONCE)
        for start in track(starts, f"{setting}", transient=True, console=Console(stderr=True)):
            counts += drawn(prompt, params, range(start, min(start + _AT_ONCE, arguments.draws)))
        found = total_variation(counts, constrained_law(prompt, 3, params))
        name = ", ".join(f"{key} {value}" for key, value in (tree | setting).items())
        shown = f"{found.distance:.5f} (chance {found.by_chance:.5f}, deviation {found.deviation:.5f})"
        what = f"{arguments.draws} constrained texts drawn by linear_spec at {name}: total variation from AR's law"
        rows.append(ProofRow(what, "chance", shown, found.is_chance))
    print_table(rows, arguments.json)


if __name__ == "__main__":
    main()
