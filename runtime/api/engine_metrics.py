"""Prometheus metrics of an engine: its counts at the time of the scrape, and histograms of finished answers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.request_output import RequestOutput

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)


class _EngineCollector(Collector):
    def __init__(self, llm: EngineLLM) -> None:
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        stats = self._llm.stats()
        yield GaugeMetricFamily("trimode_requests_running", "Answers in a slot.", stats.running)
        yield GaugeMetricFamily("trimode_requests_waiting", "Answers that wait for a slot.", stats.waiting)
        yield GaugeMetricFamily("trimode_slots", "Slots of the KV pool.", stats.slots)
        yield GaugeMetricFamily(
            "trimode_prefix_cache_bytes", "Bytes of KV rows kept for reuse.", stats.prefix_cache_bytes
        )
        yield CounterMetricFamily("trimode_steps", "Steps of the scheduler.", stats.steps)
        # Sums over finished answers.
        yield CounterMetricFamily("trimode_answers", "Finished answers.", stats.finished)
        yield CounterMetricFamily("trimode_tokens_emitted", "Tokens of answers.", stats.emitted)
        yield CounterMetricFamily("trimode_tokens_drafted", "Drafted tokens.", stats.counts.drafted)
        yield CounterMetricFamily("trimode_tokens_accepted", "Drafted tokens that were emitted.", stats.counts.accepted)
        yield CounterMetricFamily("trimode_tokens_copied", "Drafted tokens that lookup copied.", stats.counts.copied)
        yield CounterMetricFamily(
            "trimode_tokens_copied_accepted", "Copied tokens that were emitted.", stats.counts.accepted_copies
        )
        yield CounterMetricFamily(
            "trimode_tokens_cached", "Prompt tokens whose KV rows were reused.", stats.counts.cached_tokens
        )
        yield CounterMetricFamily("trimode_cycles", "Finished blocks.", stats.counts.cycles)
        yield CounterMetricFamily("trimode_trees", "Cycles with drafts verified as trees.", stats.counts.trees)
        yield CounterMetricFamily("trimode_lookups", "Cycles with copied drafts.", stats.counts.lookups)
        passes = CounterMetricFamily("trimode_passes", "Passes that answers took part in.", labels=["kind"])
        for kind in ("prefill", "draft", "denoise", "commit"):
            passes.add_metric([kind], getattr(stats.counts, kind))
        yield passes


class EngineMetrics:
    """registry: of these metrics alone."""

    def __init__(self, llm: EngineLLM) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(llm))
        self._first_token = self._histogram("trimode_time_to_first_token_seconds", "From arrival.", SECONDS)
        self._answer = self._histogram("trimode_answer_seconds", "From arrival to the last token.", SECONDS)
        self._tokens = self._histogram("trimode_answer_tokens", "Tokens of finished answers.", TOKENS)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, buckets=buckets, registry=self.registry)

    def observe(self, request: RequestOutput) -> None:
        """The answers of a finished request."""
        for output in request.outputs:
            if output.time_to_first_token is not None:
                self._first_token.observe(output.time_to_first_token)
            if output.seconds is not None:
                self._answer.observe(output.seconds)
            self._tokens.observe(output.length)

    def text(self) -> bytes:
        return generate_latest(self.registry)
