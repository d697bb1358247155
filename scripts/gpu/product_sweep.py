"""Time variants of the int4 product on a GPU, also those that the operator does not choose.

A variant is a split of K, a tile, and its warps and stages. Each one is the operator's own kernel, the sum over the
parts included, and its result is compared with the reference.

    python -m scripts.gpu.product_sweep emit .gpu/sweep --sm 90      on any machine: compile the variants
    python -m scripts.gpu.product_sweep run .gpu/sweep out/sweep     on the GPU's machine: writes sweep.jsonl, sweep.md
    python -m scripts.gpu.product_sweep dry                          small sizes in the interpreter

The GPU's machine needs what ``scripts.gpu.check`` needs. Each result is written immediately. The exit code is 1 if a
variant is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scripts.gpu.command_line import emit_run_dry
from scripts.gpu.kernel_checks import (
    CACHE_BYTES,
    TOLERANCE,
    Host,
    distance,
    expected_product,
    median_microseconds,
    product_inputs,
)
from scripts.gpu.kernel_launch import prepare
from scripts.gpu.kernels_8b import HIDDEN, INTERMEDIATE, KV_WIDTH, QUERY_WIDTH, Product
from trimode.plugins.operators import Int4Product, Node, Tactic


class SplitVariant(Int4Product):
    """The product with another split of K and other tactics than the operator's own."""

    def __init__(self, splits: int, tactics: tuple[Tactic, ...], *, residual: bool) -> None:
        super().__init__(split=splits > 1, residual=residual)
        self.splits = splits
        self._tactics = tactics

    def parts(self, _node: Node) -> int:
        return self.splits

    def compiled_tactics(self, _node: Node) -> dict[int, Tactic]:
        return dict(enumerate(self._tactics, 1))


class Matrix(NamedTuple):
    """splits: parts of K that are tried in steps, beside the operator's own."""

    inner: int
    columns: int
    residual: bool
    splits: tuple[int, ...]

    @property
    def product(self) -> Product:
        """The product with the inputs of all variants."""
        return Product(Int4Product(split=True, residual=self.residual), self.inner, self.columns)

    @property
    def own_splits(self) -> int:
        return self.product.operator.constants(self.product.node(1))["SPLITS"]

    def variants(self) -> Iterator[SplitVariant]:
        """For steps, every split. For chunks of prompts, the operator's split and none."""
        for splits in sorted({1, self.own_splits, *self.splits}):
            steps = STEP_TACTICS if splits in (self.own_splits, *self.splits) else ()
            chunks = CHUNK_TACTICS if splits in (1, self.own_splits) else ()
            yield SplitVariant(splits, (*steps, *chunks), residual=self.residual)


@dataclass(frozen=True)
class SweepSizes:
    matrices: dict[str, Matrix]
    rows: tuple[int, ...]


def _tactic(block_m: int, block_n: int, warps: int, stages: int) -> Tactic:
    return Tactic({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps=warps, stages=stages)


def _block_m(tactic: Tactic) -> int:
    return tactic.constants["BLOCK_M"]


# The operator's tactics and others.
TACTICS = tuple(
    dict.fromkeys(
        (
            *Int4Product.TACTICS,
            *(_tactic(block_m, block_n, 4, 3) for block_m in (16, 32) for block_n in (64, 128)),
            *(_tactic(128, 64, 4, 3), _tactic(128, 64, 8, 3), _tactic(128, 128, 8, 2), _tactic(256, 64, 8, 3)),
        )
    )
)
_LARGE = 64
STEP_TACTICS = tuple(tactic for tactic in TACTICS if _block_m(tactic) < _LARGE)
CHUNK_TACTICS = tuple(tactic for tactic in TACTICS if _block_m(tactic) >= _LARGE)
SIZES_8B = SweepSizes(
    {
        "qkv": Matrix(HIDDEN, QUERY_WIDTH + 2 * KV_WIDTH, False, (2, 4, 8)),
        "o": Matrix(QUERY_WIDTH, HIDDEN, True, (2, 4, 8)),
        "gate_up": Matrix(HIDDEN, 2 * INTERMEDIATE, False, (1,)),
        "down": Matrix(INTERMEDIATE, HIDDEN, True, (4, 7, 8)),
    },
    (1, 16, 32, 64, 128, 256, 512),
)
# Variants of a case in the table.
SHOWN = 3
SMALL_SIZES = SweepSizes({"split": Matrix(2048, 130, True, (2,)), "whole": Matrix(256, 130, False, (1,))}, (1, 20, 70))


def suits(tactic: Tactic, rows: int) -> bool:
    """Whether the tactic may be the fastest: the smallest tile that holds a step, any large tile for more rows."""
    if rows > _LARGE:
        return _block_m(tactic) >= _LARGE
    return _block_m(tactic) == next(size for size in (16, 32, _LARGE) if rows <= size)


def results(host: Host, sizes: SweepSizes, kernels: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """One record for each variant and number of rows. kernels: those that the GPU has; None for all."""
    for label, matrix in sizes.matrices.items():
        copies = 2 if host.device == "cpu" else max(2, min(16, CACHE_BYTES // (matrix.inner * matrix.columns // 2) + 1))
        product = matrix.product
        for rows in sizes.rows:
            node, inputs = product.node(rows), product_inputs(host, product, product.node(rows))
            expected = expected_product(product, inputs)
            packed = [inputs["packed"], *(inputs["packed"].clone() for _ in range(copies - 1))]
            tactics = product.operator.tactics(node)
            default = tactics[product.operator.default_tactic(node, tactics)]
            for variant, (number, tactic) in _tried(matrix, node, rows):
                name = variant.kernel_name(node, number)
                if kernels is not None and name not in kernels:
                    continue
                given = {operand.name: inputs[operand.name] for operand in variant.inputs}
                launches = [prepare(variant, {**given, "packed": words}, tactic) for words in packed]
                host.launch(name, launches[0])
                error = distance(launches[0].outputs[0], expected)
                yield {
                    "matrix": label,
                    "rows": rows,
                    "splits": variant.splits,
                    **tactic.constants,
                    "warps": tactic.warps,
                    "stages": tactic.stages,
                    "error": error,
                    "right": error <= TOLERANCE,
                    "microseconds": median_microseconds(host, name, launches, copies),
                    "default": variant.splits == matrix.own_splits and tactic == default,
                }


def _tried(matrix: Matrix, node: Node, rows: int) -> Iterator[tuple[SplitVariant, tuple[int, Tactic]]]:
    for variant in matrix.variants():
        for numbered in variant.tactics(node).items():
            if suits(numbered[1], rows):
                yield variant, numbered


def markdown(records: list[dict[str, Any]]) -> str:
    """For each matrix and number of rows, the operator's own choice and the fastest variants."""
    lines = ["| matrix | rows | variant | us |", "|---|---|---|---|"]
    cases = dict.fromkeys((record["matrix"], record["rows"]) for record in records)
    for case in cases:
        timed = [record for record in records if (record["matrix"], record["rows"]) == case and record["microseconds"]]
        fastest = sorted(timed, key=lambda record: float(record["microseconds"]))
        for record in (*(record for record in timed if record["default"]), *fastest[:SHOWN]):
            tile = f"{record['splits']} parts, {record['BLOCK_M']} x {record['BLOCK_N']}"
            shape = f"{tile}, {record['warps']} warps, {record['stages']} stages"
            notes = (" (default)" if record["default"] else "") + ("" if record["right"] else " **wrong**")
            lines.append(f"| {case[0]} | {case[1]} | {shape}{notes} | {record['microseconds']:.1f} |")
    return "\n".join(lines) + "\n"


def emit(folder: Path, sm: int) -> None:
    """Compile every variant. sm: compute capability, 90 for 9.0."""
    from trimode.build.gpu.kernel_emission import NeededKernel, kernels_of, write_kernels
    from trimode.common.progress import no_progress

    needed: dict[str, NeededKernel] = {}
    for matrix in SIZES_8B.matrices.values():
        for variant in matrix.variants():
            needed |= kernels_of(variant, matrix.product.node(1))
    write_kernels(needed, "bf16", (sm,), folder, no_progress)
    print(f"{len(needed)} variants in {folder}")


def run(folder: Path, out: Path) -> bool:
    """Time the variants on this machine's GPU. Returns whether all are right."""
    import torch

    from scripts.gpu.cuda_host import CudaHost

    torch.backends.cuda.matmul.allow_tf32 = False
    major, minor = torch.cuda.get_device_capability()
    kernels = folder / f"sm_{10 * major + minor}"
    host = CudaHost(kernels)
    known = json.loads((kernels / "kernels.json").read_text(encoding="utf-8"))["kernels"]
    out.mkdir(parents=True, exist_ok=True)
    records = []
    with (out / "sweep.jsonl").open("w", encoding="utf-8") as file:
        for record in results(host, SIZES_8B, known):
            print(json.dumps(record), file=file, flush=True)
            records.append(record)
    table = markdown(records)
    (out / "sweep.md").write_text(table, encoding="utf-8")
    print(table)
    return _all_right(records)


def dry() -> bool:
    """Run every variant in the interpreter. Returns whether all are right."""
    from tests.support.interpreter_host import InterpreterHost

    return _all_right(list(results(InterpreterHost(), SMALL_SIZES)))


def _all_right(records: list[dict[str, Any]]) -> bool:
    wrong = [record for record in records if not record["right"]]
    print(f"{len(records)} results, {len(wrong)} wrong")
    for record in wrong:
        print(json.dumps(record))
    return not wrong


def main() -> int:
    parser, *_ = emit_run_dry(
        __doc__,
        emit="compile the variants",
        run="time the variants",
        out="folder of the results",
        dry="small sizes in the interpreter",
    )
    options = parser.parse_args()
    if options.command == "emit":
        emit(options.folder, options.sm)
        return 0
    return not (run(options.folder, options.out) if options.command == "run" else dry())


if __name__ == "__main__":
    sys.exit(main())
