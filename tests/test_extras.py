"""The extras of the installation: the remedies in error messages exist, every package has its reason in the
documentation, and ``make setup`` downloads no package that only a machine with a GPU can use.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SOURCES = [path for folder in ("build", "cli", "common", "engine", "runtime") for path in (ROOT / folder).rglob("*.py")]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
# They take gigabytes, or need a library that pip does not install.
LARGE = {"tensorrt-cu13", "tensorrt-llm"}
NAME = re.compile(r"[\w.-]+")


def packages(extra: str) -> set[str]:
    return {NAME.match(requirement)[0] for requirement in EXTRAS[extra]}  # type: ignore[index]


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_has_its_reason_in_the_documentation(extra: str) -> None:
    text = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    _, begin, rest = text.partition(f"\n## `[{extra}]`")
    assert begin
    rows = re.findall(r"^\| ([^|]+) \|", rest.partition("\n## ")[0], re.M)
    named = {name for row in rows for name in NAME.findall(row)}
    assert packages(extra) - named == set()


@pytest.mark.parametrize("pattern", [r"trimode\[([\w,]+)\]", r"'\.\[([\w,]+)\]'"])
def test_every_extra_that_a_message_or_a_page_names_exists(pattern: str) -> None:
    named = {
        extra
        for path in [*SOURCES, *PAGES, ROOT / "Makefile"]
        for found in re.findall(pattern, path.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert {"build", "cuda", "rtx", "tensorrt"} <= named
    assert named <= EXTRAS.keys()


def test_make_setup_installs_no_package_that_needs_a_gpu() -> None:
    installed = re.search(r"--editable '\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text("utf-8"))[1]  # type: ignore[index]
    assert {name for extra in installed.split(",") for name in packages(extra)} & LARGE == set()
    assert packages("tensorrt") & packages("trtllm") == set()
    assert packages("tensorrt") | packages("trtllm") >= LARGE


def test_the_tests_check_the_release_of_tensorrt_that_users_install() -> None:
    (users,) = (found for found in EXTRAS["tensorrt"] if found.startswith("tensorrt-cu13"))
    (tests,) = (found for found in EXTRAS["dev"] if found.startswith("tensorrt-cu13-bindings"))
    assert users.removeprefix("tensorrt-cu13") == tests.removeprefix("tensorrt-cu13-bindings") == ">=11.4,<11.5"
