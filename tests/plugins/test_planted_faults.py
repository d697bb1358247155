"""The kernel tests detect faults: each one, planted in a kernel's source or in its inputs, exceeds the tolerance."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts.gpu.kernel_checks import distance
from tests.plugins import test_attention, test_int4_product, test_qkv_product
from tests.support.kernel_cases import HEAD_MASK_TOKEN, AttentionCase, ProductCase, operator_inputs
from tests.support.kernel_functions import (
    TOLERANCES,
    attend,
    int4_product,
    kv_write,
    reference_of,
    run,
)
from trimode.common.errors import TriModeError
from trimode.plugins.kernels import attention as attention_kernels
from trimode.plugins.kernels import int4_product as product_kernels
from trimode.plugins.kernels import kv_write as write_kernels
from trimode.plugins.kernels import norm_terms as norm_kernels
from trimode.plugins.kernels import qkv_product as qkv_kernels
from trimode.plugins.operators import OPERATORS, KvWrite, Pattern
from trimode.plugins.operators.candidates import TILE
from trimode.plugins.reference import attention
from trimode.plugins.reference import int4_product as product
from trimode.plugins.reference import kv_write as write
from trimode.plugins.reference.head_product import tiles_of_logits

TOLERANCE = TOLERANCES[torch.float32]
CACHES = ("k_cache", "v_cache")


def attention_distance(pattern: Pattern, stale: int = 0) -> float:
    """stale: rows by which the kernel's lengths lag behind the right ones."""
    case = AttentionCase((316, 9), 6, pattern, group=4, kv_heads=2, scaled=True, seed=3)
    inputs = {name: tensor.nan_to_num() for name, tensor in case.inputs().items()}
    if pattern == "bidirectional":
        inputs["step_lengths"][:] = torch.tensor([4, 5])
    found, *_ = attend(**{**inputs, "write_indices": inputs["write_indices"] - stale})
    return distance(found, attention.attend(**inputs))


# One program for a tile, and two with a part of K each.
PRODUCTS = {
    split: ProductCase(4, 16 if split else 3, 70, split=split, rank=24, residual=True) for split in (False, True)
}


def gated_distance() -> float:
    case = ProductCase(4, 3, 144, gated=True, normed=True)
    inputs = case.inputs()
    found, _ = int4_product(**inputs, tactic=case.tactic, gated=True)
    return distance(found, product.int4_product(**inputs, gated=True))


def product_distance(split: bool, without: tuple[str, ...] = ()) -> float:
    """without: inputs that the kernel does not get."""
    case = PRODUCTS[split]
    inputs = case.inputs()
    given = {name: tensor for name, tensor in inputs.items() if name not in without}
    found, _ = int4_product(**given, tactic=case.tactic)
    inputs.pop("counters", None)
    return distance(found, product.int4_product(**inputs))


def write_distance(shift: int = 0) -> float:
    """Of the queries and of the whole pool. shift: rows by which the kernel's first row is wrong."""
    random = torch.Generator().manual_seed(0)
    node = KvWrite.node(batch=2, step=5, capacity=17, kv_heads=2, group=4, head_dim=64)
    inputs = {name: torch.randn(*shape, generator=random) for name, shape in node.shapes.items()}
    inputs["write_indices"] = torch.tensor([4, 9])
    wanted = {**inputs, **{name: inputs[name].clone() for name in CACHES}}
    q, _ = kv_write(**{**inputs, "write_indices": inputs["write_indices"] + shift})
    expected = write.kv_write(**wanted)
    return max(distance(q, expected), *(distance(inputs[name], wanted[name]) for name in CACHES))


@pytest.fixture
def mutant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace ``right``, which must occur ``times`` times in a module's source, by ``wrong``, and use that kernel."""

    def plant(module: ModuleType, kernel: str, right: str, wrong: str, times: int = 1) -> None:
        source = Path(str(module.__file__)).read_text()
        assert source.count(right) == times, f"{right!r} is in {module.__file__} {source.count(right)} times"
        path = tmp_path / "mutant.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location("mutant", path)
        assert spec is not None
        assert spec.loader is not None
        mutated = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mutant", mutated)
        spec.loader.exec_module(mutated)
        monkeypatch.setattr(module, kernel, getattr(mutated, kernel))

    return plant


def test_without_a_fault_all_are_within_the_tolerance() -> None:
    for pattern in ("causal", "bidirectional", "masked"):
        assert attention_distance(pattern) < TOLERANCE
    assert max(product_distance(False), product_distance(True), gated_distance(), write_distance()) < TOLERANCE


ATTENTION_FAULTS: dict[str, tuple[Pattern, str, str]] = {
    "a causal mask one further": ("causal", "<= token[:, None]", "<= token[:, None] + 1"),
    "a causal mask one short": ("causal", "<= token[:, None]", "< token[:, None]"),
    "a causal length one short": ("causal", "0) + 1\n        plain", "0)\n        plain"),
    "a stale length": (
        "causal",
        "committed = tl.load(write_indices + batch).to(tl.int32)",
        "committed = tl.load(write_indices + batch).to(tl.int32) - 1",
    ),
    "another sequence's length": ("masked", "write_indices + batch", "write_indices + 1 - batch"),
    "unmasked rows one further": ("causal", "step), 0) + 1", "step), 0) + 20"),
    "a block one longer": (
        "bidirectional",
        "step_lengths + batch).to(tl.int32)",
        "step_lengths + batch).to(tl.int32) + 1",
    ),
    "a block one shorter": (
        "bidirectional",
        "step_lengths + batch).to(tl.int32)",
        "step_lengths + batch).to(tl.int32) - 1",
    ),
    "a mask one column off": ("masked", "+ other[None, :]), mask", "+ (other[None, :] + 1) % step), mask"),
    "a mask one row off": ("masked", "exists, token * step", "exists, (token + 1) % step * step"),
    "another sequence's mask": ("masked", "block_mask + batch * step * step", "block_mask + (1 - batch) * step * step"),
    "the committed rows by the mask": ("masked", "| ((other < 0)", "| ((other < -1)"),
    "a word's bits in another order": ("masked", ">> in_tile[None, :]", ">> (in_tile ^ 1)[None, :]"),
    "the wrong group": (
        "causal",
        "(batch * KV_HEADS + head) * capacity",
        "(batch * KV_HEADS + (head + 1) % KV_HEADS) * capacity",
    ),
    "the wrong token of a group": ("causal", "row >= member * step", "row > member * step"),
    "the wrong sequence's rows": (
        "causal",
        "(batch * KV_HEADS + head) * capacity",
        "((1 - batch) * KV_HEADS + head) * capacity",
    ),
    "a split left out": ("causal", "split >= tiles:", "(split >= tiles) | (split == 1):"),
    "splits that overlap": ("causal", "tl.range(split, whole, splits)", "tl.range(split, whole, splits - 1)"),
    "a tile with masks left out": ("masked", "first = split + tl.cdiv(", "first = split + splits + tl.cdiv("),
    "a sum that is not rescaled": ("causal", "tl.fma(total, fade, ", "tl.fma(total, 1.0, "),
    "splits of equal weight": ("causal", "parts * weight[:, :, None]", "parts * saw.to(tl.float32)[:, :, None]"),
    "another head's scale": (
        "causal",
        "output_scale + in_token, mask=inside",
        "output_scale + (in_token + HEAD_DIM) % (KV_HEADS * GROUP * HEAD_DIM), mask=inside",
    ),
    "another channel's scale": (
        "causal",
        "output_scale + in_token, mask=inside",
        "output_scale + (in_token ^ 1), mask=inside",
    ),
    "the scale of the first KV head": (
        "causal",
        "output_scale + in_token, mask=inside",
        "output_scale + in_token % (GROUP * HEAD_DIM), mask=inside",
    ),
    "no scale": ("causal", "if output_scale is not None:", "if GROUP < 0:"),
    "another token's splits": ("causal", "* step + token\n", "* step + (token + 1) % step\n"),
    "another head's splits": ("causal", "head[None, :]) * step", "(head ^ 1)[None, :]) * step"),
    "another token's result": ("causal", "(batch * step + token) * (KV", "(batch * step + (token + 1) % step) * (KV"),
}


def test_a_tile_whose_rounding_remains_is_detected(mutant: Callable[..., None]) -> None:
    right = "fade = tl.exp2((best - finite) * LOG2_E)"
    mutant(attention_kernels, "attend_kernel", right, "fade = tl.exp2(tl.fma(best, LOG2_E, finite * -LOG2_E))")
    with pytest.raises(AssertionError):
        test_attention.test_a_tile_that_a_token_does_not_see_changes_no_bit()


@pytest.mark.parametrize("name", ATTENTION_FAULTS)
def test_a_fault_in_attention_is_detected(name: str, mutant: Callable[..., None]) -> None:
    pattern, right, wrong = ATTENTION_FAULTS[name]
    source = Path(str(attention_kernels.__file__)).read_text()
    kernel = "merge_kernel" if source.index(right) > source.index("def merge_kernel") else "attend_kernel"
    mutant(attention_kernels, kernel, right, wrong)
    assert not attention_distance(pattern) < 10 * TOLERANCE


PRODUCT_FAULTS: dict[str, tuple[str, str]] = {
    "another group's scales": ("unit * UNIT // GROUP", "(unit + 1) % (INNER // UNIT) * UNIT // GROUP"),
    "two nibbles swapped": ("tl.join(a, b)", "tl.join(b, a)"),
    "another order of nibbles": ("(0, 4, 3, 2, 1)", "(0, 4, 2, 3, 1)"),
    "nibbles before words": ("(0, 4, 3, 2, 1)", "(0, 1, 4, 3, 2)"),
    "an offset one off": ("& 15) - 8)", "& 15) - 7)"),
    "another tile's columns": ("(column % _TILE)[:, None]", "((column + 1) % _TILE)[:, None]"),
    "the adapter left out": ("if narrow is not None:", "if RANK < 0:"),
    "the adapter's last columns left out": ("tl.range(0, RANK, BLOCK)", "tl.range(0, RANK - BLOCK, BLOCK)"),
    "the residual left out": ("if residual is not None:", "if RANK < 0:"),
    "the wrong rows of the residual": ("residual + at", "residual + (at + COLUMNS) % (rows * COLUMNS)"),
}
SPLIT_FAULTS: dict[str, tuple[str, str]] = {
    "a part not added": ("tl.range(0, SPLITS,", "tl.range(0, SPLITS - 1,"),
    "one part added twice": ("sums + index *", "sums + 0 * index *"),
    "the same part in every program": ("tl.range(part * UNITS, (part + 1) * UNITS", "tl.range(0 * part, UNITS"),
    "the parts left in one place": ("tl.store(sums + part *", "tl.store(sums + 0 * part *"),
    "no part is the last": ("== SPLITS - 1", "== SPLITS"),
}


@pytest.mark.parametrize(
    ("split", "name"),
    [*((split, name) for split in PRODUCTS for name in PRODUCT_FAULTS), *((True, name) for name in SPLIT_FAULTS)],
)
def test_a_fault_in_the_product_is_detected(split: bool, name: str, mutant: Callable[..., None]) -> None:
    mutant(product_kernels, "int4_product_kernel", *(PRODUCT_FAULTS | SPLIT_FAULTS)[name])
    assert not product_distance(split) < 10 * TOLERANCE


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("result *= norm[None, :]", "result *= 1.0"),
        ("gate, up = halves_of", "up, gate = halves_of"),
        ("gate / (1.0 + tl.exp(-gate)) * up", "gate * up"),
        ("[BLOCKS, 2, _PAIRED, result.shape[1]]", "[BLOCKS * _PAIRED // 4, 2, 4, result.shape[1]]"),
    ],
    ids=["no norm", "gate and up exchanged", "no sigmoid", "blocks of another size"],
)
def test_a_fault_in_the_gated_activation_is_detected(right: str, wrong: str, mutant: Callable[..., None]) -> None:
    mutant(product_kernels, "int4_product_kernel", right, wrong)
    assert not gated_distance() < 10 * TOLERANCE


def test_a_counter_that_is_not_reset_is_detected(mutant: Callable[..., None]) -> None:
    mutant(product_kernels, "int4_product_kernel", "        tl.store(counter, 0)\n", "")
    with pytest.raises(AssertionError):
        test_int4_product.test_the_counters_are_zero_after_each_launch()


def test_parts_that_are_not_awaited_are_detected(mutant: Callable[..., None]) -> None:
    mutant(product_kernels, "int4_product_kernel", "== SPLITS - 1", "== 0")
    with pytest.raises(AssertionError):
        test_int4_product.test_only_the_last_program_of_a_tile_writes_it(0)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sums + index *", "sums + (SPLITS - 1 - index) *"),
        ("tl.range(first, end)", "tl.range(end - 1, first - 1, -1)"),
    ],
    ids=["of separate programs", "of one program"],
)
def test_a_wrong_order_of_parts_is_detected(right: str, wrong: str, mutant: Callable[..., None]) -> None:
    mutant(product_kernels, "int4_product_kernel", right, wrong)
    with pytest.raises(AssertionError):
        test_int4_product.test_separate_programs_give_the_bits_of_one_program()


def test_another_part_in_the_tactic_for_steps_is_detected(mutant: Callable[..., None]) -> None:
    mutant(product_kernels, "int4_product_kernel", "part if ONE_PART else 0", "0")
    with pytest.raises(AssertionError):
        test_int4_product.test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_tile(16, False, split=True)


def test_a_sum_that_depends_on_the_tile_is_detected(mutant: Callable[..., None]) -> None:
    mutant(product_kernels, "int4_product_kernel", "total += tl.dot", "total += (BLOCK_N / 64 + 1e-6) * tl.dot")
    with pytest.raises(AssertionError):
        test_int4_product.test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_tile(3, False, split=False)


NORM_FAULTS = {
    "the weights of other columns": ("next_weight + column", "next_weight + (column + 1) % WIDTH"),
    "x that is not squared": ("tl.reshape(x * x, [TILES", "tl.reshape(x + 2, [TILES"),
    "another tile's sums": ("tl.min(column, 0) // NORM_COLUMNS", "tl.min(column, 0) * 0"),
    "the sums of another row": ("rows + row[None, :], _sum", "rows + ((row + 1) % rows)[None, :], _sum"),
    "a wrong exponent": ("(exponent - 22)", "(exponent - 21)"),
    "integers of few bits": ("(276 - exponent)", "(256 - exponent)"),
}


@pytest.mark.parametrize("name", NORM_FAULTS)
def test_a_fault_in_what_a_norm_reads_is_detected(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, wrong = NORM_FAULTS[name]
    source = Path(str(norm_kernels.__file__)).read_text()
    assert source.count(right) == 1
    (tmp_path / "mutant.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", tmp_path / "mutant.py")
    assert spec is not None
    assert spec.loader is not None
    mutated = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutant", mutated)
    spec.loader.exec_module(mutated)
    case = ProductCase(4, 3, 200, residual=True, for_norm=True)
    int4_product(**case.inputs(), tactic=case.tactic)
    monkeypatch.setattr(product_kernels, "write_norm_terms", mutated.write_norm_terms)
    with pytest.raises(AssertionError):
        int4_product(**case.inputs(), tactic=case.tactic)


QKV = test_qkv_product.QkvCase((4, 9), 5, kv_heads=2, group=2, normed=True)
QKV_FAULTS = {
    "no norm": ("result *= norm[None, :]", "result *= 1.0"),
    "a rotation the other way": ("first * sin).to", "-first * sin).to"),
    "the halves exchanged": ("first, second = halves_of", "second, first = halves_of"),
    "the keys by the queries' angles": ("tl.load(key_cos + angle", "tl.load(query_cos + angle"),
    "keys that are not rotated": ("tl.where(is_key, tl.load(key_cos", "tl.where(is_value, tl.load(key_cos"),
    "another token's angle": ("angle = row[None, :] * HALF", "angle = (row // 2)[None, :] * HALF"),
    "another head": ("pair // HALF, pair % HALF", "pair // HALF ^ 1, pair % HALF"),
    "another sequence's first row": ("tl.load(write_indices + batch,", "tl.load(write_indices + 1 - batch,"),
    "one row off": ("other=0) + token", "other=0) + token + 1"),
    "another sequence's queries": ("batch * (HEADS * step)", "0 * (HEADS * step)"),
    "the values of the keys": ("tl.store(v_cache_out + in_cache, first", "tl.store(k_cache_out + in_cache, first"),
}


@pytest.mark.parametrize("name", QKV_FAULTS)
def test_a_fault_in_the_product_of_queries_and_keys_is_detected(name: str, mutant: Callable[..., None]) -> None:
    assert test_qkv_product.qkv_distance(QKV) < TOLERANCE
    mutant(qkv_kernels, "qkv_product_kernel", *QKV_FAULTS[name])
    assert not test_qkv_product.qkv_distance(QKV) < 10 * TOLERANCE


WRITE_FAULTS = {
    "another sequence's length": ("write_indices + batch", "write_indices + 1 - batch"),
    "one row off": ("tl.load(write_indices + batch) + token", "tl.load(write_indices + batch) + token + 1"),
    "a rotation the other way": ("second * cos + first * sin).to", "second * cos - first * sin).to"),
    "the keys by the queries' angles": ("tl.load(key_cos + angle)", "tl.load(query_cos + angle)"),
    "the values of the keys": ("(HEADS + KV_HEADS + head)", "(HEADS + head)"),
    "another head's row": ("((batch * KV_HEADS + head) * capacity", "((batch * KV_HEADS + 1 - head) * capacity"),
}


@pytest.mark.parametrize("name", WRITE_FAULTS)
def test_a_fault_in_the_write_is_detected(name: str, mutant: Callable[..., None]) -> None:
    mutant(write_kernels, "kv_write_kernel", *WRITE_FAULTS[name])
    assert not write_distance() < 10 * TOLERANCE


def merge_inputs() -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 3, 5 * TILE + 7, generator=random) * 2).round() - 20
    logits[..., 2 * TILE : 2 * TILE + 3] += 9
    nothing = torch.empty(2, 3, 0, dtype=torch.long)
    tiles = tiles_of_logits(logits, nothing, top_k=6, mask_token=HEAD_MASK_TOKEN)
    names = (operand.name for operand in OPERATORS["MergeCandidates"].inputs)
    return {name: tensor.contiguous() for name, tensor in zip(names, tiles[:4], strict=True)}, {"top_k": 6}


def operator_distance(name: str) -> float:
    """Largest error of any output. Wrong integers are an error of 1."""
    inputs, attributes = operator_inputs(name, torch.float32, width=300)
    if name == "MergeCandidates":
        # Negative, with many equal ones; the best ones are in few tiles.
        inputs, attributes = merge_inputs()
    if name == "Rotations":
        inputs["position_ids"] += 40_000  # the last scale of the queries is that of position 49,152
        inputs["position_ids"][0, 0] = 262_143
    found, _ = run(OPERATORS[name], inputs, **attributes)
    given = {operand: tensor for operand, tensor in inputs.items() if operand != "counters"}
    expected = reference_of(name, torch.float32)(**given, **attributes)
    wanted = (expected,) if isinstance(expected, torch.Tensor) else expected
    errors = [
        distance(result, right) if result.dtype.is_floating_point else 1 - float(torch.equal(result, right))
        for result, right in zip(found[: len(wanted)], wanted, strict=True)
    ]
    return float(torch.tensor(errors).max())


# By operator: what is wrong, the right source, and the wrong one.
OPERATOR_FAULTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Embed": (
        ("another token's row", "input_ids + token", "input_ids + token // 2"),
        ("the last columns left out", "mask=column < WIDTH)\n", "mask=column < 64)\n"),
    ),
    "SelectRows": (
        ("another sequence's rows", "// selected_rows * step", "* 0"),
        ("another selected row", "logit_rows + row", "logit_rows + row // 2"),
    ),
    "Rotations": (
        ("the keys' scale for queries", "query_cos + at, (cos * of_queries)", "query_cos + at, (cos * of_keys)"),
        ("the first scale for all queries", "tl.minimum(position // LENGTH, SCALES - 1)", "position * 0"),
        ("the scale of another context", "// LENGTH", "// (LENGTH + LENGTH)"),
        ("an angle reduced in fp32", "tl.float64", "tl.float32"),
        ("an imprecise quarter turn", "turns * 1.5707963267948966", "turns * 1.570796"),
        ("a cos of the wrong sign", "((quarter + 1) & 2)", "(quarter & 2)"),
        ("sin and cos not exchanged", "(quarter & 1) != 0", "quarter < 0"),
    ),
    "RmsNorm": (
        ("a mean over the block", "0) / WIDTH", "0) / triton.next_power_of_2(WIDTH)"),
        ("no epsilon", "mean + tl.load(epsilon)", "mean"),
        ("no weight", " * scale.to(tl.float32)", ""),
    ),
    "SwiGlu": (
        ("gate and up exchanged", "gate / (1.0 + tl.exp(-gate)) * up", "up / (1.0 + tl.exp(-up)) * gate"),
        ("no sigmoid", "gate / (1.0 + tl.exp(-gate)) * up", "gate * up"),
    ),
    "DenseProduct": (
        ("the last inner columns left out", "tl.range(start, end, BLOCK_K)", "tl.range(start, end - BLOCK_K, BLOCK_K)"),
    ),
    "DenseProductRowScaled": (
        ("another sequence's scale", "row // step", "row % 2"),
        ("no scale", "if row_scale is not None", "if INNER < 0"),
    ),
    "DenseProductSplitRowScaled": (
        ("the same part in every program", "index * PART, PART", "index * 0, PART"),
        ("the last columns of a part left out", "start + COUNT", "start + COUNT - 40"),
    ),
    "DenseProductAdaptedResidual": (("no adapter", "if narrow is not None", "if RANK < 0"),),
    "DenseProductResidual": (
        ("no residual", "if residual is not None", "if INNER < 0"),
        ("other rows of the residual", "residual + in_y", "residual + (in_y + COLUMNS) % (rows * COLUMNS)"),
    ),
    "Int4HeadNormed": (
        ("no norm", "result *= norm[None, :]", "result *= 1.0"),
        ("the mask token as a candidate", "here & (column != MASK_TOKEN)[:, None]", "here"),
        (
            "equal logits by the highest token",
            "tl.min(tl.where(tiles == best[:, None, :], token, LAST_TOKEN)",
            "tl.max(tl.where(tiles == best[:, None, :], token, 0)",
        ),
        ("a sum that is not shifted back", "best + tl.log(total)", "tl.log(total)"),
        ("exponentials rounded to few bits", "* 8388608.0 + 0.5", "* 128.0 + 0.5"),
        ("another row's asked ids", "tl.load(asked_ids + at,", "tl.load(asked_ids + at // (asked + asked) * asked,"),
        ("an asked id left out", "tl.range(0, asked)", "tl.range(0, asked - 1)"),
        ("a tile left out", "(tile * TILE < COLUMNS)[:, None] & exists", "(tile > 0)[:, None] & exists"),
    ),
    "DenseHeadMasked": (
        ("the bits of a word reversed", "words >> (column % 32)", "words >> (31 - column % 32)"),
        ("another row's mask", "wide[None, :] * WORDS", "(wide ^ 1)[None, :] * WORDS"),
        (
            "the mask for asked logits too",
            "0 * column[:, None], result, mask=found",
            "0 * column[:, None], tl.where(column[:, None] % 2 == 0, result, NEVER), mask=found",
        ),
        ("the last inner columns left out", "tl.range(0, INNER, BLOCK_K", "tl.range(0, INNER - BLOCK_K, BLOCK_K"),
    ),
    "MergeCandidates": (
        ("equal logits by the highest token", "(token ^ LAST_TOKEN).to(tl.int64)", "token.to(tl.int64)"),
        ("negative logits in the wrong order", "return bits ^ ((bits >> 31) & 0x7FFFFFFF)", "return bits"),
        ("a candidate taken twice", "others < best", "others <= best"),
        ("one candidate a tile", "tile == token // TILE, next_best", "tile == token // TILE, LOWEST"),
        ("another tile's other tokens", "token // TILE * TILE + tl", "token // (TILE + TILE) * TILE + tl"),
        ("the last tile left out", "exists = tile < TILES", "exists = tile < TILES - 1"),
        ("a sum that is not shifted back", "highest + tl.log", "tl.log"),
    ),
}


@pytest.mark.parametrize("name", OPERATOR_FAULTS)
def test_an_operator_without_a_fault_is_within_the_tolerance(name: str) -> None:
    assert operator_distance(name) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        pytest.param(name, right, wrong, id=f"{name}, {fault}")
        for name, faults in OPERATOR_FAULTS.items()
        for fault, right, wrong in faults
    ],
)
def test_a_fault_in_an_operator_is_detected(name: str, right: str, wrong: str, mutant: Callable[..., None]) -> None:
    module, kernel = OPERATORS[name].kernel.split(".")
    mutant(importlib.import_module(f"trimode.plugins.kernels.{module}"), kernel, right, wrong)
    assert not operator_distance(name) < 10 * TOLERANCE


def test_a_load_outside_the_pool_is_detected(mutant: Callable[..., None]) -> None:
    mutant(attention_kernels, "attend_kernel", "inside = at < length", "inside = at < length + 64")
    case = AttentionCase((9, 316), 6, "causal", group=4, slack=0)
    with pytest.raises(TriModeError, match="attend_kernel loads outside its tensors, near k_cache"):
        attend(**case.inputs())


def test_a_store_outside_the_pool_is_detected(mutant: Callable[..., None]) -> None:
    mutant(write_kernels, "kv_write_kernel", "row < capacity", "row <= capacity")
    node = KvWrite.node(batch=1, step=4, capacity=8, kv_heads=2, group=4, head_dim=64)
    inputs = {name: torch.zeros(*shape) for name, shape in node.shapes.items()}
    with pytest.raises(TriModeError, match="kv_write_kernel stores outside its tensors, near k_cache"):
        kv_write(**{**inputs, "write_indices": torch.tensor([5])})


@pytest.mark.parametrize("pattern", ["causal", "bidirectional", "masked"])
def test_a_stale_length_is_detected(pattern: Pattern) -> None:
    assert attention_distance(pattern, stale=1) > 10 * TOLERANCE
    assert write_distance(shift=-1) > 10 * TOLERANCE


@pytest.mark.parametrize("split", [False, True])
def test_a_missing_input_is_detected(split: bool) -> None:
    assert product_distance(split, without=("narrow", "adapter_up")) > 10 * TOLERANCE
    assert product_distance(split, without=("residual",)) > 10 * TOLERANCE
