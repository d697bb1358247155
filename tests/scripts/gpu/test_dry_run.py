"""The engine parts of the GPU check, executed over a double of the CUDA driver."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from scripts.gpu.check import ENGINE_PARTS, must_be_equal
from scripts.gpu.check_report import markdown
from scripts.gpu.dry_run import EMITTED, dry_engine_records


def test_every_engine_part_runs_and_finds_no_difference() -> None:
    records: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for part, record in dry_engine_records(ENGINE_PARTS):
        records[part].append(record)
    assert tuple(records) == ENGINE_PARTS
    every = [record for part in records.values() for record in part]
    compared = [record for record in every if must_be_equal(record)]
    assert {record["what"].partition(",")[0].partition(" ")[0] for record in compared} == {"tiny-fp32", "8b:"}
    settings = {record["what"] for record in records["tiny-bf16"]}
    for setting in EMITTED.settings:
        assert f"tiny-bf16, {setting.name}: tokens of target cpu" in settings
        assert setting.repeats is None or f"tiny-bf16, {setting.name}: tokens of {setting.repeats}" in settings
    assert [record for record in compared if record["equal"] != record["of"]] == []
    assert {record["what"] for record in records["8b"]} >= {
        *("8b: loaded", "8b: ar pass", "8b: draft", "8b: verify", "8b: cycle", "8b: kernels of a pass"),
        *("8b: prefill of 32 tokens", "SelectRows.WIDTH256"),
    }
    assert all("graph_ms" in record for record in records["8b-reference"])
    page = markdown({"date": "", "command": "", "device": {}, "parts": {}, "engines": every, "results": []})
    assert "| tiny-bf16, diffusion: tokens of target cpu | " in page
    assert page.count("| 8b: cycle | ") == 3
