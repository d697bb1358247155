"""The results of a graph, from its logits, in standard operators: candidates, log-sum-exp, and logits of asked ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from onnx import TensorProto

from trimode.build.graph.onnx_builder import Input, ModelBuilder
from trimode.engine.precision import NUMPY_TYPES, Real
from trimode.model.config import ModelConfig
from trimode.model.step import mask_words
from trimode.plugins.operators.candidates import NEVER

REAL_TYPES: dict[Real, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
FLOAT, INT64, INT32, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8
# How rows with a token mask are computed (trimode.build.graph.network.NetworkOptions).
Masks = Literal["branch", "apart"]
# Names and element types of a graph's results, or a branch's.
Results = Sequence[tuple[str, int]]
RESULTS: Results = (("top_logits", FLOAT), ("top_tokens", INT64), ("log_sum_exp", FLOAT))


def declare_results(
    graph: ModelBuilder, config: ModelConfig, logits: str, activations: Real, top_k: int | None, masks: Masks
) -> None:
    """Add the inputs ``token_mask`` and ``asked_ids`` and all results. logits: [batch, rows, vocabulary], of the type
    ``activations``. top_k: candidates of a row; None makes it an input of the graph.
    """
    _Head(graph, config, activations, top_k).declare(logits, masks)


class _Head:
    def __init__(self, graph: ModelBuilder, config: ModelConfig, activations: Real, top_k: int | None) -> None:
        self.graph = graph
        self.config = config
        self.activations: Real = activations
        self.top_k = top_k
        self.op = graph.op

    def declare(self, logits: str, masks: Masks) -> None:
        config, top_k = self.config, self.top_k
        wanted = self.graph.input("top_k", INT64, [1]) if top_k is None else [top_k]
        token_mask = self.graph.input("token_mask", UINT8, ["batch", "masked_rows", 4 * mask_words(config.vocab_size)])
        masked_rows = self.graph.dims(token_mask, 1, 2)
        if masks == "branch":
            self.graph.choose(
                self.op("Greater", self.op("Squeeze", masked_rows, [0]), 0),
                [name for name, _ in RESULTS],
                lambda: self._best(logits, wanted, "legal/", token_mask),
                lambda: self._best(logits, wanted, "any/"),
            )
        else:
            self._best(logits, wanted, "")
            first_rows = self.op("Slice", logits, [0], masked_rows, [1])
            self._declare_results(self._best(first_rows, wanted, "masked_", token_mask), "masked_rows")
        self._declare_results(RESULTS, "rows")
        asked_ids = self.graph.input("asked_ids", INT64, ["batch", "rows", "asked"])
        asked_logits = self._as_float(self.op("GatherElements", logits, asked_ids, axis=2))
        self.graph.node("Identity", [asked_logits], ["asked_logits"])
        self.graph.output("asked_logits", FLOAT, ["batch", "rows", "asked"])

    def _declare_results(self, results: Results, rows: str) -> None:
        top_k = self.top_k or "top_k"
        for name, dtype in results:
            self.graph.output(name, dtype, ["batch", rows] if name.endswith("log_sum_exp") else ["batch", rows, top_k])

    def _best(self, logits: str, wanted: Input, prefix: str, token_mask: str | None = None) -> Results:
        """The results of rows with these logits; the names of the results begin with ``prefix``."""
        if token_mask is not None:
            logits = self._legal(logits, token_mask)
        # The mask token is never a candidate.
        bias = np.zeros(self.config.vocab_size, np.float32)
        if self.config.mask_token_id >= 0:  # false on ranks that do not hold it
            bias[self.config.mask_token_id] = NEVER
        possible = self.op("Add", self._as_float(logits), self.graph.constant(bias, "mask_token_bias"))
        if token_mask is not None:
            possible = self.op("Max", possible, NEVER)
        if self.activations == "fp32":
            self.graph.node("TopK", [possible, wanted], [f"{prefix}top_logits", f"{prefix}top_tokens"], axis=-1)
        else:
            self._top_of_narrow(logits, wanted, prefix)
        # The maximum is known already. ReduceLogSumExp would read the row once more to find it.
        best = self.op("Slice", f"{prefix}top_logits", [0], [1], [2])
        total = self.op("ReduceSum", self.op("Exp", self.op("Sub", possible, best)), [-1], keepdims=0)
        self.graph.node("Add", [self.op("Log", total), self.op("Squeeze", best, [2])], [f"{prefix}log_sum_exp"])
        return [(prefix + name, dtype) for name, dtype in RESULTS]

    def _legal(self, logits: str, token_mask: str) -> str:
        """``logits`` [batch, rows, vocabulary], -inf for illegal tokens. token_mask: bits, [batch, rows, bytes]."""
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.bool_)
        legal = self.op("Gather", self.graph.constant(bits, "bits_of_bytes"), self.op("Cast", token_mask, to=INT32))
        # Rows may be 0, so the number of bits cannot be inferred.
        count = 32 * mask_words(self.config.vocab_size)
        legal = self.op("Reshape", legal, self.op("Concat", self.graph.dims(token_mask, 0, 2), [count], axis=0))
        if count > self.config.vocab_size:
            legal = self.op("Slice", legal, [0], [self.config.vocab_size], [2])
        lowest = self.graph.constant(np.array(-np.inf, NUMPY_TYPES[self.activations]), "lowest_logit")
        return self.op("Where", legal, logits, lowest)

    def _top_of_narrow(self, logits: str, wanted: Input, prefix: str) -> None:
        """TopK of 16-bit logits without a copy of the row in fp32, which has twice the bytes. The mask token may be
        among the best, so take one candidate more, give the mask token the lowest logit, and sort again.
        """
        more = self.op("Min", self.op("Add", wanted, [1]), [self.config.vocab_size])
        self.graph.node("TopK", [logits, more], [f"{prefix}found", f"{prefix}tokens"], axis=-1)
        is_mask = self.op("Equal", f"{prefix}tokens", self.config.mask_token_id)
        found = self.op("Where", is_mask, NEVER, self.op("Max", self._as_float(f"{prefix}found"), NEVER))
        self.graph.node("TopK", [found, wanted], [f"{prefix}top_logits", f"{prefix}order"], axis=-1)
        self.graph.node("GatherElements", [f"{prefix}tokens", f"{prefix}order"], [f"{prefix}top_tokens"], axis=2)

    def _as_float(self, x: str) -> str:
        return x if self.activations == "fp32" else self.op("Cast", x, to=FLOAT)
