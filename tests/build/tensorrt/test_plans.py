"""``trimode compile`` with a double of TensorRT's parser and builder; everything else is real."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.tensorrt_double import TensorrtDouble, one_tactic_each
from trimode.build.engine_builder import build_engine
from trimode.build.tensorrt import compiled_directory as tensorrt_compile
from trimode.build.tensorrt.target import TensorrtTarget
from trimode.common.errors import TriModeError
from trimode.common.gpus import Gpu, Gpus
from trimode.engine.files import verify_files
from trimode.engine.kernel_library import LibraryIndex
from trimode.engine.manifest import Manifest
from trimode.engine.targets.tensorrt import TensorrtSection
from trimode.model.checkpoint import Checkpoint

H100 = Gpu(ordinal=0, name="NVIDIA H100", compute_capability=90)


@pytest.fixture(scope="module")
def emitted(random_int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emitted") / "engine"
    options = TensorrtTarget(sms=(90,), dtype="fp16", max_batch=4, max_step=256, emit_only=True)
    with pytest.MonkeyPatch.context() as patch:
        one_tactic_each(patch)
        build_engine(Checkpoint(random_int4_checkpoint), out, target=options, capacity=1024)
    return out


@pytest.fixture
def double(tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> TensorrtDouble:
    monkeypatch.setattr(tensorrt_compile, "find_gpus", lambda: Gpus("CUDA 13.1", [H100]))
    one_tactic_each(monkeypatch)
    return TensorrtDouble(tensorrt, monkeypatch)


def test_tensorrt_requests_the_emitted_kernels(emitted: Path, double: TensorrtDouble, tmp_path: Path) -> None:
    """All of the plugins' operators. The other kernels are for target cuda, so that an engine can be converted."""
    tensorrt_compile.compile_engine(emitted, tmp_path / "out")
    index = LibraryIndex.model_validate_json((emitted / "kernels/sm_90/kernels.json").read_text())
    asked = {
        (kernel.ptx, kernel.block[0], kernel.shared) for _, built in double.plugins for kernel in built.kernels.values()
    }
    given = {
        ((emitted / f"kernels/sm_90/{name}.ptx").read_text(), kernel.threads, kernel.shared_bytes)
        for name, kernel in index.kernels.items()
        if name.partition(".")[0] in {operator for operator, _ in double.plugins}
    }
    assert asked == given
    # A layer: attention and four products. The others: embedding, rotations, two selections of rows, and the head.
    assert len(double.plugins) == 2 * (2 * 6 + 5)
    assert double.previews == ["ALIASED_PLUGIN_IO_10_03"] * 2


@pytest.mark.usefixtures("double")
def test_the_compiled_engine_is_complete_and_shares_files_with_the_emitted_one(emitted: Path, tmp_path: Path) -> None:
    manifest = tensorrt_compile.compile_engine(emitted, tmp_path / "out")
    verify_files(tmp_path / "out", manifest.files)
    plans = manifest.section(TensorrtSection).plans
    assert plans is not None
    assert (plans.gpu, plans.compute_capability) == ("NVIDIA H100", 90)
    added = {entry.path for entry in manifest.files} - {entry.path for entry in Manifest.read(emitted).files}
    assert added == {f"{engine}/{name}" for engine in ("ar", "diffusion") for name in ("engine.plan", "builder.log")}
    assert (tmp_path / "out/weights/pool.bin").samefile(emitted / "weights/pool.bin")
    assert not (tmp_path / "out/manifest.json").samefile(emitted / "manifest.json")
    verify_files(emitted, Manifest.read(emitted).files)
    with pytest.raises(TriModeError, match="was compiled already, on NVIDIA H100"):
        tensorrt_compile.compile_engine(tmp_path / "out", tmp_path / "again")


def test_a_token_a_block_and_a_chunk_have_separate_profiles(
    emitted: Path, double: TensorrtDouble, tmp_path: Path
) -> None:
    tensorrt_compile.compile_engine(emitted, tmp_path / "out")
    ar, diffusion = double.profiles
    tokens = [((1, 1), (1, 1), (4, 1)), ((1, 2), (1, 32), (4, 64)), ((1, 65), (1, 256), (4, 256))]
    for engine in (ar, diffusion):
        assert [profile["input_ids"] for profile in engine] == tokens
        rows = [((1, 1), (1, 1), (4, 1)), ((1, 1), (1, 32), (4, 64)), ((1, 1), (1, 1), (4, 256))]
        assert [profile["logit_rows"] for profile in engine] == rows
    assert ar[2]["block_mask"][2] == (4, 256, 256)
    assert ar[0]["k_cache.1"] == ((1, 2, 1024, 32), (1, 2, 1024, 32), (4, 2, 1024, 32))
    assert diffusion[1]["step_lengths"] == ((1,), (1,), (4,))
    assert not [name for name in ar[0] if name.startswith("encoder.")]  # weights have one shape


@pytest.mark.parametrize(("max_step", "count"), [(1, 1), (20, 2), (64, 2), (65, 3)])
def test_every_step_fits_one_profile(tensorrt: ModuleType, max_step: int, count: int) -> None:
    del tensorrt  # must be there before the import
    profiles = importlib.import_module("trimode.build.tensorrt.plan_compilation")._profiles(8, max_step)
    shapes = [sizes.of(["step", "rows"]) for sizes in profiles]
    assert len(shapes) == count
    for (least, fewest), (usual, usual_rows), (most, rows) in shapes:
        assert least <= usual <= most == rows
        assert fewest == 1 <= usual_rows <= rows
    for step in range(1, max_step + 1):
        assert sum(least <= step <= most for (least, _), _, (most, _) in shapes) == 1


@pytest.mark.parametrize(("name", "found"), [("AttendMasked", 15), ("Int4ProductNormedGated", 15)])
def test_a_node_whose_plugin_is_not_found_is_refused(
    emitted: Path, double: TensorrtDouble, tmp_path: Path, name: str, found: int
) -> None:
    double.expanded.add(name)
    with pytest.raises(RuntimeError, match=rf"uses plugins for {found} of 17 plugin nodes of ar/graph\.onnx"):
        tensorrt_compile.compile_engine(emitted, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_more_plugins_take_the_place_of_standard_operators(
    random_int4_checkpoint: Path, double: TensorrtDouble, tmp_path: Path
) -> None:
    """Every operator but those of the results is a plugin, for which TensorRT gets a kernel."""
    options = TensorrtTarget(dtype="fp16", operators="plugins")
    manifest = build_engine(Checkpoint(random_int4_checkpoint), tmp_path / "out", target=options, capacity=512)
    section = manifest.section(TensorrtSection)
    assert section.operators == "plugins"
    assert len(double.plugins) == sum(section.plugins.values())
    used = {name for name, _ in double.plugins}
    assert {"EmbedForNorm", "Rotations", "SelectRows", "DenseProductRowScaled"} <= used


def test_building_with_a_gpu_compiles_the_plans(
    random_int4_checkpoint: Path, double: TensorrtDouble, tmp_path: Path
) -> None:
    options = TensorrtTarget(dtype="fp16")
    manifest = build_engine(Checkpoint(random_int4_checkpoint), tmp_path / "out", target=options, capacity=512)
    section = manifest.section(TensorrtSection)
    assert section.sms == (90,)
    assert section.plans is not None
    assert [len(profiles) for profiles in double.profiles] == [3, 3]


@pytest.mark.usefixtures("double")
def test_an_interrupted_compilation_leaves_nothing(emitted: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage.startswith("diffusion: ") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorrt_compile.compile_engine(emitted, tmp_path / "out", interrupt)
    assert list(tmp_path.iterdir()) == []
    verify_files(emitted, Manifest.read(emitted).files)


@pytest.mark.usefixtures("double")
def test_the_error_for_another_gpu_lists_the_compiled_capabilities(
    emitted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    b200 = H100.model_copy(update={"compute_capability": 100})
    monkeypatch.setattr(tensorrt_compile, "find_gpus", lambda: Gpus("CUDA 13.1", [b200]))
    with pytest.raises(TriModeError, match=r"capabilities 90, and this GPU's is 100; build with --sm 100"):
        tensorrt_compile.compile_engine(emitted, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("double")
def test_a_changed_kernel_is_refused(emitted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(emitted, tmp_path / "copy")
    ptx = next((copy / "kernels/sm_90").glob("QkvProduct*.ptx"))
    ptx.write_text(ptx.read_text().replace(".maxntid", ".reqntid", 1) + "\n")
    with pytest.raises(TriModeError, match=r"QkvProduct.*\.ptx has \d+ bytes, the manifest says"):
        tensorrt_compile.compile_engine(copy, tmp_path / "out")


def test_every_tensorrt_name_in_use_exists(tensorrt: ModuleType) -> None:
    """Some calls cannot be tested here. At least their names exist in TensorRT's bindings."""
    module = importlib.import_module("trimode.build.tensorrt.plan_compilation")
    owners = {
        "trt": tensorrt,
        "builder": importlib.import_module("tensorrt_bindings.tensorrt").Builder,
        "network": tensorrt.INetworkDefinition,
        "parser": importlib.import_module("tensorrt_bindings.tensorrt").OnnxParser,
        "config": tensorrt.IBuilderConfig,
        "profile": tensorrt.IOptimizationProfile,
        "tensor": tensorrt.ITensor,
    }
    used = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id in owners:
            used.add((node.id, *reversed(chain)))
    assert len(used) > 20
    for owner, *names in used:
        found = owners[owner]
        for name in names:
            assert hasattr(found, name), f"{owner}.{'.'.join(names)}"
            found = getattr(found, name)


def test_the_json_of_the_manifest_names_the_target(emitted: Path) -> None:
    written = json.loads((emitted / "manifest.json").read_text())
    assert (written["target"]["name"], written["target"]["plans"]) == ("tensorrt", None)
