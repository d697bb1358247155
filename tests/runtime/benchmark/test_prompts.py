"""Prompts of a benchmark: from a file, or random words."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimode.common.errors import TriModeError
from trimode.runtime.benchmark.prompts import read_prompts, synthetic_prompts

CHAT = [{"role": "user", "content": "Hi"}]


def test_chats_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}], "answer": 1}\n\n{"prompt": "Once"}\n')
    assert read_prompts(path) == [CHAT, "Once"]


BAD = {
    "line 2: not JSON": '{"prompt": "a"}\n{"prompt"',
    "line 1: expected": "[1]",
    "expected": '{"prompt": ""}',
    "or {": '{"prompt": "a", "messages": [{"role": "user"}]}',
    '"messages"': '{"messages": ["Hi"]}',
    "has no prompts": "\n \n",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files(tmp_path: Path, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(BAD[message])
    with pytest.raises(TriModeError, match=message) as found:
        read_prompts(path)
    assert str(path) in str(found.value)
    with pytest.raises(TriModeError, match="No such file"):
        read_prompts(tmp_path / "none")


def test_synthetic_prompts_are_the_same_each_time() -> None:
    found = synthetic_prompts(3, 5)
    assert found == synthetic_prompts(3, 5) != synthetic_prompts(3, 5, seed=1)
    contents = [prompt[0]["content"] for prompt in found if not isinstance(prompt, str)]
    assert len(set(contents)) == 3
    assert {len(content.split()) for content in contents} == {5}
