"""``manifest.json``: the contract between the builder and the runtime.

An engine directory holds:

```
manifest.json                 this record
ar/, diffusion/               one engine each, in the files of the target (trimode.engine.targets)
weights/pool.bin              every constant of the network once; both engines load it
weights/adapter.safetensors   the draft adapter, if the checkpoint has one: inputs of the diffusion engine
kernels/                      kernels compiled for GPUs, if the target has them
tokenizer/                    the checkpoint's tokenizer files
```

If the network is divided among ``ranks`` processes (:mod:`trimode.model.shards`), ``ar/``, ``diffusion/`` and
``weights/`` are in ``rank0/``, ``rank1/`` and so on, with each rank's part of the network. ``pool`` then has the ranges
of rank 0; those of the others differ at most in small constants.

The builder writes a directory under a temporary name and renames it when it is complete. Loading checks every file
against its size and hash in the manifest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, SerializeAsAny, model_validator

from trimode.common.errors import TriModeError
from trimode.common.records import read_json, read_json_record
from trimode.engine.files import ADAPTER, MANIFEST, POOL, TOKENIZER, EngineFile, rank_folder, rebuild_remedy
from trimode.engine.precision import Precision
from trimode.engine.record import Record
from trimode.engine.targets import SECTIONS
from trimode.engine.targets.section import TargetSection
from trimode.model.config import ModelConfig
from trimode.model.step import ENGINES

FORMAT_VERSION = 9

Section = TypeVar("Section", bound=TargetSection)


class PoolEntry(Record):
    """A constant of the pool. ``packed_*``: its copy in the layout of the target's kernels, if the target has one."""

    name: str
    offset: NonNegativeInt
    bytes: NonNegativeInt
    packed_offset: NonNegativeInt | None = None
    packed_bytes: NonNegativeInt = 0


class Limits(Record):
    """capacity: tokens of the longest sequence. prefill_step: tokens of a prefill pass. top_k: candidates that the
    engine returns for a row. max_batch, max_step: sequences of a pass, and tokens of a sequence in a pass; None if the
    target does not limit them.
    """

    capacity: PositiveInt
    prefill_step: PositiveInt
    top_k: PositiveInt
    max_batch: PositiveInt | None
    max_step: PositiveInt | None

    @property
    def largest_pass(self) -> tuple[int, int]:
        """``max_batch`` and ``max_step``, for targets that limit them."""
        if self.max_batch is None or self.max_step is None:
            raise ValueError("the target does not limit its passes")
        return self.max_batch, self.max_step


class AdapterEntry(Record):
    """The draft adapter. ``scale`` is part of its stored matrices (:mod:`trimode.model.step`)."""

    rank: PositiveInt
    scale: float


def _section(value: Any) -> Any:
    """The record of the target that ``name`` names."""
    if isinstance(value, TargetSection):
        return value
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in SECTIONS:
        raise ValueError(f"name must be one of {', '.join(SECTIONS)}")
    return SECTIONS[name].model_validate(value)


class Manifest(Record):
    """``sha256`` is the hash of all other fields, so that a changed limit or token id is detected like a changed
    weight.
    """

    format_version: Literal[9]
    target: Annotated[SerializeAsAny[TargetSection], BeforeValidator(_section)]
    source: str
    quantization: str
    model: ModelConfig
    precision: Precision
    limits: Limits
    ranks: PositiveInt = 1
    adapter: AdapterEntry | None
    parameters: PositiveInt
    tools: dict[str, str]
    pool: tuple[PoolEntry, ...]
    files: tuple[EngineFile, ...]
    sha256: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        of_rank = {f"{engine}/{name}" for engine, _ in ENGINES for name in self.target.engine_files}
        of_rank |= {POOL} if self.adapter is None else {POOL, ADAPTER}
        required = {(rank_folder(rank, self.ranks) / name).as_posix() for rank in range(self.ranks) for name in of_rank}
        required.add(f"{TOKENIZER}/tokenizer.json")
        if missing := required - {entry.path for entry in self.files}:
            raise ValueError(f"files lacks {min(missing)}")
        return self

    def section(self, kind: type[Section]) -> Section:
        """The target's section. Raises TypeError if the engine is for another target than ``kind``'s."""
        if not isinstance(self.target, kind):
            raise TypeError(f"the engine is for target {self.target.name}, not for {kind.__name__}")
        return self.target

    def write(self, engine: Path) -> None:
        (engine / MANIFEST).write_bytes(self._sealed())

    def _sealed(self) -> bytes:
        """The file's content, with the hash of the other fields."""
        content = hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()
        return (self.model_copy(update={"sha256": content}).model_dump_json(indent=2) + "\n").encode()

    @classmethod
    def read(cls, engine: Path) -> Manifest:
        """Raises TriModeError if there is none, it has another format, or it was changed after the build."""
        if not (engine / MANIFEST).is_file():
            raise TriModeError(
                f"{engine} is not an engine directory; build one with `trimode build CHECKPOINT {engine}`"
            )
        content = read_json(engine / MANIFEST)
        found = content.get("format_version") if isinstance(content, dict) else None
        if isinstance(found, int) and found != FORMAT_VERSION:
            raise TriModeError(
                f"{engine / MANIFEST} has format {found}, this version reads {FORMAT_VERSION}; {rebuild_remedy(engine)}"
            )
        try:
            manifest = read_json_record(cls, engine / MANIFEST)
        except TriModeError as error:
            raise TriModeError(f"{error}; {rebuild_remedy(engine)}") from None
        if (engine / MANIFEST).read_bytes() != manifest._sealed():
            raise TriModeError(f"{engine / MANIFEST} was changed after the build; {rebuild_remedy(engine)}")
        return manifest
