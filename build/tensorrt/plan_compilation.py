"""Compile both graphs with TensorRT and TriMode's plugins for this machine's GPU, on which TensorRT times the tactics.

Weights are inputs of the graphs, so the plans contain none, and both engines bind the same pool.
"""

from __future__ import annotations

from pathlib import Path

import tensorrt as trt

from trimode.build.gpu.plan_builder import BuilderProgress, HeldSignals, ProfileSizes, optional_inputs
from trimode.common.gpus import Gpu
from trimode.common.progress import Progress
from trimode.engine.kernel_library import KERNELS, KernelLibrary
from trimode.engine.manifest import Limits
from trimode.engine.targets.tensorrt import BUILDER_LOG, GRAPH, PLAN, TensorrtPlans, TensorrtSection
from trimode.model.step import ENGINES
from trimode.plugins.declarations import declare_plugins


class _WarningLog(trt.ILogger):  # type: ignore[misc]
    """Keeps warnings and errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.Severity.WARNING:
            self.lines.append(f"{severity.name}: {message}")


# TensorRT uses the first logger of a process for all builders.
_LOG = _WarningLog()


class _TensorrtMonitor(BuilderProgress, trt.IProgressMonitor):  # type: ignore[misc]
    def __init__(self, stage: str, progress: Progress, signals: HeldSignals) -> None:
        trt.IProgressMonitor.__init__(self)
        BuilderProgress.__init__(self, stage, progress, signals)


def compile_plans(
    folder: Path, section: TensorrtSection, limits: Limits, gpu: Gpu, progress: Progress
) -> TensorrtPlans:
    """Write ``engine.plan`` and ``builder.log``, the builder's warnings, next to each ``graph.onnx`` of ``folder``.

    Raises TriModeError if the folder has no kernels for ``gpu``.
    """
    declare_plugins(KernelLibrary(folder / KERNELS, gpu.compute_capability))
    profiles = _profiles(*limits.largest_pass)
    for name, _ in ENGINES:
        _compile(folder / name, section.plugins[name], profiles, progress)
    return TensorrtPlans(tensorrt=trt.__version__, gpu=gpu.name, compute_capability=gpu.compute_capability)


def _profiles(max_batch: int, max_step: int) -> list[ProfileSizes]:
    """Three profiles: one token; a block; a chunk of a prompt, which needs logits for one row only.

    TensorRT times tactics only at the optimal sizes of a profile. Every step length fits exactly one profile.
    """
    profiles = []
    for least, usual, most, usual_rows in ((1, 1, 1, 1), (2, 32, 64, 32), (65, max_step, max_step, 1)):
        if least <= max_step:
            step = (least, min(usual, max_step), min(most, max_step))
            rows = (1, min(usual_rows, max_step), min(most, max_step))
            profiles.append(ProfileSizes(max_batch, step, rows, optional_inputs(max_step)))
    return profiles


def _compile(engine: Path, plugins: int, profiles: list[ProfileSizes], progress: Progress) -> None:
    _LOG.lines.clear()
    builder = trt.Builder(_LOG)
    # Embeds the plugins' kernels, so that the plan runs without Python.
    network = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        | 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    )
    parser = trt.OnnxParser(network, _LOG)
    if not parser.parse_from_file(str(engine / GRAPH)):
        raise RuntimeError(f"TensorRT cannot parse {engine.name}/{GRAPH}: {parser.get_error(0)}")
    _refuse_expanded_functions(network, engine, plugins)
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # the KV pool is written in place
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            dims = [tensor.get_dimension_name(at) if size < 0 else size for at, size in enumerate(tensor.shape)]
            if any(isinstance(dim, str) for dim in dims):
                profile.set_shape(tensor.name, *sizes.of(dims))
        config.add_optimization_profile(profile)
    with HeldSignals() as signals:
        monitor = _TensorrtMonitor(engine.name, progress, signals)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.interruption is not None:
        raise monitor.interruption
    (engine / BUILDER_LOG).write_text("\n".join(_LOG.lines) + "\n", encoding="utf-8")
    if plan is None:
        raise RuntimeError(f"TensorRT on {engine.name}/{GRAPH}: {'; '.join(_LOG.lines) or 'no plan'}")
    (engine / PLAN).write_bytes(memoryview(plan))


def _refuse_expanded_functions(network: trt.INetworkDefinition, engine: Path, plugins: int) -> None:
    """Refuse a network in which the parser replaced plugin nodes by their ONNX functions: correct, but very slow."""
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    if (found := kinds.count(trt.LayerType.PLUGIN_V3)) != plugins:
        raise RuntimeError(f"TensorRT uses plugins for {found} of {plugins} plugin nodes of {engine.name}/{GRAPH}")
