"""The engine's metrics as metrics of Triton, under the names that the OpenAI server uses."""

from __future__ import annotations

import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.metric_families import MetricFamily, metric_families

PERIOD_SECONDS = 0.5


class EngineMetrics:
    """A thread reports the metrics periodically, because the Python backend has no hook for a scrape."""

    def __init__(self, llm: EngineLLM) -> None:
        self._llm = llm
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._reported: dict[tuple[str, tuple[str, ...]], float] = {}
        self._report()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trimode-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(PERIOD_SECONDS):
            self._report()

    def _report(self) -> None:
        for family in metric_families(self._llm.stats()):
            for labels, value in family.samples.items():
                metric, key = self._metric(family, labels), (family.name, labels)
                if family.kind == "gauge":
                    metric.set(value)
                elif value > self._reported.get(key, 0):
                    metric.increment(value - self._reported.get(key, 0))
                    self._reported[key] = value

    def _metric(self, family: MetricFamily, labels: tuple[str, ...]) -> Any:
        key = family.name, labels
        if key not in self._metrics:
            if family.name not in self._families:
                gauge, made = family.kind == "gauge", pb_utils.MetricFamily
                name = family.name if gauge else f"{family.name}_total"
                self._families[family.name] = made(name, family.text, made.GAUGE if gauge else made.COUNTER)
            by_name = dict(zip(family.labels, labels, strict=True))
            self._metrics[key] = self._families[family.name].Metric(labels=by_name)
        return self._metrics[key]
