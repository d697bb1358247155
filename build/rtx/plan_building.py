"""Compile both graphs with TensorRT-RTX for a list of GPUs. Both plans share one file of weights.

The builder needs no GPU. Only its log shows what it built, so the log is checked: a warning that is not in
:data:`EXPECTED_MESSAGES` fails the build, and the kernels that the log lists become ``layers.json``. The builder can
strip weights itself (``STRIP_PLAN``), but only on a machine with a GPU. Therefore the weights are cut out of complete
plans.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import tensorrt_rtx as trt

from trimode.build.gpu.plan_builder import BuilderProgress, HeldSignals, ProfileSizes, optional_inputs
from trimode.build.graph.network import NetworkOptions, build_network
from trimode.build.graph.raw_pool import RawPool, write_raw_pool
from trimode.build.rtx.graph_form import KEY_HEADS, refuse_disorder, tensorrt_form
from trimode.build.rtx.kernel_list import KernelList, parse_kernels
from trimode.build.rtx.target import RtxTarget
from trimode.build.rtx.weight_section import SharedRun, cut_runs, find_shared_runs
from trimode.build.sharded_checkpoint import ShardedCheckpoint, sharded
from trimode.build.target import Built
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress
from trimode.engine.files import POOL, rank_folder
from trimode.engine.manifest import Limits, PoolEntry
from trimode.engine.precision import NUMPY_TYPES
from trimode.engine.targets.rtx import COMPUTE_CAPABILITIES, GRAPH, KERNELS, PLAN, RankPlans, RtxSection
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig
from trimode.model.step import ENGINES

# The share of the constants' bytes that both plans must have in common. The builder folds a few small constants into
# kernels or widens them; no matrix may be missing.
LEAST_SHARED = 0.99
# TensorRT-RTX refuses to compile the attention of a network with a single KV head.
LEAST_KV_HEADS = 2
# Attention that reads the KV pool in place exists from this compute capability on.
_FIRST_SM_IN_PLACE = 89
# Warnings that the builder may log, and why they are harmless.
EXPECTED_MESSAGES = {
    r"Make sure (in|out)put \w+ has Int64 binding": "the step contract binds int64",
    r"cudaError(NoDevice| 35| 100)|CUDA initialization failure|no CUDA-capable device": "building needs no GPU",
    r"driver version is insufficient|Unable to determine GPU memory|CUDA lazy loading": "building needs no GPU",
}


class _BuilderLog(trt.ILogger):  # type: ignore[misc]
    """Keeps every message: the list of kernels is part of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.messages: list[str] = []
        self.complaints: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.messages.append(message)
        expected = any(re.search(pattern, message) for pattern in EXPECTED_MESSAGES)
        if severity <= trt.ILogger.Severity.WARNING and not expected:
            self.complaints.append(message)


# TensorRT-RTX uses the first logger of a process for all builders.
_LOG = _BuilderLog()


class _RtxMonitor(BuilderProgress, trt.IProgressMonitor):  # type: ignore[misc]
    def __init__(self, stage: str, progress: Progress, signals: HeldSignals) -> None:
        trt.IProgressMonitor.__init__(self)
        BuilderProgress.__init__(self, stage, progress, signals)


def build_plans(checkpoint: Checkpoint, folder: Path, target: RtxTarget, limits: Limits, progress: Progress) -> Built:
    """Write both plans of each rank, their graphs and lists of kernels, and its pool into ``folder``."""
    _refuse_unknown_gpus(target.sms)
    parts = sharded(checkpoint, target.tp)
    _refuse_single_heads(checkpoint, target.tp)
    built = []
    for rank, part in enumerate(parts):
        of_rank = folder / rank_folder(rank, target.tp)
        of_rank.mkdir(exist_ok=True)
        built.append(_build_rank(part, checkpoint, of_rank, target, limits, progress))
    section = RtxSection(tensorrt_rtx=trt.__version__, sms=target.sms, plans=tuple(plans for plans, _ in built))
    return Built(section, built[0][1], target.tp)


def _refuse_single_heads(checkpoint: Checkpoint, ranks: int) -> None:
    if ranks > 1 and checkpoint.config.num_key_value_heads // ranks < LEAST_KV_HEADS:
        raise TriModeError(
            f"{checkpoint.folder} has {checkpoint.config.num_key_value_heads} KV heads; TensorRT-RTX's attention needs "
            f"{LEAST_KV_HEADS} on each of --tp {ranks} ranks"
        )


def _build_rank(
    part: ShardedCheckpoint,
    checkpoint: Checkpoint,
    folder: Path,
    target: RtxTarget,
    limits: Limits,
    progress: Progress,
) -> tuple[RankPlans, tuple[PoolEntry, ...]]:
    """Write the plans of a rank; returns how they are assembled, and the ranges of its pool.

    part: of ``checkpoint``, which the rank holds. folder: of the rank.
    """
    options = NetworkOptions(
        top_k=limits.top_k,
        adapter=checkpoint.adapter is not None,
        activations=target.dtype,
        capacity=limits.capacity,
        kv_read="view" if min(target.sms) >= _FIRST_SM_IN_PLACE else "window",
        rotate_together=True,
        select_by_product=True,
        masks="apart",
        ranks=target.tp,
        sums="gathered",
    )
    adapter_rank = checkpoint.adapter.config.r if checkpoint.adapter else 0
    sizes = _profile_sizes(part.config, adapter_rank, target, limits)
    plans, constants = [], []
    with TemporaryDirectory(dir=folder) as temporary:
        pool = write_raw_pool(part, Path(temporary) / "raw.bin", progress, NUMPY_TYPES[options.activations])
        checkpoint.unmap()
        probe = _first_bytes(pool)
        for name, pattern in ENGINES:
            graph = build_network(part.config, pool, pattern, options)
            constants.append(_pooled_constants(graph))
            _refuse_differing(constants)
            engine = folder / name
            engine.mkdir()
            onnx.save(graph, engine / GRAPH)
            layers = part.config.num_hidden_layers
            if options.kv_read == "view":
                graph = tensorrt_form(graph, layers)
            source = Path(temporary) / f"{name}.onnx"
            onnx.save(graph, source)
            plan, kernels = _compile(graph, source, engine, target.sms, sizes, progress)
            if options.kv_read == "view":
                refuse_disorder(kernels.root, layers)
            plans.append(plan)
    progress("weights", 0, 1)
    first, second = (np.memmap(plan, np.uint8, mode="r") for plan in plans)
    runs = find_shared_runs(first, second, probe)
    _refuse_private_constants(runs)
    (folder / POOL).parent.mkdir()
    ar = cut_runs(plans[0], [(run.first, run.length) for run in runs], folder / POOL)
    diffusion = cut_runs(plans[1], [(run.second, run.length) for run in runs], None)
    shared = (folder / POOL).stat().st_size
    if shared < pool.stored * LEAST_SHARED:
        raise RuntimeError(
            f"the plans share {shared} bytes of weights of {pool.stored}: the engines' constants differ, or are in "
            "another order"
        )
    progress("weights", 1, 1)
    ranges = (
        PoolEntry(name=f"run {number}", offset=splice.pool_offset, bytes=splice.bytes)
        for number, splice in enumerate(ar.splices)
    )
    return RankPlans(ar=ar, diffusion=diffusion), tuple(ranges)


def _profile_sizes(config: ModelConfig, rank: int, target: RtxTarget, limits: Limits) -> ProfileSizes:
    """rank: of the draft adapter, 0 without one."""
    kv_heads, capacity = config.num_key_value_heads, limits.capacity
    others = {
        "window": (1, min(512, capacity), capacity),
        **optional_inputs(target.max_step),
        "rank": (rank, rank, rank),
        KEY_HEADS: (kv_heads, kv_heads, kv_heads * target.max_batch),
    }
    steps = (1, min(32, target.max_step), target.max_step)
    return ProfileSizes(target.max_batch, steps, steps, others)


def _refuse_unknown_gpus(sms: tuple[int, ...]) -> None:
    for sm in sms:
        if sm not in COMPUTE_CAPABILITIES:
            raise TriModeError(
                f"--sm {sm}: TensorRT-RTX builds for {', '.join(map(str, COMPUTE_CAPABILITIES))}; "
                "datacentre parts need the target tensorrt"
            )


def _compile(
    graph: onnx.ModelProto, source: Path, engine: Path, sms: tuple[int, ...], sizes: ProfileSizes, progress: Progress
) -> tuple[Path, KernelList]:
    log = _LOG
    log.begin()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise RuntimeError(f"TensorRT-RTX cannot parse {engine.name}/{GRAPH}: {parser.get_error(0)}")
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if tensor.name.startswith("k_view."):
            tensor.allowed_formats = 1 << int(trt.TensorFormat.HWC8)
    config = builder.create_builder_config()
    # At a lower verbosity the log has only numbers of kernels.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # The runtime captures passes as CUDA graphs over its own memory. With this flag the build fails if the plan cannot.
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    profile = builder.create_optimization_profile()
    for value in graph.graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if any(isinstance(dim, str) for dim in dims):
            profile.set_shape(value.name, *sizes.of(dims))
    config.add_optimization_profile(profile)
    with HeldSignals() as signals:
        monitor = _RtxMonitor(engine.name, progress, signals)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.interruption is not None:
        raise monitor.interruption
    if log.complaints or plan is None:
        raise RuntimeError(f"TensorRT-RTX on {engine.name}/{GRAPH}: {'; '.join(log.complaints) or 'no plan'}")
    path = engine / PLAN
    path.write_bytes(memoryview(plan))
    kernels = parse_kernels(log.messages)
    (engine / KERNELS).write_text(kernels.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path, kernels


def _refuse_private_constants(runs: list[SharedRun]) -> None:
    """Refuse plans whose weight sections differ: one allocation can serve only identical sections."""
    for run, following in pairwise(runs):
        lone = [after - before - run.length for before, after in zip(run, following, strict=True)][:2]
        raise RuntimeError(
            f"the plans' weight sections differ after {run.length} bytes: {lone[0]} bytes are only in the AR plan, "
            f"{lone[1]} only in the diffusion plan"
        )


def _pooled_constants(graph: onnx.ModelProto) -> dict[str, str]:
    """The location in the raw pool of each matrix and vector of the graph."""
    return {
        tensor.name: " ".join(f"{field.key} {field.value}" for field in tensor.external_data)
        for tensor in graph.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def _refuse_differing(constants: list[dict[str, str]]) -> None:
    """Refuse graphs that use different ranges of the pool: their plans could not share weights."""
    first, last = constants[0], constants[-1]
    for name in sorted(first.keys() | last.keys()):
        if first.get(name) != last.get(name):
            raise RuntimeError(f"the engines' constant {name} differs: {first.get(name)} and {last.get(name)}")


def _first_bytes(pool: RawPool) -> bytes:
    """The first bytes of the embedding table, enough to find it in a plan."""
    with pool.path.open("rb") as file:
        file.seek(pool.embed_tokens.offset)
        return file.read(min(4096, pool.embed_tokens.length))
