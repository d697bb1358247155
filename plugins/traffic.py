"""Bytes that each kernel moves, counted tile by tile, and the lower bound: bytes that any kernel would have to move.

The counts of loads and stores are exact: tests compare them with the interpreter's. A repeated load of a byte comes
from the L2 cache if the whole tensor, or the part that neighbouring programs share, has at most :data:`CACHED` bytes.
Every other load comes from memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from trimode.plugins.operators import (
    Attend,
    DenseProduct,
    Embed,
    Head,
    Int4Head,
    Int4Product,
    KvWrite,
    MergeCandidates,
    MergeSplits,
    Node,
    Operator,
    Pattern,
    QkvProduct,
    RmsNorm,
    Rotations,
    SelectRows,
    Tactic,
)
from trimode.plugins.operators.attention import KV_TILE, split_count
from trimode.plugins.operators.candidates import TILE
from trimode.plugins.operators.norm_terms import norm_tiles
from trimode.plugins.operators.operator import ceil_div, row_count

# A third of the smallest L2 of the GPUs that kernels are compiled for (GeForce RTX 3090, 6 MB).
CACHED = 2 << 20
INDEX_BYTES, WORD_BYTES, FLOAT_BYTES = 8, 4, 4


@dataclass
class TensorTraffic:
    """Bytes that a kernel loads from and stores to one tensor, every access counted.

    needed: distinct bytes. reloaded: loaded bytes that a neighbouring program has loaded before.
    """

    loaded: int = 0
    stored: int = 0
    needed: int = 0
    reloaded: int = 0

    @property
    def moved(self) -> int:
        """Bytes through memory."""
        return self.needed if self.needed <= CACHED else self.loaded - self.reloaded + self.stored


# A kernel's traffic by the names of its tensors.
KernelTraffic = dict[str, TensorTraffic]


def moved_bytes(traffic: Mapping[str, TensorTraffic]) -> int:
    """Bytes through memory."""
    return sum(tensor.moved for tensor in traffic.values())


def needed_bytes(traffic: Mapping[str, TensorTraffic]) -> int:
    """The lower bound: every needed byte once."""
    return sum(tensor.needed for tensor in traffic.values())


def cache_bytes(traffic: Mapping[str, TensorTraffic]) -> int:
    """Bytes between the L2 cache and the multiprocessors."""
    return sum(tensor.loaded + tensor.stored for tensor in traffic.values())


def launch_traffic(
    operator: Operator, node: Node, tactic: Tactic, pattern: Pattern, committed: Sequence[int], real: int
) -> KernelTraffic:
    """Of any launch of an engine. pattern: of its attention. committed: rows of each sequence before the step. real:
    bytes of an activation.
    """
    if isinstance(operator, KvWrite):
        return kv_write_traffic(node, real)
    if isinstance(operator, QkvProduct):
        return qkv_product_traffic(operator, node, tactic, real)
    if isinstance(operator, Int4Product) and not isinstance(operator, Head):
        return int4_product_traffic(operator, node, tactic, real)
    if isinstance(operator, Attend):
        return attend_traffic(operator, node, tactic, committed, real)
    if isinstance(operator, MergeSplits):
        return merge_traffic(node, pattern, committed, real)
    return operator_traffic(operator, node, tactic, real)


def kv_write_traffic(node: Node, real: int) -> KernelTraffic:
    """All rows are inside the pool. real: bytes of an activation."""
    (batch, step, width), (_, kv_heads, _, head_dim) = node.shapes["qkv"], node.shapes["k_cache"]
    kv, tokens = kv_heads * head_dim * real, batch * step
    rotation = tokens * head_dim // 2 * real
    return {
        "qkv": _read(tokens * width * real, tokens * width * real),
        **{name: _read(rotation, rotation) for name in ("query_cos", "query_sin", "key_cos", "key_sin")},
        "write_indices": _read(tokens * INDEX_BYTES, batch * INDEX_BYTES),
        "q": _written(tokens * (width * real - 2 * kv)),
        "k_cache": _written(tokens * kv),
        "v_cache": _written(tokens * kv),
    }


def attend_traffic(operator: Attend, node: Node, tactic: Tactic, committed: Sequence[int], real: int) -> KernelTraffic:
    """For steps without padding, whose mask, if any, is a lower triangle.

    committed: rows of each sequence before the step. real: bytes of an activation.
    """
    block_m, block_n = tactic.constants["BLOCK_M"], tactic.constants["BLOCK_N"]
    (_, heads, step, head_dim), kv_heads = node.shapes["q"], node.shapes["k_cache"][1]
    row_bytes, rows = head_dim * real, heads // kv_heads * step
    tiles, splits = ceil_div(rows, block_m), split_count(node.attributes["splits"], step)
    names = ("q", "k_cache", "v_cache", "write_indices", "partial", "log_sum_exp")
    traffic = {name: TensorTraffic() for name in names}
    # All heads move the same bytes, so count one. Its tiles run at the same time, one split after the other.
    for length_before, split in product(committed, range(splits)):
        walked, queries = [], 0
        for tile in range(tiles):
            tokens = [row % step for row in range(tile * block_m, min((tile + 1) * block_m, rows))]
            traffic["write_indices"].loaded += INDEX_BYTES
            length = length_before + (max(tokens) + 1 if operator.pattern == "causal" else step)
            traffic["log_sum_exp"].stored += FLOAT_BYTES * len(tokens)
            own = split_rows(length, split, splits, block_n)
            if not own:
                continue
            walked.append(own)
            queries += len(tokens)
            if operator.pattern == "masked":
                mask = traffic.setdefault("block_mask", TensorTraffic())
                mask.loaded += len(tokens) * sum(row >= length_before for row in own)
        loaded, distinct = sum(map(len, walked)), len(set().union(*walked))
        traffic["q"].loaded += queries * row_bytes
        traffic["k_cache"].loaded += loaded * row_bytes
        traffic["v_cache"].loaded += loaded * row_bytes
        if (queries + 2 * distinct) * row_bytes <= CACHED:
            traffic["q"].reloaded += queries * row_bytes if split else 0
            traffic["k_cache"].reloaded += (loaded - distinct) * row_bytes
            traffic["v_cache"].reloaded += (loaded - distinct) * row_bytes
    if operator.pattern == "bidirectional":
        traffic["step_lengths"] = TensorTraffic(loaded=traffic["write_indices"].loaded)
    for tensor in traffic.values():
        tensor.loaded *= kv_heads
        tensor.stored *= kv_heads
        tensor.reloaded *= kv_heads
    traffic["partial"].stored = heads * split_results(operator.pattern, step, splits, committed) * row_bytes
    kv = kv_heads * row_bytes * sum(length + step for length in committed)
    traffic["q"].needed = len(committed) * kv_heads * rows * row_bytes
    traffic["k_cache"].needed = traffic["v_cache"].needed = kv
    for name in ("partial", "log_sum_exp"):
        traffic[name].needed = traffic[name].stored
    if operator.pattern == "masked":
        traffic["block_mask"].needed = len(committed) * step * step
    for name in traffic.keys() & {"write_indices", "step_lengths"}:
        traffic[name].needed = len(committed) * INDEX_BYTES
    return traffic


def split_rows(length: int, split: int, splits: int, block_n: int) -> list[int]:
    """The KV rows of a split, in order: those of every ``splits``-th tile."""
    tiles = range(split, ceil_div(length, block_n), splits)
    return [row for tile in tiles for row in range(tile * block_n, min((tile + 1) * block_n, length))]


def split_results(pattern: Pattern, step: int, splits: int, committed: Sequence[int]) -> int:
    """The results of a query head over splits with a row that their token attends to. A mask is a lower triangle."""
    return sum(
        min(splits, ceil_div(length + (step if pattern == "bidirectional" else token + 1), KV_TILE))
        for length, token in product(committed, range(step))
    )


def merge_traffic(node: Node, pattern: Pattern, committed: Sequence[int], real: int) -> KernelTraffic:
    """Of the splits of an attention with this pattern. committed, real: as :func:`attend_traffic`'s."""
    batch, splits, heads, step, head_dim = node.shapes["partial"]
    partial = heads * split_results(pattern, step, splits, committed) * head_dim * real
    log_sum_exp = math.prod(node.shapes["log_sum_exp"]) * FLOAT_BYTES
    scale = heads * head_dim * FLOAT_BYTES if "output_scale" in node.shapes else 0
    return {
        "partial": _read(partial, partial),
        "log_sum_exp": _read(log_sum_exp, log_sum_exp),
        **({"output_scale": _read(batch * step * scale, scale)} if scale else {}),
        "attended": _written(batch * step * heads * head_dim * real),
    }


def int4_product_traffic(operator: Int4Product, node: Node, tactic: Tactic, real: int) -> KernelTraffic:
    """real: bytes of an activation."""
    block_n = tactic.constants["BLOCK_N"]
    constants, rows = operator.constants(node), operator.rows(node)
    inner, columns, unit = (constants[name] for name in ("INNER", "COLUMNS", "UNIT"))
    tiles, strips, parts = operator.grid(node, tactic)
    x, packed, scales = rows * inner * real, inner * strips * block_n // 2, inner // unit * columns * FLOAT_BYTES
    traffic = {
        "x": _read(x * strips, x),
        "packed": _read(packed * tiles, packed),
        "scale": _read(scales * tiles, scales * unit // constants["GROUP"]),
        "y": _written(rows * columns * real // (2 if operator.gated else 1)),
    }
    # Tiles of rows run at the same time, one strip of columns after the other.
    if (packed + scales) * block_n // columns <= CACHED:
        for name in ("packed", "scale"):
            traffic[name].reloaded = traffic[name].loaded - traffic[name].needed
    traffic |= _separate_parts(tiles, strips, parts, rows * columns)
    if "squares" in node.shapes:
        squares = math.prod(node.shapes["squares"]) * FLOAT_BYTES
        programs = parts * strips
        traffic["squares"] = _read(squares * programs, squares)
        traffic["epsilon"] = _read(tiles * programs * FLOAT_BYTES, FLOAT_BYTES)
    if "next_weight" in node.shapes:
        traffic["next_weight"] = _read(tiles * columns * real, columns * real)
        traffic["weighted"] = _written(rows * columns * real)
        traffic["next_squares"] = _written(norm_tiles(columns) * rows * FLOAT_BYTES)
    if "narrow" in node.shapes:
        rank = node.shapes["narrow"][1]
        traffic["narrow"] = _read(rows * rank * real * strips, rows * rank * real)
        traffic["adapter_up"] = _read(tiles * rank * columns * real, rank * columns * real)
    if "residual" in node.shapes:
        traffic["residual"] = _read(rows * columns * real, rows * columns * real)
    return traffic


def qkv_product_traffic(operator: QkvProduct, node: Node, tactic: Tactic, real: int) -> KernelTraffic:
    """All rows are inside the pool. real: bytes of an activation."""
    traffic = int4_product_traffic(operator, node, tactic, real)
    del traffic["y"]
    constants, rows = operator.constants(node), operator.rows(node)
    heads, kv_heads, head_dim = (constants[name] for name in ("HEADS", "KV_HEADS", "HEAD_DIM"))
    rotation, kv = rows * head_dim // 2 * real, rows * kv_heads * head_dim * real
    strips = ceil_div(constants["COLUMNS"], tactic.constants["BLOCK_N"])
    return traffic | {
        **{name: _read(rotation * heads, rotation) for name in ("query_cos", "query_sin")},
        **{name: _read(rotation * kv_heads, rotation) for name in ("key_cos", "key_sin")},
        "write_indices": _read(rows * strips * INDEX_BYTES, node.shapes["x"][0] * INDEX_BYTES),
        "q": _written(rows * heads * head_dim * real),
        "k_cache": _written(kv),
        "v_cache": _written(kv),
    }


def dense_product_traffic(operator: DenseProduct, node: Node, tactic: Tactic, real: int) -> KernelTraffic:
    """real: bytes of an activation."""
    columns, rows = node.shapes["weight"][1], row_count(node.shapes["x"])
    tiles, strips, parts = operator.grid(node, tactic)
    y = rows * columns * real
    traffic = {**_dense_operands(node, tactic, real), "y": _written(y)}
    traffic |= _separate_parts(tiles, strips, parts, rows * columns)
    if "row_scale" in node.shapes:
        traffic["row_scale"] = _read(rows * strips * real, node.shapes["x"][0] * real)
    if "narrow" in node.shapes:
        rank = node.shapes["adapter_up"][0]
        traffic["narrow"] = _read(rows * rank * real * strips, rows * rank * real)
        traffic["adapter_up"] = _read(tiles * rank * columns * real, rank * columns * real)
    if "residual" in node.shapes:
        traffic["residual"] = _read(y, y)
    return traffic


def _separate_parts(tiles: int, strips: int, parts: int, elements: int) -> KernelTraffic:
    """Of a product of so many elements whose parts of K are separate programs; nothing for one part."""
    if parts == 1:
        return {}
    # The last program of a tile reads the parts just after they were written.
    moved = parts * elements * FLOAT_BYTES
    partial = TensorTraffic(loaded=moved, stored=moved, needed=moved, reloaded=moved)
    return {"partial": partial, "counters": _written(tiles * strips * FLOAT_BYTES)}


def _dense_operands(node: Node, tactic: Tactic, real: int) -> KernelTraffic:
    """Of x W."""
    block_m, block_n = tactic.constants["BLOCK_M"], tactic.constants["BLOCK_N"]
    (inner, columns), rows = node.shapes["weight"], row_count(node.shapes["x"])
    x, weight, tiles = rows * inner * real, inner * columns * real, ceil_div(rows, block_m)
    traffic = {"x": _read(x * ceil_div(columns, block_n), x), "weight": _read(weight * tiles, weight)}
    # Tiles of rows run at the same time, one strip of columns after the other.
    if weight * block_n // columns <= CACHED:
        traffic["weight"].reloaded = weight * (tiles - 1)
    return traffic


def head_traffic(operator: Head, node: Node, tactic: Tactic, real: int) -> KernelTraffic:
    """The asked ids of a row differ. real: bytes of an activation."""
    if isinstance(operator, Int4Head):
        traffic = int4_product_traffic(operator, node, tactic, real)
        del traffic["y"]
    else:
        traffic = _dense_operands(node, tactic, real)
    columns, asked = operator.constants(node)["COLUMNS"], math.prod(node.shapes["asked_ids"]) * INDEX_BYTES
    strips, rows = operator.grid(node, tactic)[1], row_count(node.shapes["x"])
    if asked:
        traffic["asked_ids"] = _read(asked * strips, asked)
    if operator.masked:
        # Every logit's thread loads its word.
        words = math.prod(node.shapes["token_mask"]) * WORD_BYTES
        traffic["token_mask"] = TensorTraffic(loaded=rows * columns * WORD_BYTES, needed=words)
        traffic["token_mask"].reloaded = traffic["token_mask"].loaded - words
    written = zip(operator.outputs, operator.output_shapes(node), strict=True)
    return traffic | {o.name: _written(math.prod(shape) * FLOAT_BYTES) for o, shape in written if all(shape)}


def operator_traffic(operator: Operator, node: Node, tactic: Tactic, real: int) -> KernelTraffic:
    """Of every operator but attention, KV write and int4 products.

    All tokens of an embedding differ, as do the selected rows of a sequence and the tiles of a row's candidates; all
    positions are in the original context. real: bytes of an activation.
    """
    if isinstance(operator, DenseProduct):
        return dense_product_traffic(operator, node, tactic, real)
    if isinstance(operator, Head):
        return head_traffic(operator, node, tactic, real)
    sizes = {"real": real, "fp32": FLOAT_BYTES, "int64": INDEX_BYTES, "int32": WORD_BYTES}
    columns, rows, _ = operator.grid(node, tactic)
    programs = columns * rows
    shapes = {**node.shapes, **dict(zip((o.name for o in operator.outputs), operator.output_shapes(node), strict=True))}
    size = {o.name: math.prod(shapes[o.name]) * sizes[o.type] for o in (*operator.inputs, *operator.outputs)}
    traffic = {o.name: _written(size[o.name]) for o in operator.outputs}
    # Every tensor that is not named here is read once.
    read = {o.name: (size[o.name], size[o.name]) for o in operator.inputs}
    if isinstance(operator, Embed):
        read["input_ids"] = (programs * INDEX_BYTES, size["input_ids"])
        read["table"] = (size["embedded"], size["embedded"])
        if operator.for_norm:
            read["next_weight"] = (math.prod(shapes["input_ids"]) * size["next_weight"], size["next_weight"])
    elif isinstance(operator, SelectRows):
        read["logit_rows"] = (programs * INDEX_BYTES, size["logit_rows"])
        read["x"] = (size["selected"], size["selected"])
    elif isinstance(operator, Rotations):
        read["frequencies"] = (programs * size["frequencies"], size["frequencies"])
        read["key_scale"] = read["query_scales"] = (programs * FLOAT_BYTES, FLOAT_BYTES)
    elif isinstance(operator, RmsNorm):
        read["weight"] = (programs * size["weight"], size["weight"])
        read["epsilon"] = (programs * FLOAT_BYTES, FLOAT_BYTES)
    elif isinstance(operator, MergeCandidates):
        listed = math.prod(shapes["top_logits"]) * TILE * FLOAT_BYTES if size["logits"] else 0
        read["logits"] = (listed, listed)
    return {**{name: _read(*bytes_) for name, bytes_ in read.items() if any(bytes_)}, **traffic}


def _read(loaded: int, needed: int) -> TensorTraffic:
    return TensorTraffic(loaded=loaded, needed=needed)


def _written(stored: int) -> TensorTraffic:
    return TensorTraffic(stored=stored, needed=stored)
