"""Audit an engine directory without a GPU: what a pass runs, the bytes that it moves, and the least times.

A target's :meth:`trimode.build.target.BuildTarget.open_audit` opens its directories. The record is the same for all
targets.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, SerializeAsAny

from trimode.build.pass_audit import PassAudit
from trimode.build.registry import TARGETS
from trimode.build.roofline import (
    GPUS,
    INTEGER_BYTES,
    LOGIT_BYTES,
    REAL_BYTES,
    find_gpu,
    pass_seconds,
)
from trimode.build.scale_out import RankEstimate, estimates, find_link
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest

BLOCK_LENGTH = 32
DEFAULT_STEPS = (1, 8, 32)
DEFAULT_WINDOWS = (512, 4096)


class HostBytes(BaseModel):
    """Bytes that one request's self-speculation cycle copies between the host and a GPU."""

    to_device: int
    to_host: int


class TimeBound(BaseModel):
    """The shortest time of each pass in milliseconds, and the resulting tokens per second of one request: the engine's
    bytes at the GPU's full bandwidth. Self-speculation drafts and verifies blocks of ``block_length``."""

    window: int
    block_length: int
    ar_ms: float
    draft_ms: float
    verify_ms: float
    ar_tokens_per_second: float
    linear_spec_tokens_per_second: float


class AuditReport(BaseModel):
    """ranks: of the engine. link: between its GPUs. memory: bytes on one GPU, by what they hold. of_ranks: estimates
    for other numbers of GPUs, by window, for the sizes and the types of this engine's network. notes: lines of text."""

    engine: str
    target: str
    gpu: str
    ranks: int
    link: str
    acceptance: float
    memory: dict[str, int]
    cycle: HostBytes
    passes: list[SerializeAsAny[PassAudit]]
    bounds: list[TimeBound]
    of_ranks: dict[int, list[RankEstimate]]
    notes: list[str]


def audit_engine(
    folder: Path,
    *,
    acceptance: float,
    gpu: str | None = None,
    batch: int = 1,
    steps: tuple[int, ...] | None = None,
    windows: tuple[int, ...] | None = None,
    link: str | None = None,
) -> AuditReport:
    """Audit both engines of an engine directory at every step and window.

    gpu: a key of :data:`trimode.build.roofline.GPUS`; None for the first of them that the directory was built for.
    acceptance: tokens per self-speculation cycle. steps, windows: None for :data:`DEFAULT_STEPS` and
    :data:`DEFAULT_WINDOWS`, each lowered to the engine's limits. Raises TriModeError for a shape beyond these limits,
    for a changed file, and for a target that has no kernels to count. link: a key of
    :data:`trimode.build.scale_out.LINKS`; None for the GPU's usual one.
    """
    manifest = Manifest.read(folder)
    audit = TARGETS[manifest.target.name].open_audit(folder, manifest)
    card = find_gpu(gpu or _built_for(audit.sms))
    between = find_link(link, card.key)
    limits = manifest.limits
    _, max_step = limits.largest_pass
    if windows is None:
        windows = _at_most(DEFAULT_WINDOWS, limits.capacity)
    if steps is None:
        steps = _at_most(DEFAULT_STEPS, min(max_step, *windows))

    def counted(engine: str, batch: int, step: int, window: int) -> PassAudit:
        refuse_impossible(manifest, batch, step, window)
        return audit.count(engine, batch, step, window, card)

    passes = [
        counted(name, batch, step, window) for name in ("ar", "diffusion") for window in windows for step in steps
    ]
    bounds = []
    for window in windows:
        block = min(BLOCK_LENGTH, window, max_step)
        seconds = [
            pass_seconds(card, found.bytes, found.flops)
            + found.exchanges * between.latency
            + found.link_bytes / between.bandwidth
            for found in (
                counted("ar", 1, 1, window),
                counted("diffusion", 1, block, window),
                counted("ar", 1, block, window),
            )
        ]
        bounds.append(
            TimeBound(
                window=window,
                block_length=block,
                ar_ms=seconds[0] * 1e3,
                draft_ms=seconds[1] * 1e3,
                verify_ms=seconds[2] * 1e3,
                ar_tokens_per_second=1 / seconds[0],
                linear_spec_tokens_per_second=acceptance / (seconds[1] + seconds[2]),
            )
        )
    return AuditReport(
        engine=str(folder),
        target=manifest.target.name,
        gpu=card.key,
        ranks=manifest.ranks,
        link=between.key,
        acceptance=acceptance,
        memory=audit.memory(),
        cycle=host_bytes(manifest, audit.candidates, BLOCK_LENGTH),
        passes=passes,
        bounds=bounds,
        of_ranks={
            window: estimates(card, between, manifest.model, manifest.precision, window=window) for window in windows
        },
        notes=audit.notes(),
    )


def refuse_impossible(manifest: Manifest, batch: int, step: int, window: int) -> None:
    """Raise TriModeError for a pass that the engine does not take."""
    max_batch, max_step = manifest.limits.largest_pass
    limits = {
        "batch": (batch, max_batch),
        "step": (step, max_step),
        "window": (window, manifest.limits.capacity),
    }
    for name, (value, largest) in limits.items():
        if not 1 <= value <= largest:
            raise TriModeError(f"{name} {value} is outside the engine's 1 to {largest}; build with a larger limit")
    if step > window:
        raise TriModeError(f"step {step} exceeds the window {window}: a step's own rows are part of it")


def host_bytes(manifest: Manifest, candidates: int, block_length: int) -> HostBytes:
    """Of a draft and its verification, with results for every token."""
    integers = INTEGER_BYTES * (3 * block_length + 1)  # ids, positions, rows with logits; the first row to write
    draft = integers + INTEGER_BYTES + (REAL_BYTES if manifest.adapter else 0)  # its length; the adapter's factor
    verification = integers + block_length**2  # the mask
    results = block_length * (candidates * (LOGIT_BYTES + INTEGER_BYTES) + LOGIT_BYTES)
    return HostBytes(to_device=draft + verification, to_host=2 * results)


def _built_for(sms: tuple[int, ...]) -> str:
    """The first known GPU of these compute capabilities."""
    found = [key for key, gpu in GPUS.items() if gpu.compute_capability in sms]
    if not found:
        raise TriModeError(f"no GPU is known of compute capability {', '.join(map(str, sms))}; name one by --gpu")
    return found[0]


def _at_most(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """The sizes, each lowered to ``largest``, without repetitions."""
    return tuple(dict.fromkeys(min(size, largest) for size in sizes))
