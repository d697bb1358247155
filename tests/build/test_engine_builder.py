"""A build writes a complete engine directory or none, and the manifest describes it."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.support.input_scales import write_input_scales
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.cpu import optimised_graphs as cpu
from trimode.build.cpu.prepacked_pool import data_file
from trimode.build.cpu.target import CpuTarget
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.common.errors import TriModeError
from trimode.engine.files import ADAPTER, hash_file, rank_folder
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cpu import Activations, CpuSection
from trimode.model.checkpoint import Checkpoint, linear_shapes
from trimode.model.step import adapter_inputs
from trimode.quantize import quantize_checkpoint


def test_the_manifest_describes_every_file(random_int4_engine: Path) -> None:
    manifest = Manifest.read(random_int4_engine)
    on_disk = {
        path.relative_to(random_int4_engine).as_posix() for path in random_int4_engine.rglob("*") if path.is_file()
    }
    assert {entry.path for entry in manifest.files} == on_disk - {"manifest.json"}
    for entry in manifest.files:
        path = random_int4_engine / entry.path
        assert (path.stat().st_size, hash_file(path)) == (entry.bytes, entry.sha256)
    assert set(manifest.precision.matrices.values()) == {"int4"}
    assert manifest.precision.embedding == "bf16"


def test_the_ranges_of_the_pool_do_not_overlap_and_lie_in_the_file(random_int4_engine: Path) -> None:
    manifest = Manifest.read(random_int4_engine)
    ranges = []
    for entry in manifest.pool:
        ranges.append((entry.offset, entry.bytes))
        if entry.packed_offset is not None:
            ranges.append((entry.packed_offset, entry.packed_bytes))
    ranges.sort()
    for (offset, length), (following, _) in pairwise(ranges):
        assert offset + length <= following
    assert sum(ranges[-1]) <= (random_int4_engine / "weights/pool.bin").stat().st_size


def test_both_graphs_name_the_same_ranges_of_the_one_pool(random_int4_engine: Path) -> None:
    tables = []
    for name in ("ar", "diffusion"):
        graph = onnx.load(random_int4_engine / name / "model.onnx", load_external_data=False).graph
        tables.append(
            {
                tensor.name: sorted((item.key, item.value) for item in tensor.external_data)
                for tensor in graph.initializer
                if tensor.external_data
            }
        )
    assert tables[0] == tables[1]
    assert all(("location", "pool.bin") in fields for fields in tables[0].values())


def test_every_matrix_is_an_int4_product_and_the_embedding_stays_16_bit(random_int4_engine: Path) -> None:
    for name in ("ar", "diffusion"):
        graph = onnx.load(random_int4_engine / name / "model.onnx", load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        # Four matrices a layer and the head; q, k, v and gate, up are merged.
        assert kinds.count("MatMulNBits") == 2 * 4 + 1
        assert kinds.count("MatMul") == (0 if name == "ar" else 2 * 2)  # the adapter's
        assert "DequantizeLinear" not in kinds
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        assert types["encoder.embed_tokens"] == onnx.TensorProto.BFLOAT16


def test_int4_matrices_that_fit_a_cache_are_unpacked(random_int4_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(random_int4_checkpoint)
    as_fp32 = 4 * sum(rows * columns for rows, columns in linear_shapes(checkpoint.config).values())
    for limit, unpacked in ((as_fp32, True), (as_fp32 - 1, False)):
        out = tmp_path / str(limit)
        manifest = build_engine(checkpoint, out, target=CpuTarget(unpacked_bytes=limit))
        section = manifest.section(CpuSection)
        assert (section.unpacked, section.activations) == (unpacked, "fp32" if unpacked else "int8")
        assert set(manifest.precision.matrices.values()) == {"int4"}
        graph = onnx.load(out / "ar/model.onnx", load_external_data=False).graph
        assert ("MatMulNBits" in {node.op_type for node in graph.node}) == (not unpacked)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("stage", ["weights", "graphs", "hashes"])
def test_a_build_that_ends_early_leaves_nothing(
    random_checkpoint: Path, tmp_path: Path, error: BaseException, stage: str
) -> None:
    def fail_in_the_middle(at: str, done: int, _total: int) -> None:
        if at == stage and done:
            raise error

    out = tmp_path / "engine"
    expected = TriModeError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        build_engine(Checkpoint(random_checkpoint), out, progress=fail_in_the_middle)
    assert leftovers(tmp_path) == []
    if expected is TriModeError:
        assert "disk is full" in str(caught.value)


@pytest.mark.parametrize("megabytes", [0.5, 3.0])
def test_a_full_disk_prints_one_line(random_checkpoint: Path, tmp_path: Path, megabytes: float) -> None:
    """Real write errors: of TriMode's own file, and of the larger file that ONNX Runtime writes."""
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({int(megabytes * 1e6)}, resource.RLIM_INFINITY))\n"
        "from trimode.cli.main import main\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "build", str(random_checkpoint), str(tmp_path / "engine")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "the disk is full" in result.stderr
    assert result.stderr.count("\n") == 1
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("activations", "level"), [("int8", 4), ("fp32", 1)])
def test_activations_choose_the_kernels_of_int4_products(
    random_int4_checkpoint: Path, tmp_path: Path, activations: Activations, level: int
) -> None:
    target = CpuTarget(activations=activations, unpacked_bytes=0)
    manifest = build_engine(Checkpoint(random_int4_checkpoint), tmp_path / "engine", target=target)
    assert manifest.section(CpuSection).activations == activations
    graph = onnx.load(tmp_path / "engine/ar/model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    levels = {attribute.i for node in products for attribute in node.attribute if attribute.name == "accuracy_level"}
    assert levels == {level}


def test_an_engine_without_int4_weights_is_exact(random_checkpoint: Path, tmp_path: Path) -> None:
    manifest = build_engine(Checkpoint(random_checkpoint), tmp_path / "engine")
    assert manifest.section(CpuSection).activations == "fp32"
    assert "exact products" in manifest.target.summary


def test_an_existing_folder_is_not_changed(random_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(TriModeError, match="exists already"):
        build_engine(Checkpoint(random_checkpoint), out)
    assert leftovers(out) == ["mine.txt"]


def test_a_capacity_beyond_that_of_the_model_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match="capacity 9000 exceeds the model's max_position_embeddings 8192"):
        build_engine(Checkpoint(random_checkpoint), tmp_path / "engine", capacity=9000)


def test_engines_whose_constants_differ_are_not_merged(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight differs in the file of one graph."""

    optimise = cpu._optimise

    def spoil(source: Path, result: Path, activations: Any) -> None:
        optimise(source, result, activations)
        if result.parent.name == "diffusion":
            pool = data_file(result)
            data = bytearray(pool.read_bytes())
            data[len(data) // 2] ^= 1
            pool.write_bytes(data)

    monkeypatch.setattr(cpu, "_optimise", spoil)
    with pytest.raises(RuntimeError, match=r"the engines' constant .* differs"):
        build_engine(Checkpoint(random_checkpoint), tmp_path / "engine")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_adapter_reads_what_attention_writes(random_checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    """With kernels of our own, that includes o's input scale, by which the rows of the adapter's first matrix are
    divided: on each rank, those of its heads.
    """
    quantize_checkpoint(Checkpoint(random_checkpoint), tmp_path / "int4", method="rtn", group=64)
    checkpoint = Checkpoint(write_input_scales(tmp_path / "int4", tmp_path / "awq"))
    with pytest.MonkeyPatch.context() as patch:
        UncompiledKernels(patch)
        build_engine(checkpoint, tmp_path / "cuda", target=CudaTarget(sms=(90,), tp=ranks), capacity=64, top_k=4)
    build_engine(checkpoint, tmp_path / "cpu", capacity=64)
    plain = load_file(tmp_path / "cpu" / ADAPTER)
    parts = [load_file(tmp_path / "cuda" / rank_folder(rank, ranks) / ADAPTER) for rank in range(ranks)]
    for layer in range(checkpoint.config.num_hidden_layers):
        down, up = adapter_inputs(layer)
        scale = checkpoint.input_scale(f"encoder.layers.{layer}.self_attn.o_proj")
        assert scale is not None
        found = np.concatenate([part[down] for part in parts])
        np.testing.assert_array_equal(found, plain[down] / scale[:, None])
        assert all(np.array_equal(part[up], plain[up]) for part in parts)


def test_an_adapter_whose_input_would_be_zero_is_refused(
    random_awq_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    UncompiledKernels(monkeypatch)
    input_scale = Checkpoint.input_scale

    def with_a_zero(checkpoint: Checkpoint, module: str) -> NDArray[np.float32] | None:
        scale = input_scale(checkpoint, module)
        return scale if scale is None else np.where(np.arange(len(scale)) == 3, np.float32(0), scale)

    monkeypatch.setattr(Checkpoint, "input_scale", with_a_zero)
    checkpoint = Checkpoint(random_awq_checkpoint)
    with pytest.raises(TriModeError, match=r"layers\.0\.self_attn\.o_proj\.pre_quant_scale has zeros, so the draft"):
        build_engine(checkpoint, tmp_path / "cuda", target=CudaTarget(sms=(90,)), capacity=64, top_k=4)
    assert leftovers(tmp_path) == []
    build_engine(checkpoint, tmp_path / "cpu", capacity=64)


def test_the_engine_of_a_checkpoint_without_an_adapter_has_none(random_checkpoint: Path, tmp_path: Path) -> None:

    plain = Path(shutil.copytree(random_checkpoint, tmp_path / "plain"))
    shutil.rmtree(plain / "linear_spec_lora")
    manifest = build_engine(Checkpoint(plain), tmp_path / "engine")
    assert manifest.adapter is None
    graph = onnx.load(tmp_path / "engine/diffusion/model.onnx", load_external_data=False).graph
    assert not [value.name for value in graph.input if "adapter" in value.name]
    assert ADAPTER not in {entry.path for entry in manifest.files}
