"""Count the launches of engines for target ``cuda`` and the bytes that each moves on a GPU. No GPU is needed.

A pass is planned as the runtime plans it, from ``launches.json``, with the tactics of the kernels that the GPU has.
:mod:`trimode.plugins.traffic` counts each launch tile by tile; its counts of loads and stores are those of the
interpreted kernels. A pass is greedy and has neither token masks nor asked ids.

A kernel in which ranks add up partial sums reads its own from memory. Those of the others come over the link, and are
counted in ``link_bytes`` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mode
from typing import Literal, NamedTuple

from pydantic import BaseModel

from trimode.build.graph.raw_pool import merged_matrices
from trimode.build.pass_audit import PassAudit, kv_pool_bytes, least_work
from trimode.build.roofline import REAL_BYTES, GpuModel
from trimode.common.errors import TriModeError
from trimode.engine.files import ADAPTER, POOL, rank_folder, verify_file
from trimode.engine.kernel_library import INDEX, KERNELS, KernelLibrary, library_for
from trimode.engine.launch_list import LAUNCHES, LaunchList
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cuda import CudaSection
from trimode.model.shards import Shard
from trimode.model.step import ENGINES
from trimode.plugins.arena import arena_of, tensor_bytes
from trimode.plugins.launches import PassShape, PlannedLaunch, plan_pass
from trimode.plugins.operators import (
    AllReduce,
    Attend,
    DenseHead,
    DenseProduct,
    Int4Product,
    KvWrite,
    MergeCandidates,
    MergeSplits,
    Operator,
)
from trimode.plugins.traffic import cache_bytes, launch_traffic, moved_bytes

Kind = Literal["int4 product", "product", "attention", "KV write", "exchange", "head", "element-wise"]
_KINDS: tuple[tuple[type[Operator] | tuple[type[Operator], ...], Kind], ...] = (
    (Int4Product, "int4 product"),
    (DenseProduct, "product"),
    ((Attend, MergeSplits), "attention"),
    (KvWrite, "KV write"),
    (AllReduce, "exchange"),
    ((DenseHead, MergeCandidates), "head"),
)


class LaunchCount(BaseModel):
    """Equal launches of a pass. tile: rows and columns of a program, if the operator has tiles. bytes: that one launch
    moves through memory. from_cache: bytes between the L2 cache and the multiprocessors.
    """

    operator: str
    kind: Kind
    tile: str
    launches: int
    bytes: int
    from_cache: int


class LaunchPass(PassAudit):
    """launches: by operator, sizes and tactic, in the order of their first use."""

    launches: list[LaunchCount]

    def cells(self) -> dict[str, str]:
        from_cache = sum(found.launches * found.from_cache for found in self.launches)
        return super().cells() | {"L2 MB": f"{from_cache / 1e6:.1f}"}

    def parts(self) -> list[dict[str, str]]:
        return [
            {
                "operator": each.operator,
                "kind": each.kind,
                "tile": each.tile,
                "launches": str(each.launches),
                "MB each": f"{each.bytes / 1e6:.3f}",
                "share": f"{each.launches * each.bytes / self.bytes:.1%}",
            }
            for each in self.launches
        ]


class _Launched(NamedTuple):
    planned: PlannedLaunch
    counted: LaunchCount


class LaunchAudit:
    """Both engines of an engine directory, of rank 0 if it has several; the others have the same launches.

    Raises TriModeError if a file that is read was changed after the build, a kernel of a pass is missing, or the engine
    is fp32.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.sms = manifest.section(CudaSection).sms
        self.candidates = 1
        self._real = manifest.precision.kv_cache
        if self._real == "fp32":
            raise TriModeError(f"{folder} is fp32, which is for proofs; audit a build in bf16 or fp16")
        for entry in manifest.files:
            if entry.path.endswith((LAUNCHES, INDEX)):
                verify_file(folder, entry)
        of_rank = rank_folder(0, manifest.ranks)
        self._kernels = folder / KERNELS
        self._engines = {name: LaunchList.read(folder / of_rank / name) for name, _ in ENGINES}
        self._stored = {entry.path: entry.bytes for entry in manifest.files}
        self._of_rank = of_rank
        for sm in self.sms:
            self._refuse_missing_kernels(KernelLibrary(self._kernels, sm))

    def count(self, engine: str, batch: int, step: int, window: int, gpu: GpuModel) -> LaunchPass:
        launched = list(self._launched(engine, batch, step, window, gpu))
        by_kind: Counter[Kind] = Counter()
        equal: Counter[tuple[str, str, int]] = Counter()
        counts: dict[tuple[str, str, int], LaunchCount] = {}
        for _, found in launched:
            by_kind[found.kind] += found.bytes
            key = found.operator, found.tile, found.bytes
            equal[key] += 1
            counts.setdefault(key, found)
        manifest, exchanges = self.manifest, [each for each, found in launched if found.kind == "exchange"]
        config = Shard(0, manifest.ranks).config(manifest.model)
        bound, flops = least_work(manifest, engine, batch, step, window, self.candidates)
        total = sum(by_kind.values())
        layers = Counter(layer for each, _ in launched if (layer := _layer_of(each)) is not None)
        sent = sum(tensor_bytes(each.node.fixed["partial"], "real", self._real) for each in exchanges)
        return LaunchPass(
            engine=engine,
            batch=batch,
            step=step,
            window=window,
            kernels=len(launched),
            kernels_a_layer=mode(layers.values()),
            int4_products=sum(found.kind == "int4 product" for _, found in launched),
            int4_matrices=sum(manifest.precision.all_int4(modules) for modules in merged_matrices(config)),
            bytes=total,
            bound=bound,
            ratio=total / bound,
            flops=flops,
            bytes_by_kind={kind: count for kind, count in by_kind.most_common() if count},
            exchanges=len(exchanges),
            link_bytes=(manifest.ranks - 1) * sent,
            launches=[found.model_copy(update={"launches": equal[key]}) for key, found in counts.items()],
        )

    def memory(self) -> dict[str, int]:
        held = {"weights": self._stored[(self._of_rank / POOL).as_posix()]}
        if self.manifest.adapter is not None:
            held["draft adapter"] = self._stored[(self._of_rank / ADAPTER).as_posix()]
        plans = arena_of(list(self._engines.values()), self._real, self.manifest.limits)
        return held | {"KV pool": kv_pool_bytes(self.manifest), "activations": max(plan.size for plan in plans)}

    def notes(self) -> list[str]:
        kernels = ", ".join(
            f"{sm // 10}.{sm % 10}: {len(KernelLibrary(self._kernels, sm).index.kernels)}" for sm in self.sms
        )
        return [
            "L2 MB: bytes between the L2 cache and the multiprocessors",
            f"kernels by compute capability: {kernels}; every launch of any pass has one for each",
        ]

    def _launched(self, engine: str, batch: int, step: int, window: int, gpu: GpuModel) -> Iterator[_Launched]:
        """The launches of a pass, each counted. The rows before the step are those of the window."""
        library = KernelLibrary(self._kernels, library_for(self._kernels, gpu.compute_capability))
        shape = PassShape(batch, step, step, self.manifest.limits.capacity, self.candidates, masked=False, asked=0)
        pattern, known = dict(ENGINES)[engine], dict[str, LaunchCount]()
        for planned in plan_pass(self._engines[engine], shape):
            operator, node = planned.operator, planned.node
            names = {number: operator.kernel_name(node, number) for number in operator.tactics(node)}
            number = operator.default_tactic(node, library.available(names))
            key = f"{names[number]} {node.fixed} {node.attributes}"
            if key not in known:
                tactic = operator.tactics(node)[number]
                traffic = launch_traffic(operator, node, tactic, pattern, [window - step] * batch, REAL_BYTES)
                sides = [str(tactic.constants[side]) for side in ("BLOCK_M", "BLOCK_N") if side in tactic.constants]
                known[key] = LaunchCount(
                    operator=operator.name,
                    kind=kind_of(operator),
                    tile="x".join(sides),
                    launches=1,
                    bytes=moved_bytes(traffic),
                    from_cache=cache_bytes(traffic),
                )
            yield _Launched(planned, known[key])

    def _refuse_missing_kernels(self, library: KernelLibrary) -> None:
        """Raise TriModeError if a launch of any pass has no kernel: they depend on fixed sizes and on these choices."""
        limits = self.manifest.limits
        for launches, top_k, masked in product(self._engines.values(), (1, limits.top_k), (False, True)):
            for planned in plan_pass(launches, PassShape(1, 1, 1, limits.capacity, top_k, masked, asked=1)):
                operator, node = planned.operator, planned.node
                library.available({number: operator.kernel_name(node, number) for number in operator.tactics(node)})


def kind_of(operator: Operator) -> Kind:
    return next((kind for types, kind in _KINDS if isinstance(operator, types)), "element-wise")


def _layer_of(planned: PlannedLaunch) -> str | None:
    """The layer of a launch, from the name of its first result, such as ``layers.3/qkv``."""
    layer = planned.outputs[0].partition("/")[0]
    return layer if layer.startswith("layers.") else None
