"""The tokenizer and the chat template without transformers: the same text and ids that transformers gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trimode.common.errors import TriModeError
from trimode.model.tokenizer import Tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "What is 15% of 240?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi \n there"},
        {"role": "assistant", "content": "Hello, Jörg 🙂"},
        {"role": "user", "content": "<b>Bye</b>"},
    ],
]


@pytest.mark.parametrize("folder", ["random_checkpoint", "tiny_checkpoint"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_are_transformers_prompts(
    request: pytest.FixtureRequest, folder: str, messages: list, thinking: bool
) -> None:
    path = request.getfixturevalue(folder)
    ours, theirs = Tokenizer.from_folder(path), AutoTokenizer.from_pretrained(path)
    text = ours.apply_chat_template(messages, enable_thinking=thinking)
    assert text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert ours.encode(text) == theirs(text).input_ids


@given(text=st.text())
def test_decode_undoes_encode(random_checkpoint: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(random_checkpoint)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def with_template(source: Path, folder: Path, template: str) -> Path:
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{% set _ = messages.append(1) %}",
        "{{ raise_exception('no system turn, please') }}",
        "{{ 1 / none }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(random_checkpoint: Path, tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_folder(with_template(random_checkpoint, tmp_path, template))
    with pytest.raises(TriModeError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_broken_tokenizer_files(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TriModeError, match="chat template does not compile"):
        Tokenizer.from_folder(with_template(random_checkpoint, tmp_path, "{% if %}"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TriModeError, match="is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
