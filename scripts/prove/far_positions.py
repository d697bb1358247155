"""Compare logits at positions up to 262,144, the published context, with the reference. Few rows, far apart.

A wrong rotary frequency changes the angle between a query and a key in proportion to their distance. So the positions
of one step are spread over the context. Their KV rows take no more memory than those of a short text.

    python -m scripts.prove.far_positions
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tests.support.random_checkpoint import config_fields, write_random_checkpoint
from trimode.build.engine_builder import build_engine
from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.patterns import bidirectional, causal
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import BidirectionalStep, CausalStep

CONTEXT, STEP = 262144, 16
SPANS = ((0, 20_000), (0, 200_000), (199_000, 200_000), (0, CONTEXT - 1))
SHAPES = ((1e6, 32), (1e6, 128), (1e9, 128))  # theta, head_dim


class Distance(NamedTuple):
    """One step with tokens between the positions ``first`` and ``last``. relative: the largest relative L2 distance
    between a row's logits and the reference's. absolute: the largest difference of a logit.
    """

    first: int
    last: int
    pattern: str
    relative: float
    absolute: float


def random_far_checkpoint(folder: Path, theta: float, head_dim: int) -> Path:
    """A random network with the published context."""
    rope = config_fields()["rope_parameters"] | {"rope_theta": theta, "original_max_position_embeddings": 16384}
    return write_random_checkpoint(folder, head_dim=head_dim, max_position_embeddings=CONTEXT, rope_parameters=rope)


@torch.no_grad()
def far_distances(checkpoint: Path, engine: Path) -> list[Distance]:
    """One causal and one bidirectional step for each span. ``engine`` reports every token of the vocabulary."""
    executor, reference = CpuExecutor(engine, Manifest.read(engine)), load_reference(Checkpoint(checkpoint))
    mask_id, rng = reference.config.mask_token_id, np.random.default_rng(0)
    slot, start, rows = executor.pool.acquire(), np.array([0]), np.arange(STEP)[None]
    distances = []
    for first, last in SPANS:
        ids = rng.integers(mask_id + 1, reference.config.vocab_size, (1, STEP))
        positions = np.linspace(first, last, STEP).astype(np.int64)[None]
        chain = np.tril(np.ones((1, STEP, STEP), np.bool_))
        lengths, adapter = np.array([STEP]), np.array([False])
        for step, pattern in (
            (CausalStep(slot, ids, positions, start, rows, chain), causal),
            (BidirectionalStep(slot, ids, positions, start, rows, lengths, adapter), bidirectional),
        ):
            found = executor.run(step)
            with reference.draft_adapter(False):
                hidden, _ = reference.encoder(torch.from_numpy(ids), torch.from_numpy(positions), pattern(1, STEP, 0))
                expected = reference.diffusion_head(hidden)[0].numpy()
            logits = np.empty_like(expected)
            np.put_along_axis(logits, found.tokens[0], found.logits[0], axis=-1)
            logits, expected = np.delete(logits, mask_id, -1), np.delete(expected, mask_id, -1)
            relative = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            absolute = np.abs(logits - expected).max()
            distances.append(Distance(first, last, pattern.__name__, float(relative.max()), float(absolute)))
    executor.pool.release(slot)
    return distances


def main() -> None:
    print("theta head_dim     positions       pattern  relative  absolute")
    for theta, head_dim in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = random_far_checkpoint(Path(folder) / "checkpoint", theta, head_dim)
            build_engine(
                Checkpoint(checkpoint), Path(folder) / "engine", top_k=Checkpoint(checkpoint).config.vocab_size
            )
            for found in far_distances(checkpoint, Path(folder) / "engine"):
                print(
                    f"{theta:5.0e} {head_dim:8} {found.first:7}..{found.last:<7} {found.pattern:>13} "
                    f"{found.relative:9.1e} {found.absolute:9.1e}"
                )


if __name__ == "__main__":
    main()
