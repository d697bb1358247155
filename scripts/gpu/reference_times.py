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

from scripts.gpu.torch_device import TorchDevice
from trimode.engine.manifest import Manifest
from trimode.model.config import ModelConfig
from trimode.model.reference.network import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from trimode.model.reference.patterns import causal

REPEATS = 10
# KV rows and tokens of the passes.
PASSES = ((512, 1), (512, 32), (4096, 1), (4096, 32))


def times_of_reference(
    folder: Path, shape: str, torch_device: TorchDevice, passes: tuple[tuple[int, int], ...] = PASSES
) -> Iterator[dict[str, Any]]:
    """Milliseconds of passes of the reference with random weights. passes: KV rows and tokens of each."""
    model = random_model(Manifest.read(folder / "engines" / shape).model, torch_device)
    for rows, step in passes:
        run = pass_of(model, rows, step, torch_device)
        with torch.inference_mode():
            record = {"rows": rows, "step": step, "eager_ms": _milliseconds(run, torch_device)}
            try:
                record["graph_ms"] = _milliseconds(torch_device.captured(run), torch_device)
            except RuntimeError as error:
                record["graph_failed"] = str(error).splitlines()[0]
        yield {"what": f"{shape}: PyTorch reference, bf16", **record}


def pass_of(
    model: NemotronLabsDiffusionModel, rows: int, step: int, torch_device: TorchDevice
) -> Callable[[], torch.Tensor]:
    """A pass of one sequence: ``step`` tokens after ``rows`` random KV rows, up to the best token of each."""
    config, device = model.config, torch_device.name
    size = (1, config.num_key_value_heads, rows, config.head_dim)
    past = [
        (torch.randn(size, device=device, dtype=torch.bfloat16), torch.randn(size, device=device, dtype=torch.bfloat16))
        for _ in range(config.num_hidden_layers)
    ]
    ids = torch.randint(101, config.vocab_size, (1, step), device=device)
    positions = torch.arange(rows, rows + step, device=device)[None]
    visible = causal(1, step, rows, ids.device)

    def run() -> torch.Tensor:
        hidden, _ = model.encoder(ids, positions, visible, past)
        best: torch.Tensor = model.diffusion_head(hidden).float().topk(1).indices
        return best

    return run


def random_model(config: ModelConfig, torch_device: TorchDevice) -> NemotronLabsDiffusionModel:
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = NemotronLabsDiffusionModel(NemotronLabsDiffusionConfig.of(config))
    finally:
        torch.set_default_dtype(former)
    model.to_empty(device=torch_device.name).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    return model


def _milliseconds(run: Callable[[], object], torch_device: TorchDevice) -> float:
    times = []
    for repeat in range(3 + REPEATS):
        torch_device.synchronize()
        started = time.perf_counter()
        run()
        torch_device.synchronize()
        if repeat >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
