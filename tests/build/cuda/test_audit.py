"""The audit of engines for target cuda: counts by hand, ranks, memory, and faults that it must name."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from scripts.gpu.random_w4a16_checkpoint import RANK, write_checkpoint
from tests.support.command import run_here
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.audit import audit_engine, host_bytes
from trimode.build.audit_report import print_report
from trimode.build.cuda import audit as cuda_audit
from trimode.build.cuda.audit import LaunchAudit, LaunchPass
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.roofline import GPUS
from trimode.common.errors import TriModeError
from trimode.engine.files import ADAPTER, POOL
from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import Checkpoint
from trimode.plugins.traffic import TensorTraffic, launch_traffic, moved_bytes

LAYERS, RANKS, CAPACITY, H100 = 2, 2, 1024, GPUS["h100"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the 3B shape's form."""
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", "3b", LAYERS, 2048)


def build(checkpoint: Path, out: Path, **options: object) -> Path:
    target = CudaTarget(**{"sms": (80, 90), "max_batch": 4, "max_step": 64} | options)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        UncompiledKernels(patch)
        build_engine(Checkpoint(checkpoint), out, target=target, capacity=CAPACITY)
    return out


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    return build(checkpoint, checkpoint.parent / "engine")


@pytest.fixture(scope="module")
def ranked(checkpoint: Path) -> Path:
    return build(checkpoint, checkpoint.parent / "ranked", tp=RANKS)


def count(engine: Path, name: str = "ar", batch: int = 1, step: int = 1, window: int = 512) -> LaunchPass:
    return LaunchAudit(engine, Manifest.read(engine)).count(name, batch, step, window, H100)


def test_the_launches_are_those_of_the_list(engine: Path) -> None:
    """A layer has four int4 products, attention and its merge; a draft has the adapter's first product as well."""
    for name, a_layer in (("ar", 6), ("diffusion", 7)):
        found = count(engine, name)
        assert found.kernels_a_layer == a_layer
        assert found.kernels == a_layer * LAYERS + 6  # embedding, rotations, two selections, the head and its merge
        assert found.kernels == sum(each.launches for each in found.launches)
        assert found.bytes == sum(each.launches * each.bytes for each in found.launches)
        assert found.int4_products == found.int4_matrices == 4 * LAYERS + 1
        assert found.exchanges == found.link_bytes == 0


def test_the_count_agrees_with_one_by_hand(engine: Path, checkpoint: Path) -> None:
    """The int4 products of one token read every integer and every scale in fp32 once; the rest of them is small."""
    tensors = dict(Checkpoint(checkpoint).tensors())
    integers = sum(array.nbytes for array in tensors.values() if array.dtype == "uint8")
    scales = sum(2 * array.nbytes for name, array in tensors.items() if name.endswith("weight_scale"))
    counted = count(engine).bytes_by_kind
    assert integers + scales < counted["int4 product"] < 1.01 * (integers + scales)
    config = Checkpoint(checkpoint).config
    window = LAYERS * 2 * 2 * config.kv_width
    long = count(engine, window=1024).bytes_by_kind["attention"] - count(engine, window=512).bytes_by_kind["attention"]
    assert 512 * window <= long < 1.02 * 512 * window
    adapter = count(engine, "diffusion").bytes_by_kind["product"]
    assert LAYERS * 2 * RANK * config.query_width <= adapter < 1.02 * LAYERS * 2 * RANK * config.query_width


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_a_pass_of_one_token_moves_hardly_more_than_the_least_bytes(engine: Path, name: str) -> None:
    """The bound counts scales in 16 bits, and the kernels read them in fp32. It has no results of splits."""
    for batch, window in ((1, 512), (1, 1024), (4, 512)):
        found = count(engine, name, batch=batch, window=window)
        assert 1 < found.ratio < 1.07


def test_ranks_move_their_part_and_exchange_two_sums_a_layer(engine: Path, ranked: Path) -> None:
    hidden = Manifest.read(engine).model.hidden_size
    for name in ("ar", "diffusion"):
        whole, part = (count(folder, name, step=8) for folder in (engine, ranked))
        assert part.exchanges == 2 * LAYERS
        assert part.link_bytes == 2 * LAYERS * (RANKS - 1) * 8 * hidden * 2
        assert part.bytes_by_kind["int4 product"] == pytest.approx(
            whole.bytes_by_kind["int4 product"] / RANKS, rel=0.02
        )
        assert part.int4_products == part.int4_matrices == 4 * LAYERS + 1


def test_the_memory_is_that_of_the_files_and_of_the_largest_pass(engine: Path) -> None:
    manifest = Manifest.read(engine)
    held = LaunchAudit(engine, manifest).memory()
    assert held["weights"] == (engine / POOL).stat().st_size
    assert held["draft adapter"] == (engine / ADAPTER).stat().st_size
    assert held["KV pool"] == LAYERS * 2 * 4 * CAPACITY * manifest.model.kv_width * 2
    # At least the gated halves of the largest pass in 16 bits; at most a few tensors of its size in fp32.
    mlp = 4 * 64 * manifest.model.intermediate_size
    assert 2 * mlp < held["activations"] < 20 * 4 * mlp


def test_the_bytes_between_host_and_gpu_are_those_of_the_step_contract(engine: Path) -> None:
    found = host_bytes(Manifest.read(engine), candidates=1, block_length=8)
    assert found.to_device == 2 * 8 * (3 * 8 + 1) + 8 * 8 + 8 + 2
    assert found.to_host == 2 * 8 * (4 + 8 + 4)


def test_the_report(ranked: Path) -> None:
    report = audit_engine(ranked, acceptance=6.82)
    assert (report.target, report.gpu, report.ranks) == ("cuda", "a100-80gb", RANKS)  # the first GPU of its kernels
    assert {(found.step, found.window) for found in report.passes} == {(s, w) for s in (1, 8, 32) for w in (512, 1024)}
    assert report.bounds[0].ar_ms < report.bounds[1].ar_ms
    shown = StringIO()
    print_report(report, Console(file=shown, width=200))
    for words in ("target cuda; nothing was run", "AllReduceForNorm", "kernels by compute capability: 8.0", "KV pool"):
        assert words in shown.getvalue()


def test_the_command_audits_as_json(engine: Path) -> None:
    found = json.loads(run_here("audit", engine, "--gpu", "h100", "--step", "1", "--window", "512", "--json").stdout)
    assert [row["engine"] for row in found["passes"]] == ["ar", "diffusion"]
    assert sum(each["launches"] for each in found["passes"][0]["launches"]) == found["passes"][0]["kernels"]


def test_a_gpu_without_kernels_is_refused(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    """Kernels for 8.0 run on DGX Spark; those for 9.0 alone do not."""
    assert audit_engine(engine, gpu="dgx-spark", steps=(1,), windows=(512,), acceptance=6.82).gpu == "dgx-spark"
    hopper = build(checkpoint, tmp_path / "hopper", sms=(90,))
    found = run_here("audit", hopper, "--gpu", "dgx-spark")
    assert found.returncode == 2
    assert "has kernels for compute capabilities 90, and this GPU's is 121; build with --sm 121" in found.stderr


def test_an_fp32_engine_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match="is fp32, which is for proofs"):
        audit_engine(build(checkpoint, tmp_path / "out", dtype="fp32"), acceptance=6.82)


# Planted faults.


@pytest.mark.parametrize("name", ["ar/launches.json", "kernels/sm_90/kernels.json"])
def test_a_damaged_file_is_named(engine: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(engine, tmp_path / "engine", ignore=shutil.ignore_patterns("pool.bin"))
    (copy / name).write_bytes((copy / name).read_bytes()[:-9])
    found = run_here("audit", copy)
    assert found.returncode == 2
    assert name in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_missing_kernel_is_named(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tactics of the masked head are left out of the index for 9.0; no pass of the tables needs them."""
    copy = shutil.copytree(engine, tmp_path / "engine", ignore=shutil.ignore_patterns("pool.bin"))
    index = copy / "kernels/sm_90/kernels.json"
    content = json.loads(index.read_text())
    content["kernels"] = {name: entry for name, entry in content["kernels"].items() if "HeadNormedMasked" not in name}
    index.write_text(json.dumps(content))
    monkeypatch.setattr(cuda_audit, "verify_file", lambda *_: None)
    with pytest.raises(TriModeError, match=r"kernels\.json lacks Int4HeadNormedMasked"):
        audit_engine(copy, acceptance=6.82)


def test_weights_that_are_read_twice_are_noticed(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = count(engine)

    def twice(*arguments: object) -> dict[str, TensorTraffic]:
        counted = launch_traffic(*arguments)  # type: ignore[arg-type]
        if "packed" in counted:
            counted["packed"].loaded *= 2
        return counted

    monkeypatch.setattr(cuda_audit, "launch_traffic", twice)
    assert moved_bytes({"packed": TensorTraffic(loaded=8 << 20, needed=4 << 20)}) == 8 << 20
    assert count(engine).ratio > 1.8 * expected.ratio
