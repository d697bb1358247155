"""Reading JSON files into checked records, with errors that name the file, the field and the value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trimode.common.errors import TriModeError

Record = TypeVar("Record", bound=BaseModel)


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises TriModeError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TriModeError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TriModeError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TriModeError(f"{path} is not valid JSON: {error}") from None


def read_json_record(record: type[Record], path: Path) -> Record:
    """Parse and check a JSON file against ``record``."""
    content = read_json(path)
    try:
        return record.model_validate(content)
    except ValidationError as error:
        raise TriModeError(f"{path}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Pydantic's findings in one line: ``field: what is wrong (got value)``."""
    findings = []
    for finding in error.errors(include_url=False):
        field = ".".join(str(part) for part in finding["loc"]) or "file"
        got = (
            "" if finding["type"] == "missing" or isinstance(finding["input"], dict) else f" (got {finding['input']!r})"
        )
        findings.append(f"{field}: {finding['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(findings)
