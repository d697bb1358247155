"""Target rtx with several ranks: plans whose kernels gather the partial sums of all ranks, built without a GPU."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from tests.build.rtx.test_engines import write_random_checkpoint
from trimode.build.audit import audit_engine
from trimode.build.audit_report import print_report
from trimode.build.engine_builder import build_engine
from trimode.build.rtx.audit import audit_pass, kind_of, read_plans
from trimode.build.rtx.target import RtxTarget
from trimode.build.scale_out import LINKS
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.engine.targets.rtx import RtxSection
from trimode.model.checkpoint import Checkpoint
from trimode.runtime.loading import load_engine

LAYERS, RANKS = 2, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the 3B shape's form, with 8 KV heads."""
    return write_random_checkpoint("3b", tmp_path_factory.mktemp("wide") / "checkpoint", LAYERS)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    out = checkpoint.parent / "engine"
    target = RtxTarget(sms=(121,), max_batch=4, max_step=64, tp=RANKS)
    build_engine(Checkpoint(checkpoint), out, target=target, capacity=1024)
    return out


def test_each_rank_has_plans_of_its_part(engine: Path) -> None:
    manifest = Manifest.read(engine)
    assert manifest.ranks == RANKS
    for rank in range(RANKS):
        for name in ("ar", "diffusion"):
            graph = onnx.load(engine / f"rank{rank}" / name / "graph.onnx", load_external_data=False).graph
            gathered = [node for node in graph.node if node.op_type == "DistCollective"]
            assert len(gathered) == 2 * LAYERS
            caches = [value for value in graph.input if value.name.startswith("k_cache")]
            heads = {cache.type.tensor_type.shape.dim[1].dim_value for cache in caches}
            assert heads == {manifest.model.num_key_value_heads // RANKS}
    plans = manifest.section(RtxSection).plans
    for rank in range(RANKS):
        pool = (engine / f"rank{rank}" / "weights" / "pool.bin").stat().st_size
        assert pool == sum(splice.bytes for splice in plans[rank].ar.splices)


@pytest.mark.parametrize("step", [1, 32])
def test_the_audit_counts_the_bytes_between_ranks(engine: Path, step: int) -> None:
    """Every partial sum is in 16 bits; all int4 matrices are fused, as in plans for one GPU."""
    hidden = Manifest.read(engine).model.hidden_size
    for plan in read_plans(engine):
        found = audit_pass(plan, 1, step, 512)
        assert found.exchanges == 2 * LAYERS
        assert found.link_bytes == 2 * LAYERS * (RANKS - 1) * step * hidden * 2
        assert found.bytes_by_kind["exchange"] == 2 * LAYERS * (1 + RANKS) * step * hidden * 2
        assert found.int4_products == found.int4_matrices == 4 * LAYERS + 1
        assert found.lone_dequantisations == 0
        assert step > 1 or found.ratio < 1.1  # a pass looks up rows of the embedding, of which every rank has all


def test_the_kernel_behind_an_exchange_adds_the_parts(engine: Path) -> None:
    """The kernel behind each exchange adds the parts of all ranks."""
    for plan in read_plans(engine):
        after = [
            following
            for kernel, following in zip(plan.kernels, plan.kernels[1:], strict=False)
            if kind_of(kernel) == "exchange"
        ]
        assert len(after) == 2 * LAYERS
        for kernel in after:
            operators = {source.rpartition("/")[2].rpartition("_")[0] for source in kernel.sources}
            assert {"Slice", "Add"} <= operators


def test_plans_of_ranks_are_not_run(engine: Path) -> None:
    with pytest.raises(TriModeError, match=r"among 2 ranks; target rtx builds and audits such plans, but does not run"):
        load_engine(engine, verify=False)


def test_each_rank_needs_two_kv_heads(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match=r"has 8 KV heads; TensorRT-RTX's attention needs 2 on each of --tp 8 ranks"):
        build_engine(Checkpoint(checkpoint), tmp_path / "engine", target=RtxTarget(sms=(121,), tp=8))


def test_the_report_has_the_time_of_exchanges_and_other_numbers_of_gpus(engine: Path) -> None:
    slow, fast = (audit_engine(engine, gpu="h100", acceptance=6.82, link=link) for link in ("pcie5", "nvlink4"))
    latency = LINKS["pcie5"].latency - LINKS["nvlink4"].latency
    bytes_ = next(row.link_bytes for row in slow.passes if row.step == 1)
    bandwidth = bytes_ / LINKS["pcie5"].bandwidth - bytes_ / LINKS["nvlink4"].bandwidth
    assert slow.bounds[0].ar_ms - fast.bounds[0].ar_ms == pytest.approx(1e3 * (2 * LAYERS * latency + bandwidth))
    assert [row.ranks for row in slow.of_ranks[512]] == [1, 2, 4, 8]
    shown = StringIO()
    print_report(fast, Console(file=shown, width=200))
    assert f"{RANKS} ranks; the tables above are of one of them" in shown.getvalue()
    assert "this network on several GPUs, one request, NVLink 4" in shown.getvalue()
    with pytest.raises(TriModeError, match="link infiniband is not known; known are nvlink5"):
        audit_engine(engine, gpu="h100", acceptance=6.82, link="infiniband")
