"""The plugin declarations, checked by TensorRT's validator and queried through TensorRT's plugin classes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.plugin_builder import (
    ASKED,
    BATCH,
    CACHE,
    CAPACITY,
    COLUMNS,
    COMPILED,
    GROUP,
    HEADS,
    INNER,
    KV_HEADS,
    ROWS,
    SIZE,
    STEP,
    TILES,
    TOP_K,
    VOCABULARY,
    WIDTH,
    Built,
    build,
)
from trimode.common.errors import TriModeError
from trimode.engine.kernel_library import KernelLibrary
from trimode.plugins.operators import OPERATORS, PLUGINS, Attend, Head, Int4Product
from trimode.plugins.operators.attention import split_count
from trimode.plugins.operators.int4_product import LONGEST_UNIT

# Expected values were computed by hand.
OUTPUTS = {
    "EmbedForNorm": (("HALF", "HALF", "FLOAT"), ((BATCH, STEP, INNER), (BATCH, STEP, INNER), (4, BATCH * STEP))),
    "Rotations": (("HALF",) * 4, ((BATCH, STEP, SIZE // 2),) * 4),
    "RmsNorm": (("HALF",), ((BATCH, STEP, INNER),)),
    "SwiGlu": (("HALF",), ((BATCH, STEP, COLUMNS),)),
    "SelectRows": (("HALF",), ((BATCH, ROWS, INNER),)),
    **dict.fromkeys(
        [name for name, operator in OPERATORS.items() if isinstance(operator, Head)],
        (
            ("FLOAT", "INT32", "FLOAT", "FLOAT", "FLOAT"),
            (*[(BATCH, ROWS, TILES)] * 3, (BATCH, ROWS, VOCABULARY), (BATCH, ROWS, ASKED)),
        ),
    ),
    "MergeCandidates": (("FLOAT", "INT64", "FLOAT"), (*[(BATCH, ROWS, TOP_K)] * 2, (BATCH, ROWS))),
}
LAUNCHES: dict[str, set[tuple[tuple[int, int, int], tuple[int, ...]]]] = {
    "EmbedForNorm": {((BATCH * STEP, 1, 1), (BATCH * STEP,))},
    "Rotations": {((BATCH * STEP, 1, 1), ())},
    "RmsNorm": {((BATCH * STEP, 1, 1), ())},
    "SwiGlu": {((BATCH * STEP, 1, 1), ())},
    "SelectRows": {((BATCH * ROWS, 1, 1), (STEP, ROWS))},
    "DenseHeadMasked": {((tiles, strips, 1), (BATCH * ROWS, ASKED)) for tiles, strips in ((2, 79), (2, 40), (1, 40))},
    "MergeCandidates": {((BATCH * ROWS, 1, 1), ())},
    "DenseProductRowScaled": {
        ((tiles, strips, 1), (BATCH * STEP, STEP)) for tiles, strips in ((14, 12), (14, 3), (7, 2), (4, 2), (2, 2))
    },
}


@pytest.fixture(scope="module")
def built(tensorrt: ModuleType, declarations: ModuleType, library: Path) -> dict[str, Built]:
    """Every plugin: declared, validated, and queried for its shapes and kernels."""
    declarations.declare_plugins(KernelLibrary(library, 90))
    return {name: build(tensorrt, name) for name in PLUGINS}


def test_every_operator_is_declared_in_our_namespace(tensorrt: ModuleType, built: dict[str, Built]) -> None:
    assert {name for space, name in tensorrt.get_plugin_registry().creators if space == "trimode"} == built.keys()
    assert len(built) == 1 + 3 + 2 + 8 + 4 + 2 + 4 + 4 + 13 + 6


@pytest.mark.parametrize("name", COMPILED)
def test_every_tactic_has_ptx_whose_parameters_are_the_operators(built: dict[str, Built], name: str) -> None:
    """In TensorRT's order: inputs, scalars, outputs, and no others."""
    operator = OPERATORS[name]
    pointer, scalar = "u64", "u32"
    expected = [
        *(pointer for _ in operator.inputs),
        *(scalar for _ in operator.scalars),
        *(pointer for _ in operator.outputs),
    ]
    assert built[name].kernels
    for kernel in built[name].kernels.values():
        (signature,) = re.findall(rf"\.visible \.entry {kernel.entry}\(([^)]*)\)", kernel.ptx)
        assert re.findall(r"\.param \.(u64|u32|b32|b64)", signature) == expected
        assert re.search(r"^\.target sm_90a?$", kernel.ptx, re.M)
        assert kernel.block == (int(re.findall(r"\.reqntid (\d+)", kernel.ptx)[0]), 1, 1)
        assert 0 <= kernel.shared <= 232448
    texts = [kernel.ptx for kernel in built[name].kernels.values()]
    assert len(set(texts)) == len(texts)


def test_the_pool_and_the_counters_are_written_in_place(built: dict[str, Built]) -> None:
    for name, found in built.items():
        inputs, product = [operand.name for operand in OPERATORS[name].inputs], OPERATORS[name]
        caches = (inputs.index("k_cache"), inputs.index("v_cache")) if name.startswith(("KvWrite", "Qkv")) else ()
        counters = (inputs.index("counters"),) if "counters" in inputs else ()
        plain = len(found.aliases) - len(caches) - len(counters)
        assert found.aliases == (*[-1] * plain, *caches, *counters)
        assert plain == sum(operand.aliases is None for operand in product.outputs)


def test_output_shapes_and_types(built: dict[str, Built]) -> None:
    parts = split_count(5, STEP)
    assert parts == 3  # a step of more than 64 tokens halves the splits
    assert built["KvWrite"].output_shapes == ((BATCH, HEADS, STEP, SIZE), CACHE, CACHE)
    for pattern in ("Causal", "Bidirectional", "Masked"):
        found = built[f"Attend{pattern}"]
        assert found.output_shapes == ((BATCH, parts, HEADS, STEP, SIZE), (BATCH, parts, HEADS, STEP))
        assert found.output_types == ("HALF", "FLOAT")
    assert built["MergeSplits"].output_shapes == ((BATCH, STEP, HEADS * SIZE),)
    for name, found in built.items():
        if name.startswith(("Int4Product", "DenseProduct")):
            y, *others = zip(found.output_types, found.output_shapes, strict=True)
            assert y == ("HALF", (BATCH, STEP, COLUMNS // 2 if "Gated" in name else COLUMNS))
            terms = [("HALF", (BATCH, STEP, COLUMNS)), ("FLOAT", (3, BATCH * STEP))] if "ForNorm" in name else []
            parts = [("FLOAT", (8, 128, COLUMNS)), ("INT32", (12,))] if "ProductSplit" in name else []
            assert others == [*terms, *parts]
    assert {
        name: (found.output_types, found.output_shapes) for name, found in built.items() if name in OUTPUTS
    } == OUTPUTS


def test_launches_cover_the_work(built: dict[str, Built]) -> None:
    """Expected values were computed by hand for the shapes of this test."""
    assert {kernel.grid for kernel in built["KvWrite"].kernels.values()} == {(STEP, BATCH, 1)}
    assert {kernel.scalars for kernel in built["KvWrite"].kernels.values()} == {(STEP, CAPACITY)}
    rows = STEP * HEADS // KV_HEADS
    for number, tactic in enumerate(Attend.TACTICS, 1):
        kernel = built["AttendMasked"].kernels[number]
        assert kernel.grid == (-(-rows // tactic.constants["BLOCK_M"]), 3 * KV_HEADS, BATCH)
        assert kernel.scalars == (STEP, CAPACITY)
    assert {kernel.grid for kernel in built["MergeSplits"].kernels.values()} == {(STEP, KV_HEADS, BATCH)}
    assert {kernel.scalars for kernel in built["MergeSplits"].kernels.values()} == {(STEP, 3)}
    assert built["QkvProductSplitNormed"].output_shapes == (
        (BATCH, HEADS, STEP, SIZE),
        (8, 128, WIDTH),
        CACHE,
        CACHE,
        (16,),
    )
    for number, kernel in built["QkvProductSplitNormed"].kernels.items():
        tactic = Int4Product.TACTICS[number - 1].constants
        expected = (-(-BATCH * STEP // tactic["BLOCK_M"]), -(-WIDTH // tactic["BLOCK_N"]), 1)
        assert (kernel.grid, kernel.scalars) == (expected, (BATCH * STEP, STEP, CAPACITY))
    for name, launches in LAUNCHES.items():
        assert {(kernel.grid, kernel.scalars) for kernel in built[name].kernels.values()} == launches
    for number, kernel in built["Int4ProductSplitAdaptedResidual"].kernels.items():
        tactic = Int4Product.TACTICS[number - 1].constants
        expected = (-(-BATCH * STEP // tactic["BLOCK_M"]), -(-COLUMNS // tactic["BLOCK_N"]), 1)
        assert (kernel.grid, kernel.scalars) == (expected, (BATCH * STEP,))


def test_a_small_groups_products_have_every_tactic_for_any_rows(built: dict[str, Built]) -> None:
    assert GROUP < LONGEST_UNIT
    for_any_rows = {n for n, tactic in enumerate(Int4Product.TACTICS, 1) if "STEPS" not in tactic.constants}
    assert built["Int4Product"].kernels.keys() == for_any_rows


def test_a_tactic_that_was_not_compiled_is_not_offered(built: dict[str, Built]) -> None:
    """The library of these tests has only the first tactic of some operators."""
    lacking = built.keys() - set(COMPILED)
    assert lacking
    for name in lacking:
        assert built[name].kernels.keys() == {1}


def without(parameter: str) -> Any:
    def spoil(parameters: dict[str, Any], result: Any) -> tuple[dict[str, Any], Any]:
        return {name: kind for name, kind in parameters.items() if name != parameter}, result

    return spoil


def retyped(parameter: str, kind: Any) -> Any:
    return lambda parameters, result: ({**parameters, **({parameter: kind} if parameter in parameters else {})}, result)


def reordered(parameters: dict[str, Any], result: Any) -> tuple[dict[str, Any], Any]:
    return dict(reversed(parameters.items())), result


def result_is(kind: Any) -> Any:
    return lambda parameters, _result: (parameters, kind)


FAULTS: dict[str, tuple[str, Any]] = {
    "aot_impl without the tactic": ("embed", without("tactic")),
    "aot_impl without its result's type": ("embed", result_is(inspect.Parameter.empty)),
    "aot_impl that gives no scalars": ("embed", result_is(tuple[str, str])),
    "aot_impl that misses an input": ("embed", without("k_cache")),
    "aot_impl with another attribute type": ("embed", retyped("splits", float)),
    "autotune without the outputs": ("autotune", without("outputs")),
    "autotune that misses an input": ("autotune", without("write_indices")),
    "autotune that gives a string": ("autotune", result_is(str)),
    "attributes before inputs": ("describe", reordered),
    "an attribute of no known type": ("describe", retyped("splits", complex)),
    "outputs of no known type": ("describe", result_is(int)),
    "no outputs' type": ("describe", result_is(inspect.Parameter.empty)),
    "an input without a type": ("describe", retyped("q", inspect.Parameter.empty)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_declaration_is_refused(
    declarations: ModuleType, built: dict[str, Built], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The validator must refuse each single fault in one of the three functions."""
    del built  # the right declarations have been accepted
    where, spoil = FAULTS[fault]
    signed = declarations._signed

    def spoiled(function: Any, parameters: dict[str, Any], result: Any) -> Any:
        return signed(function, *(spoil(parameters, result) if function.__name__ == where else (parameters, result)))

    monkeypatch.setattr(declarations, "_signed", spoiled)
    operator = Attend("masked")
    operator.name = f"Wrong{list(FAULTS).index(fault)}"
    with pytest.raises((ValueError, TypeError)):
        declarations.declare(operator)


def test_a_kernel_that_was_not_compiled_is_named(
    tensorrt: ModuleType, declarations: ModuleType, built: dict[str, Built], library: Path
) -> None:
    del built
    kernels = KernelLibrary(library, 90)
    emptied = kernels.index.model_copy(update={"kernels": {}})
    lacking = KernelLibrary(library, 90)
    lacking.index = emptied
    declarations.declare_plugins(lacking)
    try:
        with pytest.raises(TriModeError, match=r"lacks KvWrite\.KV_HEADS2\.GROUP2\.HEAD_DIM32\.tactic1"):
            build(tensorrt, "KvWrite")
    finally:
        declarations.declare_plugins(kernels)


def test_kernels_of_another_type_are_refused(
    tensorrt: ModuleType, declarations: ModuleType, built: dict[str, Built], library: Path
) -> None:
    del built
    kernels, other = KernelLibrary(library, 90), KernelLibrary(library, 90)
    other.index = kernels.index.model_copy(update={"real": "bf16"})
    declarations.declare_plugins(other)
    try:
        with pytest.raises(RuntimeError, match=r"MergeSplits has no kernels for DataType\.HALF"):
            build(tensorrt, "MergeSplits")
    finally:
        declarations.declare_plugins(kernels)


def test_a_gpu_without_kernels_is_refused_with_the_compiled_capabilities(library: Path) -> None:
    with pytest.raises(TriModeError, match=r"capabilities 90, and this GPU's is 100; build with --sm 100"):
        KernelLibrary(library, 100)


def test_foreign_folders_are_no_compute_capabilities(tmp_path: Path) -> None:
    for name in ("sm_foo", "sm_90a", "sm_"):
        (tmp_path / name).mkdir()
    with pytest.raises(TriModeError, match=r"capabilities none, and this GPU's is 100; build with --sm 100"):
        KernelLibrary(tmp_path, 100)
