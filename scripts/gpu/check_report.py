"""The report of the GPU check as Markdown: the device, the parts, and tables of the results."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def markdown(report: Record) -> str:
    """The report as Markdown: the device, the parts, and a table of results."""
    device, bandwidth = report["device"], report["device"].get("read_bandwidth")
    lines = ["# Kernels on a GPU", "", f"{report['date']}: `{report['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in device.items() if not name.endswith("_bandwidth")]
    if bandwidth:
        lines.append(f"- bandwidth of a read: {bandwidth / 1e12:.2f} TB/s")
        lines.append(f"- bandwidth of a copy, read and written: {device['copy_bandwidth'] / 1e12:.2f} TB/s")
    lines += [f"- part {part}: {state}" for part, state in report["parts"].items()]
    lines += [_tests(record) for record in report["engines"] if "passed" in record]
    lines += _engine_tables(report["engines"], bandwidth)
    lines += ["", "`bound / us`: time of the kernel's least bytes at the bandwidth of a read, divided by its time.", ""]
    lines += ["| kernel | case | tactic | error | us | bound / us |", "|---|---|---|---|---|---|"]
    for result in report["results"]:
        took = result["microseconds"]
        share = f"{result['least_bytes'] / bandwidth * 1e6 / took:.0%}" if took and bandwidth else "-"
        error = f"{result['error']:.1e}" + ("" if result["right"] else " **wrong**")
        time_cell = f"{took:.1f}" if took else "-"
        cells = (result["kernel"], result["case"], result["tactic"], error, time_cell, share)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _tests(record: Record) -> str:
    return (
        f"- {record['what']}: {record['passed']} passed, {len(record['failed'])} failed, {record['skipped']} skipped; "
        f"{record['kernel_launches']} launches, {record['missing']} kernels missing"
    )


def _engine_tables(records: list[Record], bandwidth: float | None) -> list[str]:
    lines = ["", "| tokens | equal |", "|---|---|"]
    lines += [f"| {record['what']} | {record['equal']} of {record['of']} |" for record in records if "equal" in record]
    lines += _differences(records)
    lines += ["", "| pass | rows | batch | ms | floor / ms |", "|---|---|---|---|---|"]
    for record in records:
        if "least_bytes" in record:
            share = f"{record['least_bytes'] / bandwidth * 1e3 / record['ms']:.0%}" if bandwidth else "-"
            cells = (record["what"], record["rows"], record["batch"], f"{record['ms']:.2f}", share)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        elif "prefill" in record["what"]:
            lines.append(f"| {record['what']} | - | 1 | {record['ms']:.1f} | - |")
    lines += ["", "| PyTorch reference in bf16 | rows | tokens | eager, ms | CUDA graph, ms |", "|---|---|---|---|---|"]
    for record in records:
        if "eager_ms" in record:
            graph = f"{record['graph_ms']:.2f}" if "graph_ms" in record else record["graph_failed"]
            cells = (record["what"], record["rows"], record["step"], f"{record['eager_ms']:.2f}", graph)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [f"\n- {record['what']}: {record['memcheck']}" for record in records if "memcheck" in record]
    lines += ["", "| kernels of a pass | rows | tokens | launches | us |", "|---|---|---|---|---|"]
    for record in records:
        if "launches" in record:
            cells = (
                record["what"],
                record["rows"],
                record["step"],
                record["launches"],
                f"{record['microseconds']:.0f}",
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _differences(records: list[Record]) -> list[str]:
    """Every answer that differs, and by how much each of the two engines preferred its own token."""
    lines = ["", "| tokens | answer | first different token | tokens | margin here | margin there |"]
    lines.append("|---|---|---|---|---|---|")
    for record in records:
        for each in record.get("different", ()):
            if "answer" in each:
                tokens = " and ".join(map(str, each["tokens"])) if each["tokens"] else "one ends"
                place = "-" if each["first"] is None else str(each["first"])
                margins = map(_cell, each["margins"])
                lines.append(f"| {' | '.join((record['what'], str(each['answer']), place, tokens, *margins))} |")
    return lines if len(lines) > 3 else []


def _cell(margin: Record | None) -> str:
    if margin is None:
        return "not repeated"
    return f"{'at least ' if margin['least'] else ''}{margin['gap']:.4f}"
