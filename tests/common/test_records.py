"""JSON files as checked records: encodings, and errors that name the file, the field and the value."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from trimode.common.errors import TriModeError
from trimode.common.records import describe, read_json, read_json_object, read_json_record, read_text


class Point(BaseModel):
    model_config = ConfigDict(strict=True)

    x: int
    y: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> Point:
        if self.y > self.x:
            raise ValueError(f"y {self.y} exceeds x {self.x}")
        return self


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "point.json"
    path.write_bytes(mark + '{"x": 3, "name": "Jörg"}'.encode())
    assert read_json_record(Point, path) == Point(x=3)
    assert read_json(path)["name"] == "Jörg"
    assert read_text(path).startswith("{")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"point\.json is missing"),
        (b"", r"point\.json is not valid JSON"),
        (b"{", r"point\.json is not valid JSON"),
        (b"[" * 100_000, r"point\.json is not valid JSON"),
        (b"\xff\xfe{\x00}\x00", r"point\.json cannot be read"),
        (b"[]", r"point\.json: "),
        (b"{}", r"point\.json: x: Field required"),
        (b'{"x": "3"}', r"point\.json: x: .*\(got '3'\)"),
        (b'{"x": 1, "y": 2}', r"point\.json: file: y 2 exceeds x 1"),
    ],
)
def test_errors_name_file_field_and_value(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "point.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TriModeError, match=message) as caught:
        read_json_record(Point, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_object_is_required(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(TriModeError, match=r"list\.json: a JSON object is expected"):
        read_json_object(tmp_path / "list.json")


def test_several_findings_are_one_line() -> None:
    with pytest.raises(ValidationError) as caught:
        Point.model_validate({"x": "a", "y": None})
    assert describe(caught.value).count("; ") == 1
