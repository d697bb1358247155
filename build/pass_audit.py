"""What a target counts for ``trimode audit``: the kernels and the bytes of a pass of an engine directory."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from trimode.build.roofline import REAL_BYTES, GpuModel, PassShape, least_bytes, least_flops, stored_matrix_bytes
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.model.shards import Shard


class PassAudit(BaseModel):
    """One pass of one engine, of one rank if there are several. Bytes are of device memory.

    kernels_a_layer: the most frequent count. int4_products: kernels that multiply int4 matrices. bound: bytes that any
    implementation must move. ratio: bytes / bound. exchanges: kernels in which ranks exchange partial sums. link_bytes:
    that a rank receives in them.
    """

    engine: str
    batch: int
    step: int
    window: int
    kernels: int
    kernels_a_layer: int
    int4_products: int
    int4_matrices: int
    bytes: int
    bound: int
    ratio: float
    flops: int
    bytes_by_kind: dict[str, int]
    exchanges: int
    link_bytes: int

    def cells(self) -> dict[str, str]:
        """The pass's row of the table, by heading."""
        return {
            "engine": self.engine,
            "step": str(self.step),
            "window": str(self.window),
            "kernels": str(self.kernels),
            "a layer": str(self.kernels_a_layer),
            "int4": f"{self.int4_products}/{self.int4_matrices}",
            "MB": f"{self.bytes / 1e6:.1f}",
            "/bound": f"{self.ratio:.3f}",
        }

    def parts(self) -> list[dict[str, str]]:
        """Rows of a table of the pass's kernels, by heading; none if the target does not tell them apart."""
        return []


class EngineAudit(Protocol):
    """An engine directory of a target.

    sms: compute capabilities that it was built for, 121 for 12.1. candidates: that a greedy pass returns of a row.
    """

    @property
    def manifest(self) -> Manifest: ...

    @property
    def sms(self) -> tuple[int, ...]: ...

    @property
    def candidates(self) -> int: ...

    def count(self, engine: str, batch: int, step: int, window: int, gpu: GpuModel) -> PassAudit:
        """A pass of ``step`` tokens for each of ``batch`` sequences over ``window`` KV rows, with logits for every
        token. :func:`trimode.build.audit.refuse_impossible` has accepted the sizes. Raises TriModeError if ``gpu``
        cannot run it.
        """
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of device memory, by what they hold, of one rank if there are several."""
        ...

    def notes(self) -> list[str]:
        """Lines for below the table of the passes: its headings, and what else was checked."""
        ...


def no_kernels(folder: Path, target: str) -> TriModeError:
    """The error of a target without lists of kernels."""
    return TriModeError(
        f"{folder} is for target {target}, which has no list of kernels to audit; build for cuda or rtx"
    )


def least_work(manifest: Manifest, engine: str, batch: int, step: int, window: int, top_k: int) -> tuple[int, int]:
    """The bytes that any implementation of a rank's pass must move, and its FLOPs. top_k: candidates of a row."""
    config = Shard(0, manifest.ranks).config(manifest.model)
    rank = manifest.adapter.rank if manifest.adapter and engine == "diffusion" else 0
    shape = PassShape(batch, step, window, step, top_k, rank)
    return least_bytes(config, shape, stored_matrix_bytes(config, manifest.precision)), least_flops(config, shape)


def kv_pool_bytes(manifest: Manifest) -> int:
    """Of a rank: keys and values of every sequence up to the capacity."""
    config, limits = Shard(0, manifest.ranks).config(manifest.model), manifest.limits
    return 2 * config.num_hidden_layers * config.kv_width * REAL_BYTES * limits.capacity * limits.largest_pass[0]
