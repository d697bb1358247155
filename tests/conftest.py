"""Checkpoints and engines that the tests share; each is made once a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import logging as transformers_logging

from scripts.serving.triton_server import Ports
from tests.support.cpu_share import keep_to_own_share
from tests.support.input_scales import write_input_scales
from tests.support.random_checkpoint import write_random_checkpoint
from tests.support.tritonserver import serving
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint

keep_to_own_share()
# Small matrices are slower with more threads.
torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of the family with a random adapter: shapes and formats, no skill."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The shipped, trained checkpoint."""
    return TINY


@pytest.fixture(scope="session")
def heldout() -> list[dict]:
    """Held-out problems: {"kind", "messages", "answer"}."""
    lines = (ROOT / "tests" / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def random_engine(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random network as an fp32 engine that returns the logits of the complete vocabulary."""
    out = tmp_path_factory.mktemp("engine") / "fp32"
    build_engine(Checkpoint(random_checkpoint), out, top_k=768)
    return out


@pytest.fixture(scope="session")
def random_int4_checkpoint(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "int4"
    quantize_checkpoint(Checkpoint(random_checkpoint), out, method="rtn", head="int4")
    return out


@pytest.fixture(scope="session")
def random_awq_checkpoint(random_int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with input scales, as AWQ writes them."""
    return write_input_scales(random_int4_checkpoint, tmp_path_factory.mktemp("checkpoint") / "awq")


@pytest.fixture(scope="session")
def random_int4_engine(random_int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int4 matrices stay packed although they are small, so that the kernels of large networks run."""
    out = tmp_path_factory.mktemp("engine") / "int4"
    build_engine(
        Checkpoint(random_int4_checkpoint), out, target=CpuTarget(activations="fp32", unpacked_bytes=0), top_k=768
    )
    return out


@pytest.fixture(scope="session")
def random_int8_engine(random_int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with int8 activations, the default of large networks on a CPU; a short context."""
    out = tmp_path_factory.mktemp("engine") / "int8"
    target = CpuTarget(activations="int8", unpacked_bytes=0)
    build_engine(Checkpoint(random_int4_checkpoint), out, target=target, top_k=768, capacity=4096)
    return out


@pytest.fixture(scope="session")
def random_unpacked_engine(random_int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the build's defaults: small int4 matrices are stored as fp32."""
    out = tmp_path_factory.mktemp("engine") / "unpacked"
    build_engine(Checkpoint(random_int4_checkpoint), out, top_k=768)
    return out


@pytest.fixture(scope="session")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """TensorRT's Python bindings over stub libraries. They can declare plugins, but not build engines."""
    from tests.support.tensorrt_stubs import bindings_on_stubs

    yield from bindings_on_stubs(tmp_path_factory.mktemp("stubs"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, rounded to nearest, as an engine: real text in seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    quantize_checkpoint(Checkpoint(tiny_checkpoint), folder / "w4a16", method="rtn", group=64)
    build_engine(Checkpoint(folder / "w4a16"), folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="session")
def triton(tiny_engine: Path) -> Iterator[Ports]:
    """A real tritonserver over the tiny engine, whose model is decoupled, so that it streams."""
    yield from serving(tiny_engine)
