"""The engine's counts as metrics of Triton, under the names that the OpenAI server uses."""

from __future__ import annotations

import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from trimode.runtime.api.llm import EngineLLM

PERIOD_SECONDS = 0.5


class EngineMetrics:
    """A thread reports the counts periodically, because the Python backend has no hook for a scrape."""

    def __init__(self, llm: EngineLLM) -> None:
        self._llm = llm
        family = pb_utils.MetricFamily
        self._gauges = {
            name: family(f"trimode_{name}", text, family.GAUGE)
            for name, text in {
                "requests_running": "Answers in a slot",
                "requests_waiting": "Answers that wait for a slot",
            }.items()
        }
        self._counters = {
            name: family(f"trimode_{name}_total", text, family.COUNTER)
            for name, text in {
                "steps": "Steps of the scheduler",
                "answers": "Finished answers",
                "tokens_emitted": "Tokens of answers",
                "tokens_drafted": "Drafted tokens",
                "tokens_accepted": "Drafted tokens that were emitted",
                "trees": "Cycles with drafts verified as trees",
                "lookups": "Cycles with copied drafts",
                "tokens_copied": "Drafted tokens that lookup copied",
                "tokens_copied_accepted": "Copied tokens that were emitted",
                "tokens_cached": "Prompt tokens not computed again",
            }.items()
        }
        self._metrics: dict[str, Any] = {
            name: found.Metric(labels={}) for name, found in (self._gauges | self._counters).items()
        }
        self._reported = dict.fromkeys(self._counters, 0)
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
        stats = self._llm.stats()
        self._metrics["requests_running"].set(stats.running)
        self._metrics["requests_waiting"].set(stats.waiting)
        now = {
            "steps": stats.steps,
            "answers": stats.finished,
            "tokens_emitted": stats.emitted,
            "tokens_drafted": stats.counts.drafted,
            "tokens_accepted": stats.counts.accepted,
            "trees": stats.counts.trees,
            "lookups": stats.counts.lookups,
            "tokens_copied": stats.counts.copied,
            "tokens_copied_accepted": stats.counts.accepted_copies,
            "tokens_cached": stats.counts.cached_tokens,
        }
        for name, count in now.items():
            if count > self._reported[name]:
                self._metrics[name].increment(count - self._reported[name])
        self._reported = now
