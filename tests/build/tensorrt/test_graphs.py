"""Target tensorrt without a GPU: the emitted files, decoding with its graphs compared with target cpu, and refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support.graph_executor import GraphExecutor
from tests.support.tensorrt_double import one_tactic_each
from trimode import LLM, SamplingParams
from trimode.build.engine_builder import build_engine
from trimode.build.gpu.kernel_network import write_pool_and_kernels
from trimode.build.tensorrt.emission import write_graphs
from trimode.build.tensorrt.target import TensorrtTarget
from trimode.common.errors import TriModeError
from trimode.common.progress import no_progress
from trimode.engine.files import ADAPTER, POOL, verify_files
from trimode.engine.kernel_library import KernelLibrary
from trimode.engine.manifest import Limits, Manifest
from trimode.engine.targets.tensorrt import GRAPH
from trimode.model.checkpoint import Checkpoint
from trimode.plugins.operators import DOMAIN
from trimode.quantize import quantize_checkpoint

ROWS = 512


@pytest.fixture(scope="module")
def tiny_int4(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "int4"
    quantize_checkpoint(Checkpoint(tiny_checkpoint), out, method="rtn", group=64)
    return out


@pytest.fixture(scope="module")
def cpu_engine(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "cpu"
    build_engine(Checkpoint(tiny_int4), out)
    return out


@pytest.fixture(scope="module")
def emitted(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "tensorrt"
    options = TensorrtTarget(sms=(120, 90), dtype="fp16", max_batch=4, max_step=256, emit_only=True)
    with pytest.MonkeyPatch.context() as patch:
        one_tactic_each(patch)
        build_engine(Checkpoint(tiny_int4), out, target=options)
    return out


@pytest.fixture(scope="module")
def llm(cpu_engine: Path) -> Iterator[LLM]:
    """Target cpu, one sequence at a time; every row is computed."""
    with LLM(cpu_engine, max_batch_size=1, prefix_cache_bytes=0) as llm:
        yield llm


def decode(llm: LLM, records: list[dict], **options: Any) -> list[list[int]]:
    blocks = {} if options["mode"] == "ar" else {"block_length": 16}
    params = SamplingParams(max_tokens=48, **blocks, **options)
    return [output.outputs[0].token_ids for output in llm.generate([row["messages"] for row in records], params)]


def test_greedy_decoding_by_the_operator_functions_gives_the_tokens_of_target_cpu(
    tiny_int4: Path, llm: LLM, cpu_engine: Path, heldout: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of the target in fp32, in every mode, with prefills of more than one chunk and with the adapter."""
    checkpoint, records, modes = Checkpoint(tiny_int4), heldout[::90], ("ar", "diffusion", "linear_spec")
    expected = [decode(llm, records, mode=mode) for mode in modes]
    assert checkpoint.adapter is not None
    limits = Limits(capacity=ROWS, prefill_step=256, top_k=64, max_batch=1, max_step=256)
    network = write_pool_and_kernels(checkpoint, tmp_path, "tensorrt", "fp32", (), limits, no_progress)
    write_graphs(network, tmp_path, "standard", no_progress)
    pool = network.pool.entries()
    graphs = GraphExecutor(tmp_path, pool, tmp_path / POOL, cpu_engine / ADAPTER, checkpoint.config, ROWS, np.float32)
    monkeypatch.setattr(llm._executor, "run", graphs.run)
    assert [decode(llm, records, mode=mode) for mode in modes] == expected
    assert {type(step).__name__ for step in graphs.seen} == {"CausalStep", "BidirectionalStep"}


def test_the_emitted_16_bit_graphs_decode(
    emitted: Path, llm: LLM, heldout: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that TensorRT compiles. In fp16 a near-tie may be decided differently: most answers must be equal."""
    manifest, records = Manifest.read(emitted), heldout[5::70]
    expected = decode(llm, records, mode="linear_spec")
    capacity = manifest.limits.capacity
    graphs = GraphExecutor(
        emitted, manifest.pool, emitted / POOL, emitted / ADAPTER, manifest.model, capacity, np.float16
    )
    monkeypatch.setattr(llm._executor, "run", graphs.run)
    found = decode(llm, records, mode="linear_spec")
    assert sum(answer == other for answer, other in zip(found, expected, strict=True)) >= len(records) - 1


def test_both_graphs_read_weights_from_the_one_pool_and_contain_none(emitted: Path) -> None:
    manifest = Manifest.read(emitted)
    verify_files(emitted, manifest.files)
    pooled = {entry.name: entry.bytes for entry in manifest.pool}
    taken = []
    for name in ("ar", "diffusion"):
        graph = onnx.load(emitted / name / GRAPH).graph
        sizes = {value.name: _bytes(value) for value in graph.input if value.name in pooled}
        assert sizes == pooled
        taken.append([value.SerializeToString() for value in graph.input if value.name in pooled])
        # The largest constant left is the mask token's row of the logits.
        assert max(len(tensor.SerializeToString()) for tensor in graph.initializer) < 4 * 768 + 64
        domains = [node.op_type for node in graph.node if node.domain == DOMAIN]
        assert domains.count("QkvProductNormed") == _attentions(domains) == manifest.model.num_hidden_layers
        # The 16-bit head, and in drafts the adapter's first half.
        products = [node.op_type for node in graph.node].count("MatMul")
        assert products == 1 + (manifest.model.num_hidden_layers if name == "diffusion" else 0)
    assert taken[0] == taken[1]


def _attentions(operators: list[str]) -> int:
    return sum(name in {"AttendMasked", "AttendBidirectional"} for name in operators)


def _bytes(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type
    item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return item * int(np.prod([dim.dim_value for dim in kind.shape.dim]))


def test_kernels_are_emitted_for_every_named_gpu(emitted: Path) -> None:
    first, second = (KernelLibrary(emitted / "kernels", sm) for sm in (90, 120))
    assert first.index.kernels.keys() == second.index.kernels.keys()
    for sm, library in ((90, first), (120, second)):
        for name, kernel in library.index.kernels.items():
            ptx = (emitted / f"kernels/sm_{sm}/{name}.ptx").read_text()
            assert f".entry {kernel.entry}(" in ptx
            assert f".target sm_{sm}" in ptx


def test_tensorrts_parser_accepts_the_graphs(emitted: Path) -> None:
    """TensorRT-RTX has the same parser, without plugins: it expands the functions and rejects unknown nodes."""
    log, parse = _rtx_parser()
    for name in ("ar", "diffusion"):
        network = parse((emitted / name / GRAPH).read_bytes())
        assert not [line for line in log if "nused" in line or "not supported" in line]
        tensor = network.get_input(0)
        assert (tensor.name, [tensor.get_dimension_name(axis) for axis in (0, 1)]) == ("input_ids", ["batch", "step"])


def test_the_parser_searches_a_plugin_for_a_node_without_a_function(emitted: Path) -> None:
    model = onnx.load(emitted / "ar" / GRAPH)
    del model.functions[:]
    _, parse = _rtx_parser()
    with pytest.raises(ValueError, match="Plugin not found, are the plugin name, version, and namespace correct"):
        parse(model.SerializeToString())


def _rtx_parser() -> tuple[list[str], Callable[[bytes], Any]]:
    from trimode.build.rtx.plan_building import trt

    lines: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                lines.append(message)

    builder = trt.Builder(Log())

    def parse(graph: bytes) -> Any:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, Log())
        if not parser.parse(graph):
            raise ValueError(parser.get_error(0).desc())
        return network

    return lines, parse


def trimode(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from trimode.cli.main import main; main()"]
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_info_shows_an_engine_that_is_not_compiled_and_generate_refuses_it(emitted: Path) -> None:
    shown = " ".join(trimode("info", emitted).stdout.split())
    assert "target tensorrt" in shown
    assert "TensorRT, not compiled yet; 16-bit products by standard operators; kernels for compute cap" in shown
    assert "top 4 logits, batch up to 4, step up to 256" in shown
    declined = trimode("generate", emitted, "--prompt", "hello")
    assert (declined.returncode, declined.stderr.count("\n")) == (2, 1)
    assert f"has no plans yet; on the machine with the GPU, run: trimode compile {emitted}" in declined.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("the package tensorrt", "an NVIDIA GPU", "or give --emit-only")),
        (("--emit-only", "--sm", "75"), ("--sm 75: kernels are compiled for 80, 86, 89, 90, 100, 120, 121",)),
        (("--emit-only", "--activations", "int8"), ("--activations is not an option of target tensorrt",)),
    ],
)
def test_a_refused_build_prints_one_line(
    tiny_int4: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    found = trimode("build", tiny_int4, tmp_path / "out", "--target", "tensorrt", *arguments)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert all(word in found.stderr for word in words)
    assert list(tmp_path.iterdir()) == []


def test_groups_that_tensor_cores_cannot_process_are_refused(
    random_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(random_int4_checkpoint)
    assert checkpoint.quantization is not None
    monkeypatch.setattr(checkpoint, "quantization", checkpoint.quantization.model_copy(update={"group_size": 24}))
    with pytest.raises(TriModeError, match="int4 in groups of 24; target tensorrt takes multiples of 16"):
        build_engine(checkpoint, tmp_path / "out", target=TensorrtTarget(sms=(90,), emit_only=True))
    assert list(tmp_path.iterdir()) == []


def test_the_error_without_triton_names_the_remedy(
    random_int4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plugins.compilation", "build.gpu.kernel_emission", "build.gpu.kernel_network"):
        monkeypatch.delitem(sys.modules, f"trimode.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    options = TensorrtTarget(sms=(90,), emit_only=True)
    with pytest.raises(TriModeError, match=r"the package triton is not installed: pip install 'trimode\[build\]'"):
        build_engine(Checkpoint(random_int4_checkpoint), tmp_path / "out", target=options)
    assert list(tmp_path.iterdir()) == []


def test_compile_names_what_is_missing_and_which_engines_it_accepts(
    emitted: Path, cpu_engine: Path, tmp_path: Path
) -> None:
    for folder, words in (
        (emitted, "needs the package tensorrt"),
        (cpu_engine, "is for target cpu, which has no second"),
    ):
        found = trimode("compile", folder, tmp_path / "out")
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)
        assert words in found.stderr
    other = trimode("build", cpu_engine, tmp_path / "out", "--emit-only")
    assert "--emit-only is not an option of target cpu" in other.stderr
    assert list(tmp_path.iterdir()) == []


def test_compilation_needs_neither_torch_nor_triton_nor_onnx() -> None:
    """All modules that `trimode compile` imports, except the two that import TensorRT."""
    modules = (
        *("cli.compile", "build.tensorrt.compiled_directory", "build.gpu.plan_builder"),
        *("plugins.operators", "engine.kernel_library"),
    )
    imports = "".join(f"import trimode.{module}\n" for module in modules)
    program = f"import sys\n{imports}print(sorted({{'torch', 'triton', 'onnx'}} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
