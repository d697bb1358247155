"""Calibration texts for AWQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimode.common.errors import TriModeError
from trimode.common.records import describe
from trimode.model.checkpoint import Checkpoint
from trimode.model.tokenizer import Tokenizer

CALIBRATION_FILE = "calibration.jsonl"
MAX_TOKENS = 512
MAX_TEXTS = 128
# A block needs a pending token and a mask.
MIN_TOKENS = 2


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str


class _Conversation(BaseModel):
    model_config = ConfigDict(extra="ignore")

    messages: Annotated[list[_Message], Field(min_length=1)]


class _Text(BaseModel):
    model_config = ConfigDict(extra="ignore")

    text: Annotated[str, Field(min_length=1)]


def calibration_tokens(checkpoint: Checkpoint, file: Path | None) -> list[list[int]]:
    """Token ids of the first 128 lines, each cut at 512 tokens.

    ``file`` is JSONL of ``{"messages": [{"role", "content"}]}`` or ``{"text": "..."}``; the checkpoint folder's own
    ``calibration.jsonl`` unless given. Raises TriModeError that names the file and line.
    """
    path = file or checkpoint.folder / CALIBRATION_FILE
    if not path.is_file():
        remedy = "give --calibration FILE, JSONL of messages or text" if file is None else "check --calibration"
        raise TriModeError(f"{path} is missing; {remedy}")
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    texts: list[list[int]] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if len(texts) == MAX_TEXTS:
                    break
                if line.strip():
                    texts.append(_tokens(line, tokenizer, checkpoint.config.vocab_size, f"{path} line {number}"))
    except UnicodeDecodeError as error:
        raise TriModeError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not texts:
        raise TriModeError(f'{path} is empty; AWQ needs text: lines of {{"text": "..."}} or {{"messages": [...]}}')
    return texts


def _tokens(line: str, tokenizer: Tokenizer, vocabulary: int, where: str) -> list[int]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TriModeError(f"{where} is not valid JSON: {error}") from None
    try:
        if isinstance(record, dict) and "messages" in record:
            messages = _Conversation.model_validate(record).messages
            text = tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=False,
            )
            ids = tokenizer.encode(text)
        else:
            ids = tokenizer.encode(_Text.model_validate(record).text, add_special_tokens=True)
    except ValidationError as error:
        raise TriModeError(f"{where}: {describe(error)}") from None
    ids = ids[:MAX_TOKENS]
    if len(ids) < MIN_TOKENS:
        raise TriModeError(f"{where} has {len(ids)} token(s); a text needs at least {MIN_TOKENS}")
    if max(ids) >= vocabulary:
        raise TriModeError(
            f"{where} has token {max(ids)}, outside the model's vocab_size {vocabulary}; wrong tokenizer?"
        )
    return ids
