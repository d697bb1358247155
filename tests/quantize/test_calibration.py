"""Calibration files: both forms, and errors that name the file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimode.common.errors import TriModeError
from trimode.model.checkpoint import Checkpoint
from trimode.model.tokenizer import Tokenizer
from trimode.quantize.calibration import MAX_TEXTS, MAX_TOKENS, calibration_tokens


def test_both_forms_are_read_and_blank_lines_skipped(source: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "calibration.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi there"}]}\n\n{"text": "Plain"}\n')
    tokenizer = Tokenizer.from_folder(source.folder)
    assert calibration_tokens(source, file) == [
        tokenizer.encode("<|im_start|>user\nHi there<|im_end|>\n"),
        tokenizer.encode("Plain"),
    ]


def test_the_file_in_the_checkpoint_is_the_default(source: Checkpoint) -> None:
    assert len(calibration_tokens(source, None)) == 5


def test_long_texts_and_long_files_are_cut(source: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "calibration.jsonl"
    file.write_text("\n".join([json.dumps({"text": "x" * 2000})] * (MAX_TEXTS + 9)))
    assert [len(text) for text in calibration_tokens(source, file)] == [MAX_TOKENS] * MAX_TEXTS


@pytest.mark.parametrize(
    ("second_line", "complaint"),
    [
        ("{nonsense", "line 2 is not valid JSON"),
        ('{"prompt": "x"}', "line 2: text: Field required"),
        ('{"text": ""}', "line 2: text: .*at least 1 character"),
        ('{"text": 7}', "line 2: text: .*string"),
        ("[1]", "line 2: file: "),
        ('{"messages": []}', "line 2: messages: .*at least 1 item"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\.0\.content: Field required"),
        ('{"text": "x"}', r"line 2 has 1 token\(s\)"),
        ('{"text": "\\u00e9<pad>"}', None),
    ],
)
def test_a_bad_line_is_named(source: Checkpoint, tmp_path: Path, second_line: str, complaint: str | None) -> None:
    file = tmp_path / "calibration.jsonl"
    file.write_text('{"text": "A good line."}\n' + second_line + "\n")
    if complaint is None:
        assert len(calibration_tokens(source, file)) == 2
        return
    with pytest.raises(TriModeError, match=complaint) as caught:
        calibration_tokens(source, file)
    assert str(file) in str(caught.value)


def test_missing_and_empty_files(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match=r"nowhere\.jsonl is missing; check --calibration"):
        calibration_tokens(source, tmp_path / "nowhere.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(TriModeError, match=r"empty\.jsonl is empty"):
        calibration_tokens(source, empty)


def test_a_byte_order_mark_and_crlf_change_nothing(random_checkpoint: Path, tmp_path: Path) -> None:
    lines = '{"text": "abc"}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    files = {"plain": lines.encode(), "windows": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    plain, windows = (calibration_tokens(Checkpoint(random_checkpoint), tmp_path / name) for name in files)
    assert plain == windows
    assert len(plain) == 2
