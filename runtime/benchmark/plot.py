"""Curves of a benchmark, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from trimode.runtime.benchmark.summary import Point

# setting, load (requests at once or a second), and a figure.
Placed = tuple[str, float, float]

mpl.use("Agg")


def write_plot(points: Sequence[Point], path: Path) -> None:
    """Throughput and the time of a token by load."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    unit = "requests at once" if points[0].rate is None else "requests a second"
    place = [(point.setting, float(point.concurrency or point.rate or 0)) for point in points]
    draw_throughput(left, [(*where, point.tokens_per_second) for where, point in zip(place, points, strict=True)], unit)
    times = [(*where, point.per_token.p50) for where, point in zip(place, points, strict=True) if point.per_token]
    draw_by_load(right, times, unit)
    right.set(ylabel="ms per token (median of the answers)", title="Time per token by load")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_throughput(axes: Axes, points: Sequence[Placed], unit: str = "requests at once") -> None:
    """points: in tokens per second."""
    draw_by_load(axes, points, unit)
    axes.set(ylabel="tokens per second", title="Throughput by load")


def draw_by_load(axes: Axes, points: Sequence[Placed], unit: str) -> None:
    """One curve for each setting; that of ``auto`` is thick and black."""
    for name in dict.fromkeys(point[0] for point in points):
        mine = [point[1:] for point in points if point[0] == name]
        width, color = (3.0, "black") if name == "auto" else (1.5, None)
        axes.plot(*zip(*mine, strict=True), marker="o", label=name, linewidth=width, color=color)
    loads = sorted({point[1] for point in points})
    axes.set(xscale="log", xlabel=unit)
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
