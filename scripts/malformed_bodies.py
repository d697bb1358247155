"""Bodies that are no request, against a running server: no 5xx, no crash, memory flat.

    python -m scripts.malformed_bodies ENGINE --count 10000

Number by number the same bodies every time: truncated, huge, of wrong types, not UTF-8, deep, and mutated bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

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


def malformed(number: int) -> tuple[str, bytes]:
    """The path and the body of this number."""
    rng = random.Random(number)
    path = rng.choice(sorted(GOOD))
    whole = json.dumps(GOOD[path]).encode()
    match rng.randrange(6):
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


def main() -> None:
    from scripts.serving import KEY, serving

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    statuses: Counter[int] = Counter()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with serving(options.engine) as server, httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        for number in range(options.count):
            path, body = malformed(number)
            statuses[http.post(path, content=body).status_code] += 1
            if (number + 1) % (options.count // 5) == 0:
                print(f"after {number + 1:,} bodies: {server.resident_mib():.0f} MiB resident")
        server.wait_until_idle(5)
        log = list(server.log)
    print(f"statuses: {dict(sorted(statuses.items()))}; {len(log)} lines in the server's log")
    assert max(statuses) < 500
    assert not log


if __name__ == "__main__":
    main()
