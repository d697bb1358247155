"""Times of the PyTorch reference in bf16 at a published size, as a peer of target ``cuda`` in the same run.

The reference replicates keys and values for grouped queries and copies the KV cache in each pass, as a plain PyTorch
implementation does. It is not tuned. Each pass is timed eagerly, and as a CUDA graph where it can be captured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trimode.engine.manifest import Manifest
from trimode.model.reference.network import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from trimode.model.reference.patterns import causal

REPEATS = 10
# KV rows and tokens of the passes.
PASSES = ((512, 1), (512, 32), (4096, 1), (4096, 32))


def times_of_reference(folder: Path, shape: str) -> Iterator[dict[str, Any]]:
    model = _random_model(NemotronLabsDiffusionConfig.of(Manifest.read(folder / "engines" / shape).model))
    config = model.config
    for rows, step in PASSES:
        size = (1, config.num_key_value_heads, rows, config.head_dim)
        past = [
            (torch.randn(size, device="cuda", dtype=torch.bfloat16), torch.randn(size, device="cuda").bfloat16())
            for _ in range(config.num_hidden_layers)
        ]
        ids = torch.randint(101, config.vocab_size, (1, step), device="cuda")
        positions = torch.arange(rows, rows + step, device="cuda")[None]
        visible = causal(1, step, rows, ids.device)

        def run(
            ids: torch.Tensor = ids,
            positions: torch.Tensor = positions,
            visible: torch.Tensor = visible,
            past: list[Any] = past,
        ) -> torch.Tensor:
            hidden, _ = model.encoder(ids, positions, visible, past)
            best: torch.Tensor = model.diffusion_head(hidden).float().topk(1).indices
            return best

        with torch.inference_mode():
            record = {"rows": rows, "step": step, "eager_ms": _milliseconds(run)}
            try:
                record["graph_ms"] = _milliseconds(_captured(run))
            except RuntimeError as error:
                record["graph_failed"] = str(error).splitlines()[0]
        yield {"what": f"{shape}: PyTorch reference, bf16", **record}


def _random_model(config: NemotronLabsDiffusionConfig) -> NemotronLabsDiffusionModel:
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = NemotronLabsDiffusionModel(config)
    finally:
        torch.set_default_dtype(former)
    model.to_empty(device="cuda").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    return model


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _milliseconds(run: Callable[[], object]) -> float:
    times = []
    for repeat in range(3 + REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
