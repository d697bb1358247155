"""The tokenizer's files, and behaviour that transformers does not define."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.common.errors import TriModeError
from trimode.model.tokenizer import Tokenizer, tokenizer_files


@given(text=st.text())
def test_decode_undoes_encode(random_checkpoint: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(random_checkpoint)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.fixture
def folder(random_checkpoint: Path, tmp_path: Path) -> Path:
    for path in tokenizer_files(random_checkpoint):
        shutil.copyfile(random_checkpoint / path, tmp_path / path)
    return tmp_path


def write(name: str, content: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return apply


def test_files_that_are_read(folder: Path) -> None:
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"):
        write(name, {})(folder)
    for name in ("README.md", ".DS_Store", "vocab.json", "x.jinja", "additional_chat_templates/._tool.jinja"):
        write(name, "\x00\xff")(folder)
    write("additional_chat_templates/tool_use.jinja", "x")(folder)
    assert {str(path) for path in tokenizer_files(folder)} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
    }
    assert Tokenizer.from_folder(folder).apply_chat_template([{"role": "user"}], tools=[]) == "x"


def test_byte_order_marks(folder: Path) -> None:
    """Some editors write one at the start of a UTF-8 file."""
    expected = Tokenizer.from_folder(folder).apply_chat_template([{"role": "user", "content": "x"}])
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = Tokenizer.from_folder(folder)
    assert found.apply_chat_template([{"role": "user", "content": "x"}]) == expected
    assert found.token_id("<|im_end|>") == 11


def test_a_processors_template_is_read_where_there_is_no_other(folder: Path) -> None:
    write("chat_template.json", {"chat_template": "P"})(folder)
    messages = [{"role": "user", "content": "x"}]
    assert Tokenizer.from_folder(folder).apply_chat_template(messages) != "P"
    write("tokenizer_config.json", {})(folder)
    assert Tokenizer.from_folder(folder).apply_chat_template(messages) == "P"


def test_templates_read_additional_special_tokens(folder: Path) -> None:
    config = {"additional_special_tokens": ["<think>", {"content": "</think>"}], "chat_template": "{{ x }}"}
    write("tokenizer_config.json", config)(folder)
    write("chat_template.jinja", "{{ additional_special_tokens | join }}")(folder)
    assert Tokenizer.from_folder(folder).apply_chat_template([{"role": "user"}]) == "<think></think>"


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "not a tokenizer": (write("tokenizer.json", {}), r"tokenizer\.json is not a tokenizer"),
    "not JSON": (write("tokenizer_config.json", "{"), r"tokenizer_config\.json is not valid JSON"),
    "not an object": (write("tokenizer_config.json", []), r"tokenizer_config\.json: a JSON object is expected"),
    "not a template": (write("chat_template.jinja", "{% if %}"), "chat template does not compile"),
    "not text": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"),
        r"chat_template\.jinja cannot be read",
    ),
    "templates without names": (write("tokenizer_config.json", {"chat_template": ["x"]}), "list of name and template"),
    "a template that is a number": (write("tokenizer_config.json", {"chat_template": 1}), "list of name and template"),
    "tokens that are numbers": (write("tokenizer_config.json", {"extra_special_tokens": [1]}), "1 is not a token"),
    "tokens that are no list": (write("tokenizer_config.json", {"extra_special_tokens": 1}), "must be a list"),
    "a token that is a number": (
        write("tokenizer_config.json", {"bos_token": {"content": 1, "colour": "red"}}),
        r"tokenizer_config\.json: .*is not a token",
    ),
    "an id that is no number": (
        write("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<s>"}}}),
        "'x' is not a token id",
    ),
    "ids in a list": (write("tokenizer_config.json", {"added_tokens_decoder": []}), "must be an object"),
    "added tokens without ids": (write("added_tokens.json", {"<new>": None}), r"added_tokens\.json: None is not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(folder: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(TriModeError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_checkpoint_without_a_template(folder: Path) -> None:
    write("tokenizer_config.json", {})(folder)
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(TriModeError, match="has no chat template; give the prompt as it is"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    write("additional_chat_templates/rag.jinja", "x")(folder)
    with pytest.raises(TriModeError, match="no default chat template; name one of rag"):
        Tokenizer.from_folder(folder).apply_chat_template([{"role": "user", "content": "x"}])
