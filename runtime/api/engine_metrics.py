"""Prometheus metrics of an engine: its counts at the time of the scrape, and histograms of finished answers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.metric_families import metric_families
from trimode.runtime.api.request_output import RequestOutput

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_FAMILIES: dict[str, type[GaugeMetricFamily | CounterMetricFamily]] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)


class _EngineCollector(Collector):
    def __init__(self, llm: EngineLLM) -> None:
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        for family in metric_families(self._llm.stats()):
            made = _FAMILIES[family.kind](family.name, family.text, labels=family.labels)
            for labels, value in family.samples.items():
                made.add_metric(labels, value)
            yield made


class EngineMetrics:
    """registry: of these metrics alone."""

    def __init__(self, llm: EngineLLM) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(llm))
        self._slot = self._histogram("trimode_time_to_slot_seconds", "From arrival, in the queue.", SECONDS)
        self._first_token = self._histogram("trimode_time_to_first_token_seconds", "From arrival.", SECONDS)
        self._answer = self._histogram("trimode_answer_seconds", "From arrival to the last token.", SECONDS)
        self._tokens = self._histogram("trimode_answer_tokens", "Tokens of finished answers.", TOKENS)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, buckets=buckets, registry=self.registry)

    def observe(self, request: RequestOutput) -> None:
        """The answers of a finished request."""
        for output in request.outputs:
            if output.time_to_slot is not None:
                self._slot.observe(output.time_to_slot)
            if output.time_to_first_token is not None:
                self._first_token.observe(output.time_to_first_token)
            if output.seconds is not None:
                self._answer.observe(output.seconds)
            self._tokens.observe(output.length)

    def text(self) -> bytes:
        return generate_latest(self.registry)
