"""The PyTorch reference in the GPU check, on PyTorch's meta device: whether a CUDA graph can hold its passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts.gpu.reference_times import pass_of, random_model
from tests.support.random_checkpoint import config_fields
from tests.support.torch_on_meta import TorchOnMeta
from trimode.model.config import ModelConfig
from trimode.model.reference.network import NemotronLabsDiffusionModel


@pytest.fixture
def model() -> NemotronLabsDiffusionModel:
    return random_model(ModelConfig.model_validate(config_fields()), TorchOnMeta())


def capture(model: NemotronLabsDiffusionModel) -> None:
    device = TorchOnMeta()
    run = pass_of(model, 16, 4, device)
    with torch.inference_mode():
        run()  # as the eager pass, which is timed first
        device.captured(run)


def test_a_pass_can_be_captured(model: NemotronLabsDiffusionModel) -> None:
    capture(model)


def test_frequencies_from_the_host_cannot(model: NemotronLabsDiffusionModel) -> None:
    """Planted: rotary frequencies that every pass copies to the GPU, as a capture on an H100 failed."""
    encoder: Any = model.encoder
    table = encoder._rotary_table

    def from_the_host(positions: torch.Tensor) -> Any:
        encoder._frequencies = {positions.device: (torch.ones(16).to(positions.device), 1.0)}
        return table(positions)

    encoder._rotary_table = from_the_host
    with pytest.raises(RuntimeError, match="a copy between host and device cannot be captured"):
        capture(model)


def test_values_that_the_host_reads_cannot(model: NemotronLabsDiffusionModel) -> None:
    """Planted: a pass that looks at its result."""
    model.diffusion_head.register_forward_hook(lambda _module, _inputs, logits: logits * float(logits.max()))
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        capture(model)
