"""The prompts of a benchmark: from a file, or made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from trimode.common.errors import TriModeError

# A text, which is completed as it is, or the messages of a chat.
BenchmarkPrompt = str | list[dict[str, Any]]
# Common words of one to three tokens in most vocabularies.
_TEXT = (
    "the time of a person is one year and every way has its day for what they did in the world with some part of life "
    "that was work under water while two old hands kept number after number near a small green house by the road"
)


def read_prompts(path: Path) -> list[BenchmarkPrompt]:
    """One prompt a line: ``{"messages": [...]}`` or ``{"prompt": "..."}``; other fields are ignored.

    Raises TriModeError that names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TriModeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TriModeError(f"{path} is not UTF-8 (byte {error.start})") from None
    prompts = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise TriModeError(f"{path} has no prompts")
    return prompts


def synthetic_prompts(count: int, words: int, seed: int = 0) -> list[BenchmarkPrompt]:
    """``count`` chats, each with one message of ``words`` random words; the same for the same arguments."""
    random, known = np.random.default_rng(seed), _TEXT.split()
    return [[{"role": "user", "content": " ".join(random.choice(known, words))}] for _ in range(count)]


def _prompt(line: str, where: str) -> BenchmarkPrompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise TriModeError(f"{where}: not JSON") from None
    found = record if isinstance(record, dict) else {}
    text, messages = found.get("prompt"), found.get("messages")
    if isinstance(text, str) and text and messages is None:
        return text
    if messages and text is None and isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        return messages
    raise TriModeError(f'{where}: expected {{"messages": [...]}} or {{"prompt": "..."}}')
