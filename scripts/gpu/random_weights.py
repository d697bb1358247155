"""Random weights and KV rows in the memory of an engine without weights, which the GPU check times."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from scripts.gpu.torch_device import TorchDevice
from trimode.engine.files import ADAPTER
from trimode.engine.launch_list import LaunchList, LaunchTensor
from trimode.engine.manifest import Manifest
from trimode.model.step import adapter_inputs
from trimode.runtime.gpu.device import Buffer, Device

# The folder of the engine without weights, and the name of the part that times it.
TIMED = "8b"


class RandomEngine(NamedTuple):
    """A copy of an engine without weights, with a random adapter, and random weights on the device."""

    folder: Path
    manifest: Manifest
    device: Device
    weights: Buffer


@contextmanager
def random_engine(source: Path, torch_device: TorchDevice) -> Iterator[RandomEngine]:
    """source: the engine without weights."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(source, Path(scratch, "engine")))
        manifest, device = Manifest.read(folder), Device(0)
        _write_random_adapter(folder, manifest)
        yield RandomEngine(folder, manifest, device, _random_weights(device, torch_device, folder, manifest))


def _random_weights(device: Device, torch_device: TorchDevice, engine: Path, manifest: Manifest) -> Buffer:
    """A pool of random weights; norms are ones, and the kernels' constants are those of the network."""
    end = max(entry.offset + entry.bytes for entry in manifest.pool)
    buffer = device.allocate(end, "the weights")
    constants = dict(np.load(engine / "constants.npz"))
    weights = {tensor.name: tensor for tensor in LaunchList.read(engine / "ar").weights}
    torch.manual_seed(0)
    for entry in manifest.pool:
        _fill(torch_device, buffer.address + entry.offset, weights[entry.name], constants)
    torch_device.synchronize()
    return buffer


def _fill(torch_device: TorchDevice, address: int, weight: LaunchTensor, constants: dict[str, Any]) -> None:
    shape = weight.sizes({})
    if weight.name in constants:
        torch_device.tensor(address, "<f4", shape).copy_(torch.from_numpy(constants[weight.name]))
    elif weight.type == "int32":
        words = torch_device.tensor(address, "<i4", shape)
        words.random_(-(1 << 31), (1 << 31) - 1)
    elif weight.type == "fp32":
        torch_device.tensor(address, "<f4", shape).uniform_(0.002, 0.006)
    else:
        real = torch_device.tensor(address, "<i2", shape).view(torch.bfloat16)
        if "norm" in weight.name:
            real.fill_(1.0)
        else:
            real.normal_(0, 0.02)


def randomise(torch_device: TorchDevice, memory: Buffer) -> None:
    """Fill a KV pool in bf16 with normal values."""
    pool = torch_device.tensor(memory.address, "<i2", (memory.size // 2,)).view(torch.bfloat16)
    for part in pool.split(1 << 28):
        part.normal_()
    torch_device.synchronize()


def _write_random_adapter(engine: Path, manifest: Manifest) -> None:
    if manifest.adapter is None:
        return
    model, rank, rng = manifest.model, manifest.adapter.rank, np.random.default_rng(0)
    tensors = {}
    for index in range(model.num_hidden_layers):
        down, up = adapter_inputs(index)
        tensors[down] = rng.standard_normal((model.query_width, rank), np.float32) * np.float32(0.02)
        tensors[up] = rng.standard_normal((rank, model.hidden_size), np.float32) * np.float32(0.02)
    (engine / ADAPTER).parent.mkdir(exist_ok=True)
    save_file(tensors, engine / ADAPTER)
