"""Write the shipped checkpoint with a weak drafter: about as many drafts are accepted as of the published 8B's.

    python -m scripts.tiny.weak_drafter --out engines/tiny-weak

The draft adapter is replaced by one that no step has trained: normal weights from one seed. AR does not use the
adapter, so texts stay those of the shipped checkpoint, bit for bit. Of 31 drafts, 5 to 7 are accepted on average
(tests/test_tiny.py), where the trained adapter has 15.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "checkpoints" / "tiny"
ADAPTER = Path("linear_spec_lora", "adapter_model.safetensors")
SCALE = 0.1  # deviation of the narrow matrices' weights; those of a trained adapter start at zero


def write_weak_drafter(out: Path, shipped: Path = SHIPPED) -> Path:
    """A copy of the checkpoint ``shipped`` with the weak adapter. Returns ``out``, which must not exist."""
    shutil.copytree(shipped, out)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, trained in sorted(load_file(out / ADAPTER).items()):
        # LoRA's first matrix has its usual deviation, 1 / sqrt(3 * inner).
        deviation = SCALE if "lora_B" in name else (3 * trained.shape[1]) ** -0.5
        tensors[name] = (deviation * torch.randn(trained.shape, generator=generator)).to(trained.dtype)
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    print(write_weak_drafter(parser.parse_args().out))


if __name__ == "__main__":
    main()
