"""Malformed bodies against a running server: no 5xx, no crash, flat memory.

    python -m scripts.serving.malformed_bodies ENGINE --count 10000 --misfits 1000

The bodies are the same in every run: truncated, huge, of wrong types, not UTF-8, deep, wide, and with mutated bytes.
Schemathesis adds bodies that do not fit the server's OpenAPI document.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from scripts.serving.server_process import KEY, Served, serving

MOST_GROWTH_MIB = 128  # from a fifth of the bodies on
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Spell planet."}],
        "max_tokens": 4,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["x"],
        "mode": "linear_spec",
        "block_length": 8,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": False,
    },
    "/v1/completions": {"prompt": "abc", "max_tokens": 4, "logprobs": 1, "presence_penalty": 0.5, "mode": "ar"},
}
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 1e308, "", "\ud800", "x" * 3000, [], [[]], [None], {}, {"a": {}}, [{"role": 1}], ["a", 1],
)  # fmt: skip

LIMIT = 4 << 20  # bytes, as `trimode serve` has it
CHAT, COMPLETIONS = sorted(GOOD)
# Text before the elements, one element, and text after them; # is the element's number.
WIDE: dict[str, tuple[str, str, str, str]] = {
    "messages of numbers": (CHAT, '{"messages":[', "1", "]}"),
    "empty messages": (CHAT, '{"messages":[', "{}", "]}"),
    "good messages": (CHAT, '{"messages":[', '{"role":"user","content":""}', "]}"),
    "parts of a message": (CHAT, '{"messages":[{"role":"user","content":[', "1", "]}]}"),
    "keys": (CHAT, '{"messages":[],', '"#":1', "}"),
    "keys of a message": (CHAT, '{"messages":[{', '"#":1', "}]}"),
    "keys of options": (COMPLETIONS, '{"prompt":"a","stream_options":{', '"#":1', "}}"),
    "prompts": (COMPLETIONS, '{"prompt":[', '"a"', "]}"),
    "prompts of nothing": (COMPLETIONS, '{"prompt":[', "null", "]}"),
    "prompts of one token": (COMPLETIONS, '{"prompt":[', "[1]", "]}"),
    "tokens": (COMPLETIONS, '{"prompt":[', "1", "]}"),
    "tokens of nothing": (COMPLETIONS, '{"prompt":[[', "{}", "]]}"),
    "stops": (COMPLETIONS, '{"prompt":"a","stop":[', "[]", "]}"),
    "stop tokens": (COMPLETIONS, '{"prompt":"a","stop_token_ids":[', '""', "]}"),
}


def wide(kind: str, size: int = LIMIT) -> tuple[str, bytes]:
    """The path and a body of ``size`` bytes, filled with elements."""
    path, before, element, after = WIDE[kind]
    count = (size - len(before + after)) // (len(element.replace("#", "0000000")) + 1)
    elements = ",".join(element.replace("#", f"{number:07}") for number in range(count))
    return path, (before + elements + after).ljust(size).encode()


def malformed(number: int) -> tuple[str, bytes]:
    """The path and the body of this number."""
    rng = random.Random(number)
    path = rng.choice([CHAT, COMPLETIONS])
    whole = json.dumps(GOOD[path]).encode()
    match rng.randrange(7):
        case 0:
            return path, whole[: rng.randrange(len(whole))]
        case 1:
            return path, _mutated(whole, rng)
        case 2:
            return path, whole[:-1] + b', "stop": "' + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + b'"}'
        case 3:
            depth = rng.randrange(1, 20_000)
            return path, b'{"messages": ' + b"[" * depth + b"]" * rng.randrange(depth + 1) + b"}"
        case 4:
            return path, json.dumps({"prompt": "y" * rng.randrange(10**4, 10**6), "max_tokens": 4}).encode()
        case 5:
            return wide(rng.choice(sorted(WIDE)), rng.choice([10**4, 10**5, 10**6, LIMIT]))
        case _:
            body = dict(GOOD[path])
            for field in rng.sample(sorted(body), rng.randrange(1, 4)):
                body[field] = rng.choice(WRONG)
            return path, json.dumps(body).encode()


def _mutated(whole: bytes, rng: random.Random) -> bytes:
    body = bytearray(whole)
    for _ in range(rng.randrange(1, 8)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


def misfits(server: Served, count: int) -> Counter[int]:
    """Statuses of ``count`` requests by schemathesis that do not fit the server's OpenAPI document."""
    headers = {"authorization": f"Bearer {KEY}"}
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    statuses: Counter[int] = Counter()
    for path in GOOD:

        @settings(
            max_examples=count // len(GOOD),
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=document[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def ask(case: schemathesis.Case) -> None:
            statuses[case.call(headers=headers, timeout=60).status_code] += 1

        ask()
    return statuses


def _resident(server: Served, after: str) -> float:
    """In MiB; printed too."""
    resident, cache = server.resident_mib(), server.metrics()["trimode_prefix_cache_bytes"] / 2**20
    print(f"after {after}: {resident:.0f} MiB resident, {cache:.0f} of prefix cache; {server.peak_mib():.0f} at most")
    return resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--misfits", type=int, default=1000)
    options = parser.parse_args()
    statuses: Counter[int] = Counter()
    resident: list[float] = []
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with serving(options.engine) as server, httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        for number in range(options.count):
            path, body = malformed(number)
            statuses[http.post(path, content=body).status_code] += 1
            if (number + 1) % (options.count // 5) == 0:
                resident.append(_resident(server, f"{number + 1:,} bodies"))
        statuses += misfits(server, options.misfits)
        resident.append(_resident(server, f"{options.misfits:,} misfits"))
        server.wait_until_idle(5)
        # A mutated field name is an unknown field, which the server reports.
        log = [line for line in server.log if "ignored unknown fields" not in line]
    print(f"statuses: {dict(sorted(statuses.items()))}; {len(log)} lines in the server's log")
    assert max(statuses) < 500
    assert not log
    assert max(resident) - resident[0] < MOST_GROWTH_MIB


if __name__ == "__main__":
    main()
