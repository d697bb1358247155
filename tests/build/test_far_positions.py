"""The engines against the reference at positions of the published context."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.prove.far_positions import far_distances, random_far_checkpoint
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint

BAR = 1e-4


@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 128), (1e9, 128)], ids=str)
def test_logits_at_far_positions_equal_the_references(tmp_path: Path, theta: float, head_dim: int) -> None:
    source = random_far_checkpoint(tmp_path / "checkpoint", theta, head_dim)
    build_engine(Checkpoint(source), tmp_path / "engine", top_k=768)
    distances = far_distances(source, tmp_path / "engine")
    assert max(found.last for found in distances) >= 200_000
    for found in distances:
        assert found.relative <= BAR, found
        assert found.absolute <= BAR, found
