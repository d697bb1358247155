"""The executor of targets whose engines are plans of TensorRT or TensorRT-RTX."""

from __future__ import annotations

from trimode.common.errors import TriModeError
from trimode.engine.plan_file import MOST_ASKED, MOST_MASKED_ROWS
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, joined_rows, some_rows
from trimode.runtime.gpu.gpu_executor import GpuExecutor


class PlanExecutor(GpuExecutor):
    """A GPU executor within the limits of the plans' optimisation profiles."""

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        """Run one pass, or as many as the plans need for the rows of a token mask: each writes the same KV rows."""
        if step.asked > MOST_ASKED:
            raise TriModeError(f"{step.asked} asked ids of a row; plans take {MOST_ASKED}")
        rows = step.logit_rows.shape[1]
        if step.token_mask is None or rows <= MOST_MASKED_ROWS:
            return super().run(step)
        starts = range(0, rows, MOST_MASKED_ROWS)
        return joined_rows(
            [super(PlanExecutor, self).run(some_rows(step, slice(at, at + MOST_MASKED_ROWS))) for at in starts]
        )
