"""Estimate what tensor parallelism would gain on GPUs: the table of docs/scale-out.md. Nothing is measured.

    python -m scripts.gpu.ranks_estimate [--batch N] [--window N] [--markdown]

Replicas of N GPUs have N times the requests of one GPU and the speed of one GPU for each request. So tensor parallelism
pays where a request must be faster than one GPU allows, or the model does not fit; replicas pay for everything else.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from trimode.build.roofline import ACCEPTANCE_LENGTH, CONFIG_8B, CONTEXT, FORMATS, GPUS
from trimode.build.scale_out import LINKS, estimates

PAIRS = (
    ("h100", "nvlink4"),
    ("h100", "pcie5"),
    ("b200", "nvlink5"),
    ("a100-80gb", "nvlink3"),
    ("rtx-pro-6000", "pcie5"),
    ("rtx-4090", "pcie4"),
    ("dgx-spark", "cx7"),
)
SPEED_UPS = ("AR speed-up", "cycle speed-up", "cycle speed-up per GPU", "communication share of AR")
COLUMNS = ("GPU", "link", "ranks", "AR, ms", "cycle, ms", "tok/s", *SPEED_UPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="sequences in a pass")
    parser.add_argument("--window", type=int, default=CONTEXT, help="KV rows of each")
    parser.add_argument("--weights", choices=list(FORMATS), default="w4a16")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    rows = [row for gpu, link in PAIRS for row in rows_of(gpu, link, arguments)]
    if arguments.markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in [COLUMNS, ("---",) * len(COLUMNS), *rows]))
        return
    table = Table(*COLUMNS, title=f"8B shape, {arguments.weights}, batch {arguments.batch}: estimates, not measured")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def rows_of(gpu: str, link: str, arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    found = estimates(
        GPUS[gpu],
        LINKS[link],
        CONFIG_8B,
        FORMATS[arguments.weights],
        window=arguments.window,
        batch=arguments.batch,
    )
    return [
        (
            gpu,
            LINKS[link].name,
            str(one.ranks),
            f"{1e3 * one.ar:.2f}",
            f"{1e3 * one.cycle:.2f}",
            f"{arguments.batch * ACCEPTANCE_LENGTH / one.cycle:.0f}",
            f"{one.ar_speedup:.2f}",
            f"{one.cycle_speedup:.2f}",
            f"{one.cycle_speedup / one.ranks:.0%}",
            f"{one.sums:.0%}",
        )
        for one in found
        if link != "cx7" or one.ranks <= 2
    ]


if __name__ == "__main__":
    main()
