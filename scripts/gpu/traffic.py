"""What each kernel moves, counted tile by tile as its programs walk, and the least that any kernel would.

The counts are exact: tests hold them against those of the interpreter. What is asked for again comes from the L2 cache,
so memory moves it once, in two cases: the whole tensor is of at most :data:`CACHED` bytes, or the part of it that
neighbouring programs share is. Everything else is moved each time it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from trimode.plugins.contracts import AttentionShape, Pattern, ProductShape, Tactic, ceil_div, split_count

# A third of the smallest L2 of the GPUs that we compile for (GeForce RTX 3090, 6 MB).
CACHED = 2 << 20
INDEX, FLOAT = 8, 4


@dataclass
class Asked:
    """Bytes that a kernel loads from and stores to one tensor, each time counted; ``needed``: the distinct ones;
    ``again``: the loaded ones that a neighbouring program loaded before."""

    loaded: int = 0
    stored: int = 0
    needed: int = 0
    again: int = 0

    @property
    def moved(self) -> int:
        return self.needed if self.needed <= CACHED else self.loaded - self.again + self.stored


def moved_bytes(asked: Mapping[str, Asked]) -> int:
    """Bytes through memory."""
    return sum(tensor.moved for tensor in asked.values())


def needed_bytes(asked: Mapping[str, Asked]) -> int:
    """The floor: each byte that is needed once."""
    return sum(tensor.needed for tensor in asked.values())


def asked_bytes(asked: Mapping[str, Asked]) -> int:
    """Bytes between the L2 cache and the processors."""
    return sum(tensor.loaded + tensor.stored for tensor in asked.values())


def kv_write_traffic(shape: AttentionShape, batch: int, step: int, real: int) -> dict[str, Asked]:
    """real: bytes of an activation. All rows are inside the pool."""
    row = shape.head_dim * real
    q, kv = shape.kv_heads * shape.group * row, shape.kv_heads * row
    tokens = batch * step
    tables = {
        name: _read(tokens * row // 2, tokens * row // 2) for name in ("query_cos", "query_sin", "key_cos", "key_sin")
    }
    return {
        "qkv": _read(tokens * (q + 2 * kv), tokens * (q + 2 * kv)),
        **tables,
        "write_indices": _read(tokens * INDEX, batch * INDEX),
        "q": _written(tokens * q),
        "k_cache": _written(tokens * kv),
        "v_cache": _written(tokens * kv),
    }


def attend_traffic(
    shape: AttentionShape, tactic: Tactic, pattern: Pattern, committed: Sequence[int], step: int, real: int
) -> dict[str, Asked]:
    """Every token is real, and a mask is a lower triangle.

    committed: rows of each sequence, the step's own aside.
    """
    block_m, block_n, min_rows = (int(tactic.constants[name] or 0) for name in ("BLOCK_M", "BLOCK_N", "MIN_ROWS"))
    row_bytes, rows = shape.head_dim * real, shape.group * step
    tiles, splits = ceil_div(rows, block_m), split_count(shape.splits, step)
    names = ("q", "k_cache", "v_cache", "write_indices", "partial", "log_sum_exp")
    asked = {name: Asked() for name in names}
    # Heads are alike: one is walked. Its tiles run side by side, a split after the other.
    for length_before, split in product(committed, range(splits)):
        walked, queries = [], 0
        for tile in range(tiles):
            tokens = [row % step for row in range(tile * block_m, min((tile + 1) * block_m, rows))]
            asked["write_indices"].loaded += INDEX
            asked["log_sum_exp"].stored += FLOAT * len(tokens)
            length = length_before + (max(tokens) + 1 if pattern == "causal" else step)
            plain = {"causal": length_before + min(tokens) + 1, "bidirectional": length, "masked": length_before}[
                pattern
            ]
            busy = min(max(length // min_rows, 1), splits)
            share = ceil_div(ceil_div(length, busy), block_n) * block_n
            start, end = split * share, min((split + 1) * share, length)
            if start >= end:
                continue
            walked.append(range(start, end))
            queries += len(tokens)
            sees = [token for token in tokens if pattern == "bidirectional" or start - length_before <= token]
            asked["partial"].stored += len(sees) * row_bytes
            if pattern == "masked":
                first = start + max(min(plain, end) - start, 0) // block_n * block_n
                asked.setdefault("block_mask", Asked()).loaded += len(tokens) * max(end - max(first, length_before), 0)
        loaded, distinct = sum(map(len, walked)), len(set().union(*walked))
        asked["q"].loaded += queries * row_bytes
        asked["k_cache"].loaded += loaded * row_bytes
        asked["v_cache"].loaded += loaded * row_bytes
        if (queries + 2 * distinct) * row_bytes <= CACHED:
            asked["q"].again += queries * row_bytes if split else 0
            asked["k_cache"].again += (loaded - distinct) * row_bytes
            asked["v_cache"].again += (loaded - distinct) * row_bytes
    if pattern == "bidirectional":
        asked["step_lengths"] = Asked(loaded=asked["write_indices"].loaded)
    for tensor in asked.values():
        tensor.loaded *= shape.kv_heads
        tensor.stored *= shape.kv_heads
        tensor.again *= shape.kv_heads
    kv = shape.kv_heads * row_bytes * sum(length + step for length in committed)
    asked["q"].needed = len(committed) * shape.kv_heads * rows * row_bytes
    asked["k_cache"].needed = asked["v_cache"].needed = kv
    for name in ("partial", "log_sum_exp"):
        asked[name].needed = asked[name].stored
    if pattern == "masked":
        asked["block_mask"].needed = len(committed) * step * step
    for name in asked.keys() & {"write_indices", "step_lengths"}:
        asked[name].needed = len(committed) * INDEX
    return asked


def merge_traffic(
    shape: AttentionShape, attended: Mapping[str, Asked], batch: int, step: int, real: int
) -> dict[str, Asked]:
    """attended: what the splits before it moved."""
    partial, log_sum_exp = attended["partial"].stored, attended["log_sum_exp"].stored
    return {
        "partial": _read(partial, partial),
        "log_sum_exp": _read(log_sum_exp, log_sum_exp),
        "attended": _written(batch * step * shape.kv_heads * shape.group * shape.head_dim * real),
    }


def int4_product_traffic(shape: ProductShape, tactic: Tactic, rows: int, real: int) -> dict[str, Asked]:
    block_m, block_n, block_k = (int(tactic.constants[name] or 0) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles, strips = ceil_div(rows, block_m), ceil_div(shape.columns, block_n)
    inner, columns = shape.inner, shape.columns
    x, packed, scales = rows * inner * real, inner * columns // 2, inner // shape.group * columns * real
    asked = {
        "x": _read(x * strips, x),
        "packed": _read(packed * tiles, packed),
        "scale": _read(scales * tiles * (shape.group // block_k), scales),
        "y": _written(rows * columns * real),
    }
    # The rows' tiles run side by side, a strip of columns after the other.
    if (packed + scales) * block_n // columns <= CACHED:
        for name in ("packed", "scale"):
            asked[name].again = asked[name].loaded - asked[name].needed
    if shape.input_scale:
        asked["input_scale"] = _read(tiles * strips * inner * real, inner * real)
    if shape.rank:
        asked["narrow"] = _read(rows * shape.rank * real * strips, rows * shape.rank * real)
        asked["adapter_up"] = _read(tiles * shape.rank * columns * real, shape.rank * columns * real)
    if shape.residual:
        asked["residual"] = _read(rows * columns * real, rows * columns * real)
    return asked


def _read(loaded: int, needed: int) -> Asked:
    return Asked(loaded=loaded, needed=needed)


def _written(stored: int) -> Asked:
    return Asked(stored=stored, needed=stored)
