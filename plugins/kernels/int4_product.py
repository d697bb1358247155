"""y = x W + narrow up + residual. W is int4 in tiles of words, with a scale for each group and column.

A program computes a tile of y transposed: W^T is the tensor cores' first operand, and their second one is x^T. So the
weights go from words to that operand inside the registers, and the tokens are the operand of any width. The integers
themselves are multiplied, exact in every type, and the group's scale multiplies the sum over a unit in fp32.

Integers are converted to floats by their bits: with n + 8 in the low bits of 2^m, the number is 2^m + n + 8, and one
exact addition gives n. GPUs convert integers at a fraction of the rate of these operations.

The order of a sum: units of K in order within each of SPLITS equal parts, then the parts in order, then the adapter,
then the residual. It is the same in every tile size and whether the parts are separate programs or not, so a row's
result depends neither on the number of rows nor on their positions.

A matrix of pairs of columns holds both columns of a pair in the same thread of a tensor core's result,
so that a function of both costs no exchange between threads. The gated activation is such a function.

The parts' handshake: a program stores its sums, then one thread adds 1 to the tile's counter with the semantics
``acq_rel``, after a barrier of the program. The program that finds SPLITS - 1 is the last: it sees all sums, sets the
counter to 0 for the next launch, and adds the sums in order, its own among them.

``narrow`` = scale (x down) is an input: it has only R columns, and to compute it here each program would have to read
all of x and ``down``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.norm_terms import one_over_rms, write_norm_terms
from trimode.plugins.operators import int4_product

_TILE = tl.constexpr(int4_product.TILE_COLUMNS)
SPLIT_ROWS = tl.constexpr(int4_product.SPLIT_ROWS)
_PAIRED = tl.constexpr(int4_product.PAIRED)
# Sums of the largest tile of a step.
_LARGE = tl.constexpr(64 * 128)


def _assembly(power: int, offset: int, subtract: str) -> tl.constexpr:
    """Instructions that unpack two words into eight pairs of 16-bit floats, pair j from both words' nibbles j.

    power: 2^m in both halves of a register. offset: -(2^m + 8), likewise. subtract: adds it to the register ``{0}``.
    """
    lines = [
        "{ .reg .b32 low, high, shifted, offset, one;",
        f"mov.b32 offset, {offset:#010x}; mov.b32 one, 0x3f803f80;",
        "prmt.b32 low, $8, $9, 0x5410; prmt.b32 high, $8, $9, 0x7632;",
    ]
    for j in range(8):
        source = "high" if j >= 4 else "low"
        if j % 4:
            lines.append(f"shr.u32 shifted, {source}, {4 * (j % 4)};")
            source = "shifted"
        lines.append(f"lop3.b32 ${j}, {source}, 0x000f000f, {power:#010x}, 0xea;")
    lines += [subtract.format(f"${j}") for j in range(8)]
    return tl.constexpr("\n".join([*lines, "}"]))


_REGISTERS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))
_FP16 = _assembly(0x64006400, 0xE408E408, "add.rn.f16x2 {0}, {0}, offset;")
_BF16 = _assembly(0x43004300, 0xC308C308, "add.rn.bf16x2 {0}, {0}, offset;")
# Before compute capability 9.0, bf16 has no addition.
_BF16_BY_FMA = _assembly(0x43004300, 0xC308C308, "fma.rn.bf16x2 {0}, {0}, one, offset;")


@triton.jit
def int4_product_kernel(
    x,
    packed,
    scale,
    squares,
    epsilon,
    narrow,
    adapter_up,
    residual,
    next_weight,
    counters,
    rows,
    y,
    weighted,
    next_squares,
    partial,
    counters_out,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    CAPABILITY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """GATED: y is the gated activation of the pairs of columns. STEPS: of a tactic for at most SPLIT_ROWS rows.
    CAPABILITY: compute capability, 90 for 9.0; None in the interpreter.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if squares is not None:
        # Before the sums take the registers.
        norm = one_over_rms(squares, epsilon, row, rows, INNER)
    complete, result = product_sum(
        x, packed, scale, partial, counters_out, row, rows, column,
        INNER, COLUMNS, GROUP, UNIT, SPLITS, BLOCK_M, BLOCK_N, STEPS, CAPABILITY, STAGES,
    )  # fmt: skip
    if complete:
        if squares is not None:
            result *= norm[None, :]
        if GATED:
            gate, up = halves_of(result)
            activated = gate / (1.0 + tl.exp(-gate)) * up
            pair = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            exists = (pair < COLUMNS // 2)[:, None] & (row < rows)[None, :]
            in_y = row[None, :].to(tl.int64) * (COLUMNS // 2) + pair[:, None]
            tl.store(y + in_y, activated.to(y.dtype.element_ty), mask=exists)
        else:
            if narrow is not None:
                result = _adapter(result, narrow, adapter_up, row, rows, column, COLUMNS, RANK)
            here = (column < COLUMNS)[:, None] & (row < rows)[None, :]
            at = row[None, :].to(tl.int64) * COLUMNS + column[:, None]
            if residual is not None:
                result += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
            rounded = result.to(y.dtype.element_ty)
            tl.store(y + at, rounded, mask=here)
            if next_weight is not None:
                stream = rounded.to(tl.float32)
                write_norm_terms(stream, next_weight, weighted, next_squares, column, row, rows, COLUMNS)


@triton.jit
def product_sum(
    x,
    packed,
    scale,
    partial,
    counters,
    row,
    rows,
    column,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    CAPABILITY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Whether this program has the sum over all of K of its tile, and that sum, [columns, rows]."""
    part = tl.program_id(2)
    first, end, complete = 0, SPLITS, True
    # Whether the parts of the sums are separate programs: known for steps, whose programs then hold no sum of several
    # parts in registers while they sum one.
    SEPARABLE: tl.constexpr = SPLITS > 1 and partial is not None
    ONE_PART: tl.constexpr = SEPARABLE and STEPS
    separate = ONE_PART
    if SEPARABLE and not ONE_PART:
        separate = rows <= SPLIT_ROWS
        if separate:
            first, end = part, part + 1
        else:
            complete = part == 0
            end = SPLITS * complete.to(tl.int32)

    if SPLITS == 1 or ONE_PART:
        result = _part(
            x, packed, scale, row, rows, column, part if ONE_PART else 0,
            INNER, COLUMNS, GROUP, UNIT, SPLITS, BLOCK_M, BLOCK_N, CAPABILITY, STAGES,
        )  # fmt: skip
    else:
        result = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for index in tl.range(first, end):
            result += _part(
                x, packed, scale, row, rows, column, index,
                INNER, COLUMNS, GROUP, UNIT, SPLITS, BLOCK_M, BLOCK_N, CAPABILITY, STAGES,
            )  # fmt: skip
    if SEPARABLE:
        here = (column < COLUMNS)[:, None] & (row < rows)[None, :]
        sums = partial + row[None, :] * COLUMNS + column[:, None]
        if separate:
            complete, result = combined(result, part, sums, here, counters, COLUMNS, SPLITS)
    return complete, result


@triton.jit
def halves_of(result):
    """The first and the second columns of the pairs, each [columns / 2, rows]."""
    BLOCKS: tl.constexpr = result.shape[0] // (2 * _PAIRED)
    blocks = tl.reshape(result, [BLOCKS, 2, _PAIRED, result.shape[1]])
    first, second = tl.split(tl.permute(blocks, (0, 2, 3, 1)))
    return (
        tl.reshape(first, [BLOCKS * _PAIRED, result.shape[1]]),
        tl.reshape(second, [BLOCKS * _PAIRED, result.shape[1]]),
    )


@triton.jit
def _part(
    x,
    packed,
    scale,
    row,
    rows,
    column,
    part,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPABILITY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sum over one part of K, [columns, rows]."""
    WORDS: tl.constexpr = UNIT // 8
    UNITS: tl.constexpr = INNER // UNIT // SPLITS
    exists, inside = (row < rows)[None, :], column < COLUMNS
    inner = tl.arange(0, UNIT)
    in_x = x + row[None, :].to(tl.int64) * INNER + inner[:, None]
    # A run of BLOCK_N * WORDS words for each unit. Tiles have at most 2^31 words together.
    in_tile = (column % _TILE)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    in_packed = packed + (tl.program_id(1) * BLOCK_N // _TILE * (INNER // 8 * _TILE)).to(tl.int64) + in_tile
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in tl.range(part * UNITS, (part + 1) * UNITS, num_stages=STAGES):
        words = tl.load(in_packed + unit * (_TILE * WORDS))
        weights = _unpack(words, x.dtype.element_ty, CAPABILITY)
        tokens = tl.load(in_x + unit * UNIT, mask=exists, other=0.0)
        in_scale = scale + unit * UNIT // GROUP * COLUMNS + column
        factors = tl.load(in_scale) if COLUMNS % BLOCK_N == 0 else tl.load(in_scale, mask=inside, other=0.0)
        total += tl.dot(weights, tokens, input_precision="ieee") * factors[:, None]
    return total


@triton.jit
def combined(result, part, sums, here, counters, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    """Whether this program is the last of its tile, and then the sum over all parts. sums: where the first part's is
    left.
    """
    tl.store(sums + part * (SPLIT_ROWS * COLUMNS), result, mask=here)
    counter = counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.debug_barrier()
    complete = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
    if complete:
        tl.store(counter, 0)
        result = tl.zeros(result.shape, tl.float32)
        # All parts are loaded at once, or one by one where a part takes most registers.
        AT_ONCE: tl.constexpr = 1 if result.shape[0] * result.shape[1] >= _LARGE else SPLITS
        for index in tl.range(0, SPLITS, num_stages=1, loop_unroll_factor=AT_ONCE):
            # From the L2 cache: other multiprocessors have written them.
            at = sums + index * (SPLIT_ROWS * COLUMNS)
            result += tl.load(at, mask=here, other=0.0, cache_modifier=".cg")
    return complete, result


@triton.jit
def _unpack(words, dtype: tl.constexpr, CAPABILITY: tl.constexpr):
    """Weights [columns, 8 * words]: nibble j of word w is row ``words * j + w``."""
    if CAPABILITY is None or dtype == tl.float32:
        a, b, c, d = (
            _nibble(words, 0, dtype),
            _nibble(words, 1, dtype),
            _nibble(words, 2, dtype),
            _nibble(words, 3, dtype),
        )
        e, f, g, h = (
            _nibble(words, 4, dtype),
            _nibble(words, 5, dtype),
            _nibble(words, 6, dtype),
            _nibble(words, 7, dtype),
        )
    elif dtype == tl.float16:
        a, b, c, d, e, f, g, h = _nibbles_fp16(words)
    elif CAPABILITY >= 90:
        a, b, c, d, e, f, g, h = _nibbles_bf16(words, _BF16)
    else:
        a, b, c, d, e, f, g, h = _nibbles_bf16(words, _BF16_BY_FMA)
    joined = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    # [columns, words, j // 4, j // 2 % 2, j % 2] to [columns, j, words]
    return tl.reshape(tl.permute(joined, (0, 4, 3, 2, 1)), [words.shape[0], 8 * words.shape[1]])


@triton.jit
def _nibble(words, j: tl.constexpr, dtype: tl.constexpr):
    return (((words >> (4 * j)) & 15) - 8).to(tl.float32).to(dtype)


@triton.jit
def _nibbles_bf16(words, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        _REGISTERS,
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _nibbles_fp16(words):
    return tl.inline_asm_elementwise(
        _FP16,
        _REGISTERS,
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _adapter(
    result, narrow, adapter_up, row, rows, column, COLUMNS: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """result + narrow up, [columns, rows]."""
    BLOCK: tl.constexpr = 16
    inner = tl.arange(0, BLOCK)
    for first in tl.range(0, RANK, BLOCK):
        at = first + inner
        in_up, in_narrow = (
            (column < COLUMNS)[:, None] & (at < RANK)[None, :],
            (at < RANK)[:, None] & (row < rows)[None, :],
        )
        up = tl.load(adapter_up + at[None, :] * COLUMNS + column[:, None], mask=in_up, other=0.0)
        tokens = tl.load(narrow + row[None, :] * RANK + at[:, None], mask=in_narrow, other=0.0)
        result = tl.dot(up, tokens, result, input_precision="ieee")
    return result
