"""A checkpoint, 16-bit or int4, as the PyTorch reference with its draft adapter attached."""

from __future__ import annotations

import torch
from peft import PeftModel

from trimode.model.checkpoint import ADAPTER_FOLDER, Checkpoint, linear_shapes, vector_shapes
from trimode.model.reference.network import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel


def load_reference(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, adapter: bool = True
) -> NemotronLabsDiffusionModel:
    """The reference in ``dtype``, int4 weights unpacked, ready to decode.

    With ``adapter`` and an adapter folder, its layers are attached (peft) and used in self-speculation's drafts only.
    """
    with torch.device("meta"):
        model = NemotronLabsDiffusionModel(NemotronLabsDiffusionConfig.of(checkpoint.config))
    state = {}
    for name in vector_shapes(checkpoint.config):
        state[name] = torch.from_numpy(checkpoint.vector(name).astype("float32")).to(dtype)
    for module in linear_shapes(checkpoint.config):
        weight = checkpoint.linear(module)
        state[f"{module}.weight"] = torch.from_numpy(weight.to_float32()).to(dtype)
    model.load_state_dict(state, assign=True)
    if adapter and checkpoint.adapter is not None:
        PeftModel.from_pretrained(model, checkpoint.folder, subfolder=ADAPTER_FOLDER)
    model.eval()
    return model
