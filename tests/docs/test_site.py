"""`make docs` fails where a link or an anchor of the site leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make_docs(pages: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The command of `make docs` with the project's settings, over a folder of pages."""
    settings = out / "mkdocs.yml"
    settings.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {pages}\nnav: [index.md, other.md]\nhooks: []\n")
    dry_run = ["make", "--dry-run", "--silent", "--old-file=.venv/.package", "docs"]
    command = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    command = command.replace(".venv/bin/mkdocs", f"{sys.executable} -m mkdocs")
    return subprocess.run(
        ["bash", "-c", f"{command} --config-file {settings} --site-dir {out / 'site'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("link", "code"),
    [("other.md", 0), ("other.md#part", 0), ("missing.md", 1), ("other.md#missing", 1), ("/absolute.md", 1)],
)
def test_links_of_the_site_are_checked(tmp_path: Path, link: str, code: int) -> None:
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text(f"# Index\n\n[link]({link})\n")
    (pages / "other.md").write_text("# Other\n\n## Part\n")
    built = make_docs(pages, tmp_path)
    assert built.returncode == code, built.stderr
