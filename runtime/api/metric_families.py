"""The engine's metrics, in a form that every server can export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trimode.runtime.scheduling.drafting_stats import LONGEST_BUCKET
from trimode.runtime.scheduling.pass_cost import EngineName
from trimode.runtime.scheduling.scheduler import Stats

_PASSES: dict[EngineName, str] = {"ar": "causal", "diffusion": "bidirectional"}


Samples = dict[tuple[str, ...], float]


@dataclass
class MetricFamily:
    """name: without the suffix ``_total`` of counters. labels: names. samples: by the values of the labels."""

    kind: Literal["gauge", "counter"]
    name: str
    text: str
    labels: tuple[str, ...] = ()
    samples: Samples = field(default_factory=dict)


def metric_families(stats: Stats) -> list[MetricFamily]:
    """All metrics but the histograms. A counter never falls; a labelled series appears with its first event."""
    counts = stats.counts

    def single(kind: Literal["gauge", "counter"], name: str, text: str, value: float) -> MetricFamily:
        return MetricFamily(kind, f"trimode_{name}", text, samples={(): value})

    passes: Samples = {(kind,): getattr(counts, kind) for kind in ("prefill", "draft", "denoise", "commit")}
    return [
        single("gauge", "requests_running", "Answers in a slot.", stats.running),
        single("gauge", "requests_waiting", "Answers that wait for a slot.", stats.waiting),
        single("gauge", "slots", "Slots of the KV pool.", stats.slots),
        single("gauge", "prefix_cache_bytes", "Bytes of KV rows kept for reuse.", stats.prefix_cache_bytes),
        single("counter", "steps", "Steps of the scheduler.", stats.steps),
        # Sums over finished answers.
        single("counter", "answers", "Finished answers.", stats.finished),
        single("counter", "tokens_emitted", "Tokens of answers.", stats.emitted),
        single("counter", "tokens_drafted", "Drafted tokens.", counts.drafted),
        single("counter", "tokens_accepted", "Drafted tokens that were emitted.", counts.accepted),
        single("counter", "tokens_copied", "Drafted tokens that lookup copied.", counts.copied),
        single("counter", "tokens_copied_accepted", "Copied tokens that were emitted.", counts.accepted_copies),
        single("counter", "tokens_cached", "Prompt tokens whose KV rows were reused.", counts.cached_tokens),
        single("counter", "cycles", "Finished blocks.", counts.cycles),
        single("counter", "trees", "Cycles with drafts verified as trees.", counts.trees),
        single("counter", "lookups", "Cycles with copied drafts.", counts.lookups),
        MetricFamily("counter", "trimode_passes", "Passes that answers took part in.", ("kind",), passes),
        *_of_drafting(stats),
    ]


def _of_drafting(stats: Stats) -> list[MetricFamily]:
    drafting = stats.drafting
    of_cycles = {
        "cycles": "Cycles of auto and linear_spec.",
        "tokens_verified": "Tokens of their commit passes.",
        "tokens_expected": "Tokens that they were expected to emit.",
        "tokens_emitted": "Tokens that they emitted.",
    }
    keys = {(str(key.mode), key.drafting, _bound(key.block)): sums for key, sums in drafting.cycles.items()}
    choices: Samples = {
        (str(key.block), key.drafting, "trial" if key.trial else "fastest"): float(count)
        for key, count in drafting.choices.items()
    }
    expectations = {(str(block),): found for block, found in drafting.expectations.items()}
    passes = {(_PASSES[engine],): found for engine, found in drafting.passes.items()}
    return [
        *(
            MetricFamily(
                "counter",
                f"trimode_drafting_{name}",
                text,
                ("mode", "drafting", "block"),
                {labels: sums[index] for labels, sums in keys.items()},
            )
            for index, (name, text) in enumerate(of_cycles.items())
        ),
        MetricFamily(
            "counter",
            "trimode_auto_choices",
            "Choices of auto, one per step.",
            ("block", "drafting", "reason"),
            choices,
        ),
        MetricFamily(
            "gauge",
            "trimode_auto_expected_tokens",
            "Latest choice: tokens expected of a cycle of the batch.",
            ("block",),
            {labels: found.tokens for labels, found in expectations.items()},
        ),
        MetricFamily(
            "gauge",
            "trimode_auto_expected_seconds",
            "Latest choice: seconds expected of that cycle.",
            ("block",),
            {labels: found.seconds for labels, found in expectations.items()},
        ),
        MetricFamily(
            "counter",
            "trimode_pass_seconds",
            "Seconds of passes.",
            ("attention",),
            {labels: found.seconds for labels, found in passes.items()},
        ),
        MetricFamily(
            "counter",
            "trimode_pass_expected_seconds",
            "Seconds that these passes were expected to take.",
            ("attention",),
            {labels: found.expected for labels, found in passes.items()},
        ),
    ]


def _bound(block: int) -> str:
    """A label: the most tokens of the blocks that a key of :class:`CycleKey` counts."""
    return str(block) if block else f"over {LONGEST_BUCKET}"
