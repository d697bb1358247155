"""Target rtx: plans built without a GPU, their shared weights, their audit, and refused options."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.command import run_here
from trimode.build.audit import audit_engine
from trimode.build.audit_report import write_plot
from trimode.build.engine_builder import build_engine
from trimode.build.rtx import plan_building as rtx
from trimode.build.rtx.audit import Plan, audit_pass, kind_of, read_plans
from trimode.build.rtx.graph_form import refuse_disorder
from trimode.build.rtx.kernel_list import KernelTensor, PlanKernel
from trimode.build.rtx.target import RtxTarget
from trimode.common.errors import TriModeError
from trimode.engine.files import POOL, verify_files
from trimode.engine.manifest import Manifest
from trimode.engine.plan_file import whole_plan
from trimode.engine.targets.rtx import RtxSection
from trimode.model.checkpoint import Checkpoint

OPTIONS = RtxTarget(sms=(121, 89), max_batch=4, max_step=64)


@pytest.fixture(scope="module")
def engine(wide_int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtx") / "engine"
    build_engine(Checkpoint(wide_int4_checkpoint), out, target=OPTIONS, capacity=1024)
    return out


@pytest.fixture(scope="module")
def wide_int4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the 3B shape's form, narrow enough to build in seconds."""
    return write_random_checkpoint("3b", tmp_path_factory.mktemp("wide") / "checkpoint", 2)


def write_random_checkpoint(shape: str, folder: Path, layers: int) -> Path:
    script = [sys.executable, "-m", "scripts.gpu.random_w4a16_checkpoint"]
    command = [*script, shape, str(folder), "--layers", str(layers), "--vocab-size", "2048"]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True, capture_output=True)
    return folder


def test_both_plans_share_every_matrix(engine: Path, wide_int4_checkpoint: Path) -> None:
    manifest = Manifest.read(engine)
    verify_files(engine, manifest.files)
    stored = sum(array.nbytes for _, array in Checkpoint(wide_int4_checkpoint).tensors())
    assert (engine / POOL).stat().st_size == pytest.approx(stored, rel=0.01)
    section = manifest.section(RtxSection)
    ar, diffusion = section.ar, section.diffusion
    assert [splice.bytes for splice in ar.splices] == [splice.bytes for splice in diffusion.splices]
    assert len(ar.splices) == 1  # the sections are the same to the byte
    for name, entry in (("ar", ar), ("diffusion", diffusion)):
        whole = sum(len(chunk) for chunk in whole_plan(engine / name / "engine.plan", engine / POOL, entry))
        assert whole == entry.private_bytes + sum(splice.bytes for splice in entry.splices)


@pytest.mark.parametrize("step", [1, 8, 32])
def test_every_int4_matrix_is_fused_and_no_kernel_only_dequantises(engine: Path, step: int) -> None:
    for plan in read_plans(engine):
        found = audit_pass(plan, 1, step, 512)
        assert found.int4_products == found.int4_matrices == 9  # four a layer and the head
        assert found.lone_dequantisations == 0


def test_the_audit_agrees_with_a_count_by_hand(engine: Path, wide_int4_checkpoint: Path) -> None:
    """int4 products of one token: integers, scales, and 16-bit rows in and out."""
    checkpoint = Checkpoint(wide_int4_checkpoint)
    weights = sum(
        array.nbytes for name, array in checkpoint.tensors() if "proj." in name or name.startswith("diffusion_head")
    )
    config = checkpoint.config
    qkv, mlp = config.query_width + 2 * config.kv_width, config.intermediate_size
    a_layer = 3 * config.hidden_size + qkv + config.query_width + 2 * mlp + mlp + config.hidden_size
    rows = 2 * (config.num_hidden_layers * a_layer + config.hidden_size + config.vocab_size)
    counted = audit_pass(read_plans(engine)[0], 1, 1, 512).bytes_by_kind
    assert counted["int4 product"] == weights + rows
    # The fused attention reads the window's keys, values and, for each query of a KV head, mask; queries in and out.
    window = 2 * 512 * config.kv_width + 512 * config.num_attention_heads // config.num_key_value_heads
    assert counted["attention"] == config.num_hidden_layers * 2 * (window + 2 * config.query_width)
    assert "KV copy" not in counted


def test_dimensions_scale_with_the_pass(engine: Path) -> None:
    plan = read_plans(engine)[0]
    one, long, wide = (audit_pass(plan, *shape) for shape in ((1, 8, 256), (1, 8, 1024), (4, 8, 256)))
    assert wide.bytes_by_kind["attention"] == 4 * one.bytes_by_kind["attention"]
    queries = 2 * 2 * 2 * 8 * plan.manifest.model.query_width  # read and written in two layers, 16 bits
    assert long.bytes_by_kind["attention"] - queries == 4 * (one.bytes_by_kind["attention"] - queries)
    assert 1 < long.ratio < one.ratio < 1.1  # what is above the lower bound does not grow with the window


def test_the_count_is_bounded_from_both_sides(engine: Path) -> None:
    """The upper bound: attention without a list of tiles. The lower one: an L2 cache."""
    for plan in read_plans(engine):
        part, whole = audit_pass(plan, 1, 8, 300), audit_pass(plan, 1, 8, 1024)
        assert whole.ratio == whole.ratio_whole_pool
        heeded = 320 / 1024  # tiles of 64 rows
        keys_and_values = 2 * 2 * 2 * 1024 * plan.manifest.model.kv_width
        unheeded = (part.ratio_whole_pool - part.ratio) * part.bound
        assert unheeded == pytest.approx(keys_and_values * (1 - heeded), rel=0.02)  # and the mask's
        assert part.ratio_with_cache == part.ratio
        tiny, roomy = (audit_pass(plan, 1, 8, 300, size).ratio_with_cache for size in (1 << 14, 1 << 25))
        assert 1 < roomy < tiny < part.ratio


def test_an_unfused_product_is_counted_as_such() -> None:
    """The count of separate dequantisations can be above zero."""
    tensor = KernelTensor(name="w", dims=(128, 64), dtype="Int4")
    kernel = PlanKernel(
        name="k",
        kind="kgen",
        stream=0,
        inputs=(),
        constants=(tensor,),
        outputs=(),
        sources=("layers.0/DequantizeLinear_3",),
    )
    assert kind_of(kernel) == "dequantisation"
    assert kind_of(kernel.model_copy(update={"sources": (*kernel.sources, "layers.0/MatMul_4")})) == "int4 product"


def test_the_report_and_its_plot(engine: Path, tmp_path: Path) -> None:
    report = audit_engine(engine, steps=(1, 8), windows=(512, 1024), gpu="dgx-spark", acceptance=6.82)
    assert len(report.passes) == 2 * 2 * 2
    assert report.memory["weights of one plan"] == 0 < report.memory["weights of both plans"]
    assert [bound.window for bound in report.bounds] == [512, 1024]
    assert report.bounds[0].ar_ms < report.bounds[1].ar_ms
    write_plot(report, tmp_path / "bytes.png")
    with Image.open(tmp_path / "bytes.png") as picture:
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sm", "90"), "--sm 90: TensorRT-RTX builds for 75, 80, 86, 89, 120, 121"),
        (("--sm", "12.1"), "'12.1' is not a list of whole numbers"),
        (("--activations", "int8"), "--activations is not an option of target rtx"),
        (("--capacity", "999999"), "capacity 999999 exceeds"),
    ],
)
def test_a_refused_build_prints_one_line(
    wide_int4_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    found = run_here("build", wide_int4_checkpoint, tmp_path / "out", "--target", "rtx", *arguments)
    assert found.returncode == 2
    assert words in found.stderr
    assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--window", "4096"), "window 4096 is outside the engine's 1 to 1024"),
        (("--window", "512", "--step", "128"), "step 128 is outside the engine's 1 to 64"),
        (("--window", "512", "--batch", "9"), "batch 9 is outside the engine's 1 to 4"),
        (("--window", "512", "--gpu", "b100"), "GPU b100 is not known"),
    ],
)
def test_a_refused_audit_prints_one_line(engine: Path, arguments: tuple[str, ...], words: str) -> None:
    found = run_here("audit", engine, *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert words in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["layers.json", "graph.onnx"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_a_damaged_engine_is_named(engine: Path, tmp_path: Path, name: str, damage: str) -> None:
    copy = shutil.copytree(engine, tmp_path / "engine", ignore=shutil.ignore_patterns("pool.bin"))
    path = copy / "diffusion" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-9] if damage == "truncated" else b"x" + content[1:])
    found = run_here("audit", copy)
    assert found.returncode == 2
    assert f"diffusion/{name}" in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_cpu_engine_has_no_kernels_to_audit(random_int4_engine: Path) -> None:
    found = run_here("audit", random_int4_engine)
    assert found.returncode == 2
    assert "is for target cpu" in found.stderr


def test_the_command_audits_as_json(engine: Path) -> None:
    found = run_here("audit", engine, "--window", "512", "--json")
    assert json.loads(found.stdout)["passes"][0]["engine"] == "ar"
    assert found.stderr == ""


def test_an_audit_without_flags_uses_what_the_plan_allows(engine: Path) -> None:
    passes = json.loads(run_here("audit", engine, "--json").stdout)["passes"]
    assert {found["window"] for found in passes} == {512, 1024}
    assert {found["step"] for found in passes} == {1, 8, 32}


def test_an_audit_without_flags_works_on_a_tiny_plan(wide_int4_checkpoint: Path, tmp_path: Path) -> None:
    """The plan's limits are below every default, and below a block."""
    target = replace(OPTIONS, max_step=16)
    build_engine(Checkpoint(wide_int4_checkpoint), tmp_path / "out", target=target, capacity=24)
    report = audit_engine(tmp_path / "out", gpu="dgx-spark", acceptance=6.82)
    assert {(found.window, found.step) for found in report.passes} == {(24, 1), (24, 8), (24, 16)}
    assert [(bound.window, bound.block_length) for bound in report.bounds] == [(24, 16)]


def test_an_audit_counts_mixed_precision_matrix_by_matrix(engine: Path) -> None:
    """Of the second layer, q, k, v and the MLP's last matrix are taken as 16-bit."""
    plan = read_plans(engine)[0]
    precision = plan.manifest.precision
    wide = [f"encoder.layers.1.{name}" for name in (*(f"self_attn.{part}_proj" for part in "qkv"), "mlp.down_proj")]
    matrices = precision.matrices | dict.fromkeys(wide, "bf16")
    mixed = plan.manifest.model_copy(update={"precision": precision.model_copy(update={"matrices": matrices})})
    uniform, found = (audit_pass(one, 1, 1, 512) for one in (plan, replace(plan, manifest=mixed)))
    assert (uniform.int4_matrices, found.int4_matrices) == (9, 7)
    config = plan.manifest.model
    weights = config.hidden_size * (config.query_width + 2 * config.kv_width + config.intermediate_size)
    assert found.bound - uniform.bound == weights * (2 - (4 + 16 / (precision.group or 0)) / 8)
    assert "int4 in groups of 128 (11 matrices); bf16 (4 matrices" in mixed.precision.summary()


def test_a_warning_of_the_builder_fails_the_build(
    wide_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser always warns that inputs are int64. Removed from the expected messages, this is an error."""
    monkeypatch.setattr(rtx, "EXPECTED_MESSAGES", {k: v for k, v in rtx.EXPECTED_MESSAGES.items() if "Int64" not in k})
    with pytest.raises(RuntimeError, match="Int64 binding"):
        build_engine(Checkpoint(wide_int4_checkpoint), tmp_path / "out", target=OPTIONS, capacity=1024)
    assert list(tmp_path.iterdir()) == []


def test_a_constant_that_differs_is_named(
    wide_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second graph reads one norm from another range of the pool."""
    build = rtx.build_network

    def spoil(config: Any, pool: Any, pattern: Any, options: Any) -> Any:
        if pattern == "bidirectional":
            pool = replace(pool, norm=replace(pool.norm, offset=pool.layers[0].input_layernorm.offset))
        return build(config, pool, pattern, options)

    monkeypatch.setattr(rtx, "build_network", spoil)
    with pytest.raises(RuntimeError, match=r"constant encoder\.norm differs"):
        build_engine(Checkpoint(wide_int4_checkpoint), tmp_path / "out", target=OPTIONS, capacity=1024)
    assert list(tmp_path.iterdir()) == []


def test_a_constant_that_one_plan_lacks_fails_the_build(
    wide_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Gather in place of a one-hot product, the AR graph has no product of two activations, and so lacks the
    constants that scale such a product.
    """
    build = rtx.build_network
    monkeypatch.setattr(
        rtx, "build_network", lambda *given: build(*given[:3], replace(given[3], select_by_product=False))
    )
    with pytest.raises(RuntimeError, match="0 bytes are only in the AR plan, 256 only in the diffusion plan"):
        build_engine(Checkpoint(wide_int4_checkpoint), tmp_path / "out", target=OPTIONS, capacity=1024)
    assert list(tmp_path.iterdir()) == []


def test_an_attention_that_does_not_wait_for_its_cache_writer_is_refused(engine: Path) -> None:
    """The real kernels are accepted. Without the tensor from the writer to the attention, they are refused."""
    plan = read_plans(engine)[0]
    layers = plan.manifest.model.num_hidden_layers
    refuse_disorder(plan.kernels, layers)
    attention = next(kernel for kernel in plan.kernels if "k_view.1" in {tensor.name for tensor in kernel.inputs})
    queries = attention.inputs[0].name
    apart = tuple(
        kernel.model_copy(update={"outputs": tuple(tensor for tensor in kernel.outputs if tensor.name != queries)})
        for kernel in plan.kernels
    )
    with pytest.raises(RuntimeError, match=r"reads [kv]_view\.1 but does not wait for [kv]_cache_out\.1"):
        refuse_disorder(apart, layers)
    with pytest.raises(RuntimeError, match=r"no kernel reads k_view\.1, v_view\.1"):
        refuse_disorder(tuple(kernel for kernel in plan.kernels if kernel is not attention), layers)


def test_plans_for_older_gpus_copy_the_window(wide_int4_checkpoint: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, sms=(121, 86))
    build_engine(Checkpoint(wide_int4_checkpoint), tmp_path / "out", target=options, capacity=1024)
    for plan in read_plans(tmp_path / "out"):
        inputs = {value.name for value in plan.graph.graph.input}
        assert "window_rows" in inputs
        assert "k_view.0" not in inputs
        short, long = (audit_pass(plan, 1, 8, window) for window in (256, 1024))
        assert short.kv_copies == 2 * 2  # keys and values of two layers
        assert long.bytes_by_kind["KV copy"] == 4 * short.bytes_by_kind["KV copy"]
        assert long.bytes_by_kind["KV copy"] == 2 * 2 * 2 * 2 * 1024 * plan.manifest.model.kv_width


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> list[list[Plan]]:
    """Both plans of the 8B shape's form, with two and with three of its layers, for DGX Spark."""
    folder = tmp_path_factory.mktemp("8b")
    plans = []
    for layers in (2, 3):
        write_random_checkpoint("8b", folder / f"{layers}", layers)
        out = folder / f"{layers}-rtx"
        build_engine(Checkpoint(folder / f"{layers}"), out, target=replace(OPTIONS, sms=(121,)), capacity=32768)
        plans.append(read_plans(out))
    return plans


@pytest.mark.parametrize(("window", "bar"), [(512, 1.10), (4096, 1.20), (32768, 1.5)])
@pytest.mark.parametrize("step", [1, 8, 32])
@pytest.mark.parametrize("engine_index", [0, 1])
def test_a_layer_of_8b_stays_within_its_bars(
    eight_billion: list[list[Plan]], engine_index: int, step: int, window: int, bar: float
) -> None:
    """The cost of one more layer. The rest of a pass is small compared with 34 layers."""
    two, three = (audit_pass(plans[engine_index], 1, step, window) for plans in eight_billion)
    assert (three.bytes - two.bytes) / (three.bound - two.bound) < bar
    assert three.kv_copies == three.lone_dequantisations == 0
    assert three.kernels - two.kernels == (10, 13)[engine_index]


@pytest.mark.parametrize("stage", ["weights", "ar: ", "diffusion: "])
def test_an_interrupted_build_leaves_nothing(wide_int4_checkpoint: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(at: str, done: int, _total: int) -> None:
        if at.startswith(stage) and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(
            Checkpoint(wide_int4_checkpoint), tmp_path / "out", target=OPTIONS, capacity=1024, progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_builder_runs_leaves_nothing(
    wide_int4_checkpoint: Path, tmp_path: Path, number: int
) -> None:
    """A real signal, raised in TensorRT's first callback, which swallows exceptions."""
    program = (
        "import signal, trimode.build.rtx.plan_building as rtx, trimode.cli.main as command\n"
        "start = rtx._RtxMonitor.phase_start\n"
        "def phase_start(*arguments):\n"
        f"    signal.raise_signal({int(number)})\n"
        "    start(*arguments)\n"
        "rtx._RtxMonitor.phase_start = phase_start\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "command.main()"
    )
    command = [sys.executable, "-c", program, "build", str(wide_int4_checkpoint), str(tmp_path / "out")]
    found = subprocess.run([*command, "--target", "rtx"], capture_output=True, text=True, check=False)
    assert found.returncode == 128 + number
    assert "Traceback" not in found.stderr
    assert "Exception caught" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_a_missing_package_names_the_remedy(
    wide_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "trimode.build.rtx.plan_building", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(TriModeError, match=r"pip install 'trimode\[build,rtx\]'"):
        build_engine(Checkpoint(wide_int4_checkpoint), tmp_path / "out", target=OPTIONS, capacity=1024)
