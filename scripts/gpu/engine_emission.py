"""Engines of target ``cuda`` for the check on a GPU, written on any machine.

```
engines/tiny-bf16     the shipped checkpoint, quantised to int4
engines/tiny-fp32     the same in fp32
engines/8b            an engine of the 8B checkpoint's sizes without its weights, which the check draws on the GPU
expected.json.gz      prompts, and the tokens of target cpu with the candidates that they were chosen from
site/                 Python packages that the GPU's machine lacks
```
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.gpu.pool_layout import pool_layout
from scripts.gpu.random_w4a16_checkpoint import GROUP, RANK, config_fields
from scripts.gpu.random_weights import TIMED
from scripts.gpu.token_check import RANKED, Answer, Setting, write_expected
from trimode.build.cpu.target import CpuTarget
from trimode.build.cuda.emission import write_launches
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.gpu.kernel_network import KernelNetwork, write_network_kernels
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
from trimode.quantize.quantizing import Method
from trimode.runtime.api.llm import EngineLLM

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "tiny"
HELD_OUT = ROOT / "tests" / "data" / "heldout.jsonl"
_MIB = 1 << 20
# Of the GPU's machine: its Python, and its C library's minor version, 35 for glibc 2.35.
PYTHON, GLIBC_MINOR = "3.12", 35
# Packages that the GPU's machine must have, with those that they require.
PRESENT = ("torch", "numpy", "ml-dtypes", "transformers", "triton", "cuda-bindings")
# Packages that are brought along. The kernel tests' random cases, and so the kernels that they launch, depend on the
# version of hypothesis, so all have the versions of this machine.
ADDED = ("pydantic", "llguidance", "psutil", "rich", "hypothesis", "pytest")

# What settings with a form answer.
FORM = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 24}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}

# Of pygments, which has 4 MB of lexers: those that pytest imports.
_LEXERS = ("__init__", "_mapping", "diff", "python")


@dataclass(frozen=True)
class EmittedSizes:
    """What the engines are compared and timed with.

    method: quantises the compared checkpoint. max_tokens, block: of an answer, and of a block of ``linear_spec`` and
    ``diffusion``. few_prompts: answered in settings other than the three modes. capacity, max_batch, max_step: of the
    compared engines. shape, layers, vocabulary: of the engine without weights, whose limits are ``timed``; None for
    those of the shape.
    """

    method: Method = "awq"
    max_tokens: int = 64
    block: int = 16
    few_prompts: int = 40
    capacity: int = 512
    max_batch: int = 8
    max_step: int = 64
    shape: str = "8b"
    layers: int | None = None
    vocabulary: int | None = None
    timed: Limits = field(
        default_factory=lambda: Limits(capacity=4096, prefill_step=256, top_k=4, max_batch=16, max_step=256)
    )

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Each mode with all prompts, and what else changes the passes of a request with the first few prompts."""
        few, blocks = self.few_prompts, {"block_length": self.block}
        speculation = {"mode": "linear_spec", **blocks}
        # A tree of twice the block.
        tree = {**speculation, "tree_width": 2 * self.block}
        form = {"guided_decoding": {"json": FORM}}
        rules = {"frequency_penalty": 0.3, "bad": ["the"]}
        sampled = {"temperature": 0.8, "top_k": RANKED, "seed": 7}
        return (
            Setting("ar", {"mode": "ar"}),
            Setting("linear_spec", speculation, repeats="ar"),
            Setting("diffusion", {"mode": "diffusion", **blocks}),
            Setting("auto", {"mode": "auto", **blocks}, few, "ar"),
            Setting("trees", tree, few, "ar"),
            Setting("refined drafts", {**speculation, "draft_threshold": 0.9}, few, "ar"),
            Setting("copies", {**speculation, "lookup": True}, few, "ar"),
            Setting("drafts without adapter", {**speculation, "adapter": False}, few, "ar"),
            Setting("sampled ar", {"mode": "ar", **sampled}, few),
            Setting("sampled linear_spec", {**speculation, **sampled}, few),
            Setting("sampled trees", {**tree, **sampled}, few),
            Setting("JSON, ar", {"mode": "ar", **form}, few),
            Setting("JSON, linear_spec", {**speculation, **form}, few, "JSON, ar"),
            Setting("JSON, trees", {**tree, **form}, few, "JSON, ar"),
            Setting("rules, ar", {"mode": "ar", **rules}, few),
            Setting("rules, linear_spec", {**speculation, **rules}, few, "rules, ar"),
            Setting("rules, trees", {**tree, **rules}, few, "rules, ar"),
        )


def held_out(prompts: int) -> list[Any]:
    """Held-out prompts, as messages."""
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    return [record["messages"] for record in records[:: max(1, len(records) // prompts)][:prompts]]


def emit_engines(
    folder: Path, sm: int, prompts: list[Any], checkpoint: Path = TINY, sizes: EmittedSizes | None = None
) -> None:
    """sm: compute capability of the GPU, 90 for 9.0. prompts: what target cpu answers with ``checkpoint``."""
    sizes = sizes or EmittedSizes()
    limits = {"capacity": sizes.capacity, "top_k": RANKED, "prefill_step": sizes.max_step}
    with tempfile.TemporaryDirectory() as scratch:
        int4 = Path(scratch, "int4")
        quantize_checkpoint(Checkpoint(checkpoint), int4, method=sizes.method, group=64)
        for real in ("bf16", "fp32"):
            target = CudaTarget(sms=(sm,), dtype=real, max_batch=sizes.max_batch, max_step=sizes.max_step)
            build_engine(Checkpoint(int4), folder / "engines" / f"tiny-{real}", target=target, **limits)
        exact = CpuTarget(activations="fp32")
        build_engine(Checkpoint(int4), Path(scratch, "cpu"), target=exact, **limits)
        write_expected(folder, _expected(Path(scratch, "cpu"), prompts, sizes))
    emit_timed_engine(folder, sm, sizes)


def emit_timed_engine(folder: Path, sm: int, sizes: EmittedSizes) -> None:
    """The engine without weights."""
    config = ModelConfig.model_validate(config_fields(sizes.shape, sizes.layers, sizes.vocabulary))
    write_engine_without_weights(sizes.shape, config, folder / "engines" / TIMED, "bf16", (sm,), sizes.timed)


def _expected(engine: Path, prompts: list[Any], sizes: EmittedSizes) -> dict[str, Any]:
    """Prompts, and the answers of each setting."""
    answers = {}
    with EngineLLM(engine, measure_passes=False) as llm:
        for setting in sizes.settings:
            outputs = llm.generate(prompts[: setting.prompts], setting.params(sizes.max_tokens, logprobs=RANKED))
            answers[setting.name] = [Answer.of(output.outputs[0]).stored() for output in outputs]
    return {"settings": sizes.settings, "max_tokens": sizes.max_tokens, "prompts": prompts, "answers": answers}


def write_engine_without_weights(
    shape: str, config: ModelConfig, folder: Path, real: Real, sms: tuple[int, ...], limits: Limits
) -> None:
    """An engine directory of a published shape. Its pool and adapter are missing, so it is not checked at load.

    ``constants.npz`` holds the constants that are not random.
    """
    pool = pool_layout(config, real, GROUP)
    folder.mkdir(parents=True)
    network = KernelNetwork(config, pool, RANK, real, limits)
    write_network_kernels([network], folder, sms, no_progress)
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


def write_packages(folder: Path, further: Iterable[str] = ()) -> None:
    """Unpack :data:`ADDED`, ``further`` packages and what they require into ``folder`` for the GPU's machine: all but
    numpy, and the hub's client, which tokenizers imports for downloads only.
    """
    # pip installs no wheel for an older C library than one that is named.
    libraries = ["2014", *(f"_2_{minor}" for minor in range(17, GLIBC_MINOR + 1))]
    platforms = [f"--platform=manylinux{library}_x86_64" for library in libraries]
    wheels = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *platforms]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", *wheels]
    pinned = [
        f"{name}=={version(name)}"
        for name in sorted(required((*ADDED, *further), without={"numpy", "huggingface-hub"}))
    ]
    subprocess.run([*command, "--target", folder, *pinned], check=True)
    for lexer in (folder / "pygments" / "lexers").glob("*.py"):
        if lexer.stem not in _LEXERS:
            lexer.unlink()


def remove_ptx(folder: Path, kept: Collection[str] = ()) -> None:
    """Of kernels that are only loaded from their binaries, except those of the operators ``kept``."""
    for path in folder.rglob("*.ptx"):
        if path.name.partition(".")[0] not in kept:
            path.unlink()


def remove_engine_ptx(engine: Path) -> None:
    """As :func:`remove_ptx`, for an engine whose files are checked when it is loaded."""
    remove_ptx(engine)
    manifest = Manifest.read(engine)
    files = tuple(entry for entry in manifest.files if (engine / entry.path).exists())
    manifest.model_copy(update={"files": files}).write(engine)


def refuse_large(folder: Path, limit: int) -> None:
    """Print the size of what was emitted. Raises SystemExit if it exceeds ``limit`` MiB."""
    sizes: dict[str, int] = defaultdict(int)
    for path in folder.rglob("*"):
        if path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {size / _MIB:.1f}" for name, size in sorted(sizes.items()))
    print(f"{folder}: {total / _MIB:.1f} MiB ({parts}); the limit is {limit} MiB", flush=True)
    if total > limit * _MIB:
        raise SystemExit(f"{folder} exceeds the limit of {limit} MiB; emit fewer prompts, or raise it with --most-mib")


def required(packages: Iterable[str], without: Collection[str] = ()) -> set[str]:
    """The packages and all that they require on the GPU's machine, as far as they are installed here. without: packages
    that are left out, with what only they require.
    """
    found: set[str] = set()
    remaining = [canonicalize_name(name) for name in packages]
    while remaining:
        name = remaining.pop()
        if name in without:
            continue
        try:
            requirements = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        if name not in found:
            found.add(name)
            parsed = map(Requirement, requirements)
            environment = {"extra": "", "python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
            remaining += [
                canonicalize_name(each.name)
                for each in parsed
                if each.marker is None or each.marker.evaluate(environment)
            ]
    return found
