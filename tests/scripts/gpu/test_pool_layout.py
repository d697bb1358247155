"""The pool that the GPU check fills with random weights has the ranges of a pool that is written from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.gpu.pool_layout import pool_layout
from scripts.gpu.random_w4a16_checkpoint import GROUP, write_checkpoint
from trimode.build.graph.raw_pool import write_raw_pool
from trimode.common.progress import no_progress
from trimode.model.checkpoint import Checkpoint


def test_the_layout_is_that_of_a_written_pool(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "random", "tiny"))
    written = write_raw_pool(checkpoint, tmp_path / "pool.bin", no_progress, np.dtype(np.float16), layout="kernels")
    layout = pool_layout(checkpoint.config, "fp16", GROUP)
    assert list(layout.ranges()) == list(written.ranges())
    assert layout.stored == written.stored
