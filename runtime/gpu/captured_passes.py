"""Single passes and self-speculation cycles, each of which is one CUDA graph that includes its copies.

The first pass of a bucket runs without a graph, since TensorRT may compile kernels for the shape then; after it, the
same work is captured. A pass that does not begin at slot 0 is one of many, since each of its slots is a bucket. It is
captured when it has run :data:`RUNS_BEFORE_CAPTURE` times, and only :data:`MOST_MOVED_GRAPHS` of them are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Speculated
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import Device, Graph, Runs
from trimode.runtime.gpu.gpu_network import Enqueue
from trimode.runtime.gpu.pass_memory import PassMemory

# Without a graph, a verification of 32 tokens took 4.5 ms on an H100, and with one 2.9. A capture takes 10 to 20 ms.
RUNS_BEFORE_CAPTURE = 8
# A graph takes about a megabyte.
MOST_MOVED_GRAPHS = 64


class MovedGraphs:
    """The graphs of passes that do not begin at slot 0. captured: their number."""

    def __init__(self) -> None:
        self.captured = 0

    def admit(self, runs: int) -> bool:
        """Whether a pass that has run so many times is captured. It then counts."""
        admitted = runs >= RUNS_BEFORE_CAPTURE and self.captured < MOST_MOVED_GRAPHS
        self.captured += admitted
        return admitted


class BoundPass(NamedTuple):
    """One engine at one bucket: its inputs and results, and how its kernels get onto the stream."""

    memory: PassMemory
    enqueue: Enqueue


class CapturedWork:
    """Work of the stream that is captured once it has run. moved: of work that does not begin at slot 0."""

    def __init__(self, device: Device, enqueue: Callable[[], None], moved: MovedGraphs | None) -> None:
        self._device = device
        self._enqueue = enqueue
        self._moved = moved
        self._runs = 0
        self._graph: Graph | None = None

    def run(self) -> None:
        """Run the work and wait for it, with one synchronisation."""
        if self._graph is not None:
            self._device.launch(self._graph)
            self._device.synchronize()
        else:
            self._enqueue()
            self._device.synchronize()
            self._runs += 1
            if self._moved is None or self._moved.admit(self._runs):
                self._graph = self._device.capture(self._enqueue)


class SinglePass:
    """One pass of one engine."""

    def __init__(self, device: Device, bound: BoundPass, moved: MovedGraphs | None) -> None:
        self._bound = bound
        self._work = CapturedWork(device, self._enqueue, moved)

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self._bound.memory.put(step)
        self._work.run()
        return self._bound.memory.take(step)

    def _enqueue(self) -> None:
        self._bound.memory.upload()
        self._bound.enqueue()
        self._bound.memory.download()


class SpeculationCycle:
    """A draft of whole blocks and the causal pass that verifies it, with one synchronisation for both.

    The device copies the drafted tokens to the causal pass's input.
    """

    def __init__(
        self, device: Device, bucket: Bucket, draft: BoundPass, commit: BoundPass, moved: MovedGraphs | None
    ) -> None:
        self._device = device
        self._bucket = bucket
        self._draft = draft
        self._commit = commit
        self._work = CapturedWork(device, self._enqueue, moved)

    def run(self, draft: BidirectionalStep, commit: CausalStep) -> Speculated:
        self._draft.memory.put(draft)
        self._commit.memory.put(commit)
        self._work.run()
        return Speculated(self._draft.memory.take(draft), self._commit.memory.take(commit))

    def _enqueue(self) -> None:
        for bound in (self._draft, self._commit):
            bound.memory.upload()
        self._draft.enqueue()
        self._copy_drafted()
        self._commit.enqueue()
        for bound in (self._draft, self._commit):
            bound.memory.download()

    def _copy_drafted(self) -> None:
        """Copy the best token of every row to the commit's input, except the first row: it holds the pending token."""
        found, pitch = self._draft.memory.token_entries("top_tokens")
        wanted, width = self._commit.memory.token_entries("input_ids")
        step = self._bucket.step
        for sequence in range(self._bucket.batch if step > 1 else 0):
            first = sequence * step + 1
            source, to = Runs(found + first * pitch, pitch), Runs(wanted + first * width, width)
            self._device.copy_rows(to, source, width, step - 1)
