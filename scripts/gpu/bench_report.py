"""The report of the benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts.gpu.part_runner import Record


def markdown(report: Record) -> str:
    """Tables of each part. A figure that needs another one that was not measured is ``-``."""
    records = report["records"]
    device = next(iter(records.get("device", [])), {})
    lines = [
        "# Benchmark on a GPU",
        "",
        f"{report['date']}: `{report['command']}`",
        "",
        f"- change: {report['change']}",
        f"- prediction: {report['prediction']}",
        *(f"- {name}: {value}" for name, value in device.items() if isinstance(value, str)),
        *_measured(device),
        *(f"- part {part}: {state}" for part, state in report["parts"].items()),
        *_kernels("products", records.get("products", []), device),
        *_kernels("variants", records.get("variants", []), device),
        *_passes(records.get("passes", []), device),
        *_bits(records.get("bits", [])),
        *_prefill(records.get("prefill", []), device),
        *_requests(records.get("requests", [])),
    ]
    return "\n".join(lines) + "\n"


def _measured(device: Record) -> Iterator[str]:
    for name, unit, scale in (
        ("copy_bandwidth", "TB/s, read and written", 1e12),
        ("read_bandwidth", "TB/s", 1e12),
        ("bf16_peak", "TFLOP/s", 1e12),
    ):
        if device.get(name):
            yield f"- {name.replace('_', ' ')}: {device[name] / scale:.2f} {unit}"


def _kernels(title: str, records: Sequence[Record], device: Record) -> Iterator[str]:
    """The fastest tactic of each kernel in each case; products beside torch's own."""
    yield from _table(title, "case", "kernel", "tactic", "us", "of the copy bandwidth", "error")
    fastest: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record["case"], record["kernel"])
        if key not in fastest or (record["microseconds"] or 0) < (fastest[key]["microseconds"] or 0):
            fastest[key] = record
    for record in fastest.values():
        took, wrong = record["microseconds"], "" if record["right"] else " **wrong**"
        share = _share(record["least_bytes"], device.get("copy_bandwidth"), took and took * 1e-6)
        error = f"{record['error']:.1e}{wrong}"
        yield _row(record["case"], record["kernel"], record["tactic"], _number(took, 1), share, error)


def _passes(records: Sequence[Record], device: Record) -> Iterator[str]:
    yield from _table("passes", "pass", "KV rows", "batch", "ms", "tokens a second", "of the read bandwidth")
    for record in records:
        if "least_bytes" in record:
            share = _share(record["least_bytes"], device.get("read_bandwidth"), record["ms"] * 1e-3)
            speed = f"{record['batch'] * 1e3 / record['ms']:.0f}" if "ar pass" in record["what"] else "-"
            yield _row(record["what"], record["rows"], record["batch"], f"{record['ms']:.2f}", speed, share)
    yield from _table("kernels of a pass", "kernel", "KV rows", "tokens", "launches", "us", "us each")
    for record in records:
        if "launches" in record:
            took, count = record["microseconds"], record["launches"]
            yield _row(record["what"], record["rows"], record["step"], count, f"{took:.0f}", f"{took / count:.1f}")


def _bits(records: Sequence[Record]) -> Iterator[str]:
    yield from _table("bits", "text", "equal", "of")
    for record in records:
        yield _row(record["what"], record["equal"], record["of"])


def _prefill(records: Sequence[Record], device: Record) -> Iterator[str]:
    yield from _table("prefill", "prompt", "tokens of a step", "ms", "TFLOP/s", "of the bf16 peak")
    for record in records:
        speed = record["flops"] / record["ms"] * 1e3
        share = f"{speed / device['bf16_peak']:.0%}" if device.get("bf16_peak") else "-"
        yield _row(record["what"], record["step"], f"{record['ms']:.1f}", f"{speed / 1e12:.0f}", share)


def _requests(records: Sequence[Record]) -> Iterator[str]:
    yield from _table("requests at the same time", "requests", "tokens", "tokens a second", "drafts", "commits")
    for record in records:
        counts = record["counts"]
        speed = f"{record['tokens_per_second']:.0f}"
        yield _row(record["what"], record["tokens"], speed, counts["draft"] + counts["denoise"], counts["commit"])
    yield from _table(
        "passes of these requests", "requests", "pass", "calls", "ms each", "share of the time", "captured"
    )
    for record in records:
        for found in sorted(record["passes"], key=lambda found: -found["seconds"]):
            each = f"{1e3 * found['seconds'] / found['calls']:.2f}"
            share = f"{found['seconds'] / record['seconds']:.0%}"
            yield _row(record["what"], found["what"], found["calls"], each, share, found["captured"])


def _table(title: str, *columns: str) -> Iterator[str]:
    yield from ("", f"## {title[0].upper()}{title[1:]}", "", _row(*columns), "|" + "---|" * len(columns))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(moved: int, bandwidth: float | None, seconds: float | None) -> str:
    return f"{moved / bandwidth / seconds:.0%}" if bandwidth and seconds else "-"
