"""Target rtx without a GPU: the executor's binding on the double, with the `cpu` target's tokens as the measure."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

from tests.runtime.rtx_double import DriverDouble, LibcudaDouble, PlanDouble, TrtDouble, plan_doubles
from trimode.build.engine import RtxOptions, build_engine
from trimode.build.raw_pool import write_raw_pool
from trimode.model.checkpoint import Checkpoint
from trimode.model.progress import no_progress
from trimode.quantize import quantize_checkpoint
from trimode.runtime.decoding import DecodingOptions
from trimode.runtime.engine import Engine
from trimode.runtime.rtx import cuda, passes, plans

CAPACITY, MAX_BATCH, MAX_STEP = 512, 4, 64


@dataclass(frozen=True)
class Built:
    """One checkpoint, for both targets, and what the double needs of it."""

    rtx: Path
    cpu: Path
    plans: list[PlanDouble]


@pytest.fixture(scope="module")
def built(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("rtx")
    quantize_checkpoint(Checkpoint(tiny_checkpoint), folder / "w4a16", method="rtn", group=64)
    checkpoint = Checkpoint(folder / "w4a16")
    options = RtxOptions(sms=(121, 89), dtype="fp16", max_batch=MAX_BATCH, max_step=MAX_STEP)
    build_engine(checkpoint, folder / "rtx", target=options, capacity=CAPACITY)
    build_engine(checkpoint, folder / "cpu", capacity=CAPACITY)
    write_raw_pool(checkpoint, folder / "raw.bin", no_progress, np.dtype(np.float16))
    return Built(folder / "rtx", folder / "cpu", plan_doubles(folder / "rtx", folder / "raw.bin"))


@dataclass
class Machine:
    """A machine with one GPU that is none."""

    cuda: DriverDouble
    trt: TrtDouble


@pytest.fixture
def machine(built: Built, monkeypatch: pytest.MonkeyPatch) -> Machine:
    driver = DriverDouble()
    trt = TrtDouble(tensorrt_rtx, driver, built.plans)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble())
    monkeypatch.setattr(cuda, "driver", driver)
    monkeypatch.setattr(plans, "trt", trt)
    monkeypatch.setattr(passes, "trt", trt)
    return Machine(driver, trt)


def prompts(engine: Engine, heldout: list[dict], count: int) -> list[list[int]]:
    chosen = [record["messages"] for record in heldout[::29][:count]]
    return [engine.tokenizer.encode(engine.tokenizer.apply_chat_template(messages)) for messages in chosen]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar"},
        {"mode": "linear_spec", "block_length": 16},
        {"mode": "linear_spec", "block_length": 7, "draft_threshold": 0.5, "adapter": False},
        {"mode": "diffusion", "block_length": 8},
    ],
    ids=str,
)
def test_tokens_are_the_cpu_targets(built: Built, heldout: list[dict], options: dict[str, Any]) -> None:
    expected, found = Engine(built.cpu), Engine(built.rtx)
    for prompt in prompts(expected, heldout, 6):
        decoding = DecodingOptions(max_tokens=60, **options)
        assert found.generate(prompt, decoding).token_ids == expected.generate(prompt, decoding).token_ids
