"""The Markdown files: links, paths, modules and make targets exist, and the README is short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
PAGES = TRACKED.split()
FOLDERS = "build|cli|common|docs|engine|examples|model|plugins|quantize|runtime|scripts|tests|trimode"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
CODE_PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
MODULE = re.compile(r"python -m (scripts(?:\.\w+)+)")
MAKE_TARGET = re.compile(r"(?:^|`)make ([a-z-]+)", re.M)
MAKEFILE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page: str) -> None:
    text = re.sub(r"```.*?```", "", read(page), flags=re.S)
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_modules_and_make_targets_exist(page: str) -> None:
    text = read(page)
    missing = [path for path in CODE_PATH.findall(text) if not (ROOT / path).exists()]
    missing += [
        name for name in MODULE.findall(text) if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
    ]
    missing += [f"make {name}" for name in MAKE_TARGET.findall(text) if name not in MAKEFILE_TARGETS]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 120
