"""What every target gives the decoding loop: two engines, one KV pool, one pass at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trimode.model.step import AttentionPattern
from trimode.runtime.kv_pool import KvPool

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One pass over slots ``first_slot`` .. ``first_slot + B - 1``; shapes and meaning as in :mod:`trimode.model.step`."""

    pattern: AttentionPattern
    first_slot: int
    input_ids: Ints  # [B, S]
    position_ids: Ints  # [B, S]
    write_indices: Ints  # [B]
    logit_rows: Ints  # [B, R]
    block_mask: NDArray[np.bool_] | None = None  # [B, S, S], causal steps
    step_lengths: Ints | None = None  # [B], bidirectional steps
    adapter: NDArray[np.bool_] | None = None  # [B], bidirectional steps: draft adapter on or off

    @property
    def batch(self) -> int:
        return self.input_ids.shape[0]

    @property
    def rows_written(self) -> int:
        """How far the step reaches into the KV pool."""
        return int(self.write_indices.max()) + self.input_ids.shape[1]

    @classmethod
    def causal(cls, first_slot: int, input_ids: Ints, write_indices: Ints, logit_rows: Ints) -> Step:
        """Each token sees the committed rows and the step's tokens up to itself."""
        batch, size = input_ids.shape
        mask = np.broadcast_to(np.tril(np.ones((size, size), np.bool_)), (batch, size, size))
        positions = write_indices[:, None] + np.arange(size)
        return cls("causal", first_slot, input_ids, positions, write_indices, logit_rows, block_mask=mask)

    @classmethod
    def bidirectional(
        cls,
        first_slot: int,
        input_ids: Ints,
        write_indices: Ints,
        logit_rows: Ints,
        step_lengths: Ints,
        adapter: NDArray[np.bool_],
    ) -> Step:
        """Each token sees the committed rows and all ``step_lengths`` real tokens of its step."""
        positions = write_indices[:, None] + np.arange(input_ids.shape[1])
        return cls(
            "bidirectional",
            first_slot,
            input_ids,
            positions,
            write_indices,
            logit_rows,
            step_lengths=step_lengths,
            adapter=adapter,
        )


class Candidates(NamedTuple):
    """The k most likely tokens of each asked row, best first, and the log-sum-exp of the row's whole vocabulary."""

    logits: NDArray[np.float32]  # [B, R, k]
    tokens: Ints  # [B, R, k]
    log_sum_exp: NDArray[np.float32]  # [B, R]


class Executor(Protocol):
    """Runs the engines of one target. ``pool`` is the KV memory that both engines share."""

    pool: KvPool

    def run(self, step: Step) -> Candidates:
        """One pass; writes the step's KV rows, whichever the pattern."""
        ...
