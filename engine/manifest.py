"""The engine directory: the contract between the builder and the runtime.

```
manifest.json        this record
ar/, diffusion/      target cpu: model.onnx; target rtx: engine.plan, a TensorRT-RTX plan without its weights,
                     graph.onnx, what it was compiled from, and layers.json, the kernels it became;
                     target tensorrt: graph.onnx, and once compiled engine.plan and builder.log
kernels/             target tensorrt: the plugins' kernels as PTX, for each compute capability
weights/pool.bin     every constant of the network once, loaded by both engines
weights/adapter.safetensors   the draft adapter, if the checkpoint has one: the diffusion engine's inputs
tokenizer/           the checkpoint's tokenizer files
```
A directory is written under another name and renamed when whole; loading checks every file against its size and hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from trimode.common.errors import TriModeError
from trimode.common.progress import Progress, no_progress
from trimode.common.records import read_json_record
from trimode.model.config import ModelConfig

Activations = Literal["fp32", "int8"]
Real = Literal["fp32", "fp16", "bf16"]
Target = Literal["cpu", "rtx", "tensorrt"]
NUMPY_TYPES: dict[Real, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
# What TensorRT-RTX compiles for, 121 being 12.1.
RTX_COMPUTE_CAPABILITIES = (75, 80, 86, 89, 120, 121)
PLAN, GRAPH, KERNELS = "engine.plan", "graph.onnx", "layers.json"
BUILDER_LOG, PLUGIN_KERNELS = "builder.log", "kernels"
ENGINE_FILES: dict[Target, tuple[str, ...]] = {
    "cpu": ("model.onnx",),
    "rtx": (PLAN, GRAPH, KERNELS),
    "tensorrt": (GRAPH,),
}

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
POOL = "weights/pool.bin"
ADAPTER = "weights/adapter.safetensors"
TOKENIZER = "tokenizer"


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or PurePosixPath(path).is_absolute():
        raise ValueError("the path leaves the engine directory")
    return path


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineFile(_Record):
    path: Annotated[str, AfterValidator(_inside)]
    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PoolEntry(_Record):
    """A constant of the pool; ``packed`` are the bytes of its kernel-ready copy, where the target keeps one."""

    name: str
    offset: NonNegativeInt
    bytes: NonNegativeInt
    packed_offset: NonNegativeInt | None = None
    packed_bytes: NonNegativeInt = 0


class Precision(_Record):
    """Types as stored and computed: ``int4`` weights carry scales, of the KV pool's type, by ``group`` inputs.

    ``activations``: ``int8`` means that the inputs of int4 products are rounded to 8 bits, all else being fp32.
    ``unpacked``: int4 matrices lie in the pool as fp32, multiplied by their scales.
    """

    linear: Literal["int4"] | Real
    head: Literal["int4"] | Real
    embedding: Real
    activations: Literal["int8"] | Real
    kv_cache: Real
    group: PositiveInt | None
    unpacked: bool


class Limits(_Record):
    """``capacity``: longest sequence in tokens. ``prefill_step``: tokens of a prefill pass. ``top_k``: candidates a
    row.
    """

    capacity: PositiveInt
    prefill_step: PositiveInt
    top_k: PositiveInt


class AdapterEntry(_Record):
    rank: PositiveInt
    scale: float


class Splice(_Record):
    """Bytes of the pool that belong before byte ``plan_offset`` of ``engine.plan``."""

    plan_offset: NonNegativeInt
    pool_offset: NonNegativeInt
    bytes: PositiveInt


class PlanEntry(_Record):
    """A plan whose weights lie in the pool. ``private_bytes``: what it has beside them, the file's own length."""

    splices: tuple[Splice, ...]
    private_bytes: NonNegativeInt


class RtxEntry(_Record):
    """What the plans were compiled for; ``sms`` are compute capabilities, 121 for 12.1; ``max_step`` in tokens."""

    tensorrt_rtx: str
    sms: tuple[PositiveInt, ...]
    max_batch: PositiveInt
    max_step: PositiveInt
    ar: PlanEntry
    diffusion: PlanEntry


class TensorrtPlans(_Record):
    """``gpu``: where TensorRT built the plans, and so what they run on."""

    tensorrt: str
    gpu: str
    compute_capability: PositiveInt


class TensorrtEntry(_Record):
    """``sms``: compute capabilities that the plugins' kernels were compiled for. ``plugins``: how many nodes of each
    engine's graph are plugins. ``plans``: None before ``trimode compile``.
    """

    sms: tuple[PositiveInt, ...]
    max_batch: PositiveInt
    max_step: PositiveInt
    plugins: dict[str, PositiveInt]
    plans: TensorrtPlans | None


class Manifest(_Record):
    format_version: Literal[2]
    target: Target
    source: str
    quantization: str
    model: ModelConfig
    precision: Precision
    limits: Limits
    adapter: AdapterEntry | None
    parameters: PositiveInt
    # Target cpu: the kernel-ready copies of the pool are laid out for these; another machine needs its own build.
    instruction_set: str | None
    onnxruntime: str | None
    rtx: RtxEntry | None
    tensorrt: TensorrtEntry | None
    tools: dict[str, str]
    pool: tuple[PoolEntry, ...]
    files: tuple[EngineFile, ...]
    # Of all that stands above, so that a changed limit or token id is found as a changed weight is.
    sha256: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        engine_files = ENGINE_FILES[self.target]
        if self.tensorrt is not None and self.tensorrt.plans is not None:
            engine_files = (*engine_files, PLAN, BUILDER_LOG)
        engines = {f"{engine}/{name}" for engine in ("ar", "diffusion") for name in engine_files}
        required = engines | {POOL, f"{TOKENIZER}/tokenizer.json"}
        for name, entry in (("rtx", self.rtx), ("tensorrt", self.tensorrt)):
            if (entry is None) == (self.target == name):
                raise ValueError(f"{name} and target {self.target} contradict each other")
        if self.adapter is not None:
            required.add(ADAPTER)
        if missing := required - {entry.path for entry in self.files}:
            raise ValueError(f"files lacks {min(missing)}")
        return self

    def write(self, engine: Path) -> None:
        (engine / MANIFEST).write_bytes(self._sealed())

    def _sealed(self) -> bytes:
        """The file, with the hash of what it says."""
        content = hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()
        return (self.model_copy(update={"sha256": content}).model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def read(cls, engine: Path) -> Manifest:
        """Raises TriModeError if there is none, it is of another format, or it was changed after the build."""
        if not (engine / MANIFEST).is_file():
            raise TriModeError(
                f"{engine} is not an engine directory; build one with `trimode build CHECKPOINT {engine}`"
            )
        try:
            manifest = read_json_record(cls, engine / MANIFEST)
        except TriModeError as error:
            raise TriModeError(f"{error}; {_remedy(engine)}") from None
        if (engine / MANIFEST).read_bytes() != manifest._sealed():
            raise TriModeError(f"{engine / MANIFEST} was changed after the build; {_remedy(engine)}")
        return manifest


def hash_file(path: Path, advanced: Callable[[int], None] = lambda _bytes: None) -> str:
    """sha256 in hex; ``advanced`` is told the bytes read since the last call."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            advanced(len(chunk))
    return digest.hexdigest()


def hash_files(folder: Path, progress: Progress) -> tuple[EngineFile, ...]:
    """Size and hash of every file in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    done = 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        progress("hashes", done, total)

    return tuple(
        EngineFile(
            path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=hash_file(path, advanced)
        )
        for path in paths
    )


def _remedy(engine: Path) -> str:
    return f"build the engine again: trimode build CHECKPOINT {engine}"


def verify_files(engine: Path, manifest: Manifest, progress: Progress = no_progress) -> None:
    """Check every file of the engine; raises TriModeError that names the first one that is not as built."""
    listed = {engine / entry.path for entry in manifest.files} | {engine / MANIFEST}
    remedy = _remedy(engine)
    for path in sorted(engine.rglob("*")):
        if path.is_file() and path not in listed:
            raise TriModeError(f"{path} is not part of the engine; remove it, or {remedy}")
    total, done = sum(entry.bytes for entry in manifest.files), 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        progress("verify", done, total)

    for entry in manifest.files:
        verify_file(engine, entry, advanced)


def verify_file(engine: Path, entry: EngineFile, advanced: Callable[[int], None] = lambda _bytes: None) -> None:
    """Check one file of the engine; raises TriModeError if it is not as built."""
    remedy = _remedy(engine)
    path = engine / entry.path
    if not path.is_file():
        raise TriModeError(f"{path} is missing; {remedy}")
    if path.stat().st_size != entry.bytes:
        raise TriModeError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}; {remedy}")
    if hash_file(path, advanced) != entry.sha256:
        raise TriModeError(f"{path} was changed after the build (sha256 differs from the manifest); {remedy}")
