"""Engines of target ``cuda`` for the check on a GPU, written on any machine.

```
engines/tiny-bf16     the shipped checkpoint, quantised to int4
engines/tiny-fp32     the same in fp32
engines/8b            an engine of the 8B checkpoint's sizes without its weights, which the check draws on the GPU
expected.json         prompts, and the tokens of target cpu
site/                 Python packages that the GPU's machine lacks
```
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu.pool_layout import pool_layout
from scripts.gpu.random_w4a16_checkpoint import GROUP, RANK, config_fields
from trimode import LLM, SamplingParams
from trimode.build.cpu.target import CpuTarget
from trimode.build.cuda.emission import write_launches
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.kernel_network import KernelNetwork, write_network_kernels
from trimode.common.progress import no_progress
from trimode.common.version import __version__
from trimode.engine.files import ADAPTER, MANIFEST, POOL, TOKENIZER, EngineFile
from trimode.engine.manifest import FORMAT_VERSION, AdapterEntry, Limits, Manifest
from trimode.engine.precision import Precision, Real
from trimode.engine.targets.cuda import CudaSection
from trimode.model.checkpoint import Checkpoint, linear_shapes
from trimode.model.config import ModelConfig
from trimode.model.rope import query_scales, yarn_frequencies
from trimode.quantize import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "tiny"
HELD_OUT = ROOT / "tests" / "data" / "heldout.jsonl"
# Imported by the runtime, and not part of images for PyTorch.
PACKAGES = ("pydantic>=2.10,<3",)
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "diffusion", "block_length": 16},
)
MAX_TOKENS = 64
TINY_LIMITS = {"capacity": 512, "top_k": 4, "prefill_step": 64}
LIMITS_8B = Limits(capacity=4096, prefill_step=256, top_k=4, max_batch=16, max_step=256)


def emit_engines(folder: Path, sm: int, prompts: int) -> None:
    """sm: compute capability of the GPU, 90 for 9.0. prompts: how many to answer with target cpu."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch, "int4")
        quantize_checkpoint(Checkpoint(TINY), checkpoint, method="awq", group=64)
        for real in ("bf16", "fp32"):
            target = CudaTarget(sms=(sm,), dtype=real, max_batch=8, max_step=64)
            build_engine(Checkpoint(checkpoint), folder / "engines" / f"tiny-{real}", target=target, **TINY_LIMITS)
        exact = CpuTarget(activations="fp32")
        build_engine(Checkpoint(checkpoint), Path(scratch, "cpu"), target=exact, **TINY_LIMITS)
        (folder / "expected.json").write_text(json.dumps(_expected(Path(scratch, "cpu"), prompts)))
    write_engine_without_weights("8b", folder / "engines" / "8b", "bf16", (sm,), LIMITS_8B)


def _expected(engine: Path, prompts: int) -> dict[str, Any]:
    """Prompts, and the tokens of each mode."""
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    messages = [record["messages"] for record in records[:: max(1, len(records) // prompts)][:prompts]]
    with LLM(engine) as llm:
        tokens = {
            str(options["mode"]): [
                output.outputs[0].token_ids
                for output in llm.generate(messages, SamplingParams(max_tokens=MAX_TOKENS, **options))
            ]
            for options in MODES
        }
    return {"modes": MODES, "max_tokens": MAX_TOKENS, "messages": messages, "tokens": tokens}


def write_engine_without_weights(shape: str, folder: Path, real: Real, sms: tuple[int, ...], limits: Limits) -> None:
    """An engine directory of a published shape. Its pool and adapter are missing, so it is not checked at load.

    ``constants.npz`` holds the constants that are not random.
    """
    config = ModelConfig.model_validate(config_fields(shape, None, None))
    pool = pool_layout(config, real, GROUP)
    folder.mkdir(parents=True)
    network = KernelNetwork(config, pool, RANK, real, limits)
    write_network_kernels(network, folder, sms, no_progress)
    write_launches(network, folder, no_progress)
    frequencies, factor = yarn_frequencies(config)
    np.savez(
        folder / "constants.npz",
        rotary_frequencies=frequencies.astype(np.float32),
        key_scale=np.array([factor], np.float32),
        query_scales=(query_scales(config) * factor).astype(np.float32),
        rms_norm_epsilon=np.array([config.rms_norm_eps], np.float32),
    )
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    files = sorted(written | {POOL, ADAPTER, f"{TOKENIZER}/tokenizer.json"})
    Manifest(
        format_version=FORMAT_VERSION,
        target=CudaSection(sms=sms),
        source=f"random weights of the {shape} shape",
        quantization="W4A16",
        model=config,
        precision=Precision(
            matrices=dict.fromkeys(linear_shapes(config), "int4"),
            embedding=real,
            activations=real,
            kv_cache=real,
            group=GROUP,
        ),
        limits=limits,
        adapter=AdapterEntry(rank=RANK, scale=1.0),
        parameters=1,
        tools={"trimode": __version__, "python": platform.python_version()},
        pool=pool.entries(),
        files=tuple(EngineFile(path=path, bytes=0, sha256="0" * 64) for path in files if path != MANIFEST),
    ).write(folder)


def write_packages(folder: Path, python: str = "3.12", packages: Sequence[str] = PACKAGES) -> None:
    """Unpack packages, and what they require, for a machine of ``python`` on x86-64 into ``folder``."""
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_17", "2014")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--implementation=cp"]
    subprocess.run([*command, f"--python-version={python}", *platforms, "--target", folder, *packages], check=True)
