"""The interface between the build and a target.

A target is a frozen dataclass. Its fields are the options of the target; a field with the metadata of :func:`option` is
also an option of ``trimode build``. :data:`trimode.build.registry.TARGETS` lists the targets by name. A target's module
imports the packages that only this target needs when it builds, not before.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, get_type_hints

from trimode.common.installation import Installation
from trimode.common.progress import Progress
from trimode.engine.manifest import Limits, Manifest, PoolEntry
from trimode.engine.precision import Real
from trimode.engine.targets.section import TargetSection
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig

if TYPE_CHECKING:
    from trimode.build.pass_audit import EngineAudit


class RequestedLimits(NamedTuple):
    """The limits that the caller of a build gave; None for the target's default."""

    capacity: int | None
    prefill_step: int
    top_k: int | None


class Built(NamedTuple):
    """The result of a target's build: its section of the manifest, and the ranges of the pool that it wrote.

    ranks: that the network is divided among; each has a pool of these ranges. scales_attention: whether attention
    multiplies its output by the input scale of o_proj, as kernels of our own do. The draft adapter reads this output.
    """

    section: TargetSection
    pool: tuple[PoolEntry, ...]
    ranks: int = 1
    scales_attention: bool = False


class BuildTarget(Protocol):
    """A target with its options. packages: distributions whose versions an engine depends on, alternatives included."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]  # every dataclass has it

    @property
    def dtype(self) -> Real:
        """The type of the hidden states and of the KV pool."""
        ...

    def limits(self, config: ModelConfig, requested: RequestedLimits) -> Limits:
        """The limits of the engine."""
        ...

    def import_packages(self) -> None:
        """Import what the build needs. Raises TriModeError that names a missing package and the extra to install."""
        ...

    def build(self, checkpoint: Checkpoint, folder: Path, limits: Limits, progress: Progress) -> Built:
        """Write ``ar/``, ``diffusion/`` and the weight pool of each rank into ``folder``, which is new and empty."""
        ...

    @classmethod
    def open_audit(cls, engine: Path, manifest: Manifest) -> EngineAudit:
        """Read what ``trimode audit`` counts. Raises TriModeError if the target has no lists of kernels, or a file was
        changed after the build.
        """
        ...

    @classmethod
    def can_build(cls, installation: Installation) -> str:
        """``builds``, or ``does not build: `` and the remedy."""
        ...


class TargetOption(NamedTuple):
    """An option of a target. ``flag`` is its name on the command line; a default of None is explained by ``help``."""

    name: str
    flag: str
    type: Any
    default: Any
    help: str


def option(description: str, flag: str | None = None) -> dict[str, str | None]:
    """The metadata of a dataclass field that is also an option of ``trimode build``.

    flag: its name there; by default the field's name, as in ``--max-batch`` for ``max_batch``.
    """
    return {"help": description, "flag": flag}


def options_of(target: type[BuildTarget]) -> tuple[TargetOption, ...]:
    """The command-line options of a target, in the order of its fields."""
    types = get_type_hints(target)
    return tuple(
        TargetOption(
            name=field.name,
            flag=field.metadata["flag"] or f"--{field.name.replace('_', '-')}",
            type=types[field.name],
            default=field.default,
            help=field.metadata["help"],
        )
        for field in dataclasses.fields(target)
        if "help" in field.metadata
    )
