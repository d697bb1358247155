"""Reading JSON files into checked records, with errors that name the file, the field and the value.

Files are UTF-8. A byte order mark at the start, which some editors write, is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trimode.common.errors import TriModeError

Record = TypeVar("Record", bound=BaseModel)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises TriModeError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TriModeError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TriModeError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises TriModeError if it is missing or not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TriModeError(f"{path} is not valid JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object. Raises TriModeError if it does not."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise TriModeError(f"{path}: a JSON object is expected")
    return content


def read_json_record(record: type[Record], path: Path) -> Record:
    """Parse a JSON file and validate it as a ``record``. Raises TriModeError that names the file and the field."""
    content = read_json(path)
    try:
        return record.model_validate(content)
    except ValidationError as error:
        raise TriModeError(f"{path}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Pydantic's findings in one line, each as ``field: what is wrong (got value)``."""
    findings = []
    for finding in error.errors(include_url=False):
        field = ".".join(str(part) for part in finding["loc"]) or "file"
        got = (
            "" if finding["type"] == "missing" or isinstance(finding["input"], dict) else f" (got {finding['input']!r})"
        )
        findings.append(f"{field}: {finding['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(findings)
