"""``trimode bench`` on an engine and on a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from scripts.serving.server_process import KEY, serving
from trimode.cli.bench import command
from trimode.common.errors import TriModeError


def bench(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(command, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_an_engine(random_engine: Path, tmp_path: Path) -> None:
    plot = tmp_path / "bench.png"
    settings = ["--mode", "ar", "--mode", "linear_spec", "--block-length", "4,8", "--concurrency", "1,2"]
    size = ["--words", 3, "--requests", 3, "--max-tokens", 9, "--ignore-eos", "--threads", 1]
    points = bench(random_engine, *settings, *size, "--plot", plot)["points"]
    assert [(point["concurrency"], point["setting"]) for point in points] == [
        (load, setting) for load in (1, 2) for setting in ("ar", "linear_spec 4", "linear_spec 8")
    ]
    for point in points:
        assert (point["requests"], point["failed"], point["tokens"]) == (3, 0, 27)
        mean, middle, high, highest = point["first_token"]
        assert 0 < middle <= high <= highest
        assert 0 < mean <= highest
        assert point["answer"][1] >= middle  # equal if one update brings a whole answer
    assert points[0]["tokens_per_pass"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_server_and_a_file(random_engine: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    arguments = ["--prompts", prompts, "--requests", 3, "--rate", 100, "--max-tokens", 5, "--ignore-eos"]
    with serving(random_engine, "--update-seconds", "0") as server:
        (point,) = bench(server.url, "--api-key", KEY, *arguments)["points"]
        refused = CliRunner().invoke(command, [server.url, "--api-key", "wrong"])
    assert (point["setting"], point["rate"], point["tokens"], point["requests"]) == ("default", 100, 15, 3)
    assert point["tokens_per_pass"] is None
    assert isinstance(refused.exception, TriModeError)
    assert "status 401" in str(refused.exception)


BAD: dict[str, list[str]] = {
    "give one of them": ["--concurrency", "1", "--rate", "2"],
    "at least 1": ["--concurrency", "0,1"],
    "leave out --words": ["--words", "3", "--prompts", "x"],
    "--block-length has no effect": ["--mode", "ar", "--block-length", "8"],
    "temperature is -1": ["--temperature", "-1"],
    "block_length is 0": ["--block-length", "0"],
    "No such file": ["--prompts", "none.jsonl"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message: str) -> None:
    """Found before a model is loaded."""
    found = CliRunner().invoke(command, ["no model", *BAD[message]])
    assert isinstance(found.exception, TriModeError)
    assert message in str(found.exception)
