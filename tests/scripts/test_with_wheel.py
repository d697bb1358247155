"""Scripts run with the wheel's package, not with the working tree's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import with_wheel


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(with_wheel, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["with_wheel", "scripts.bench.grammar_time"])
    with pytest.raises(SystemExit, match="run `make wheel`"):
        with_wheel.main()


def test_the_module_imports_the_wheels_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, installed = tmp_path / "root", tmp_path / "installed"
    for folder in (root / "scripts", root / "tests", root / "trimode", installed / "trimode"):
        folder.mkdir(parents=True)
    (root / "scripts" / "shown.py").write_text("import sys, trimode\nprint(trimode.__file__)\nsys.exit(7)\n")
    for package in (root / "trimode", installed / "trimode"):
        (package / "__init__.py").touch()
    pip = subprocess.run

    def install_or_run(command: list[str], **options: object) -> object:
        return None if "pip" in command else pip(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", install_or_run)
    monkeypatch.setattr(with_wheel, "ROOT", root)
    monkeypatch.chdir(root)
    assert with_wheel.run(Path("trimode.whl"), installed, "scripts.shown", []) == 7
    assert capfd.readouterr().out.strip() == str(installed / "trimode" / "__init__.py")
