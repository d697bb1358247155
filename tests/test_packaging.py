"""The working tree is the package: every tool uses its current files, and wheel and sdist contain all of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import trimode

ROOT = Path(__file__).resolve().parent.parent
# Not part of the project: environments, built engines, caches. Names that begin with a dot are left out as well.
NOT_COPIED = ("engines", "checkpoints", "out", "dist", "site", "__pycache__", "*.egg-info")
VERSION = "9.8.7"
FRESH = "def answer() -> int:\n    return 42\n"
FRESH_TEST = "from trimode.common.fresh import answer\n\ndef test_fresh():\n    assert answer() == 42\n"


class Tree:
    """A copy of the working tree, installed in place into a new environment, as by ``make setup``."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "working tree"
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=shutil.ignore_patterns(".*", *NOT_COPIED))
        self.python = folder / "environment" / "bin" / "python"
        venv.create(folder / "environment", symlinks=True)
        # Third-party packages come from the environment that runs the tests, so that nothing is downloaded.
        packages = sysconfig.get_path("purelib", vars={"base": str(folder / "environment")})
        (Path(packages) / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.pip("install", "--editable", str(self.root))

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", *arguments]
        done = run(self.root.parent, *command, "--no-deps", "--no-build-isolation", "--no-index")
        assert done.returncode == 0, done.stderr

    def write(self, path: str, text: str) -> None:
        (self.root / path).write_text(text)

    def run(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        return run(folder or self.root, str(self.python), *arguments)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run without PYTHONPATH, so that the installed package is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree that is changed after its installation: a new module, and another version."""
    tree = Tree(tmp_path_factory.mktemp("packaging"))
    tree.write("common/fresh.py", FRESH)
    tree.write("common/version.py", f'__version__ = "{VERSION}"\n')
    tree.write("tests/test_fresh.py", FRESH_TEST)
    return tree


def test_pytest_runs_the_working_tree(tree: Tree) -> None:
    command = ("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "tests/test_fresh.py")
    found = tree.run(*command)
    assert found.returncode == 0, found.stdout
    tree.write("common/fresh.py", FRESH.replace("answer", "renamed"))
    try:
        assert "cannot import name 'answer'" in tree.run(*command).stdout
    finally:
        tree.write("common/fresh.py", FRESH)


def test_the_command_runs_the_working_tree(tree: Tree, tmp_path: Path) -> None:
    found = run(tmp_path, str(tree.python.parent / "trimode"), "--version")
    assert found.stdout == f"trimode, version {VERSION}\n", found.stderr


def test_mypy_checks_the_working_tree(tree: Tree) -> None:
    tree.write("common/mistyped.py", "from trimode.common.fresh import answer\n\nvalue: str = answer()\n")
    try:
        # Third-party packages are not read, which takes most of the time.
        found = tree.run("-m", "mypy", "--follow-imports", "skip", "-p", "trimode.common")
    finally:
        (tree.root / "common/mistyped.py").unlink()
    assert "common/mistyped.py:3: error: Incompatible types" in found.stdout, found.stdout + found.stderr


def test_the_import_checker_checks_the_working_tree(tree: Tree) -> None:
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None))"
    assert tree.run("-c", program).returncode == 0
    tree.write("common/upward.py", "from trimode.runtime import loading\n")
    try:
        found = tree.run("-c", program)
    finally:
        (tree.root / "common/upward.py").unlink()
    assert found.returncode == 1
    assert "trimode.common.upward -> trimode.runtime.loading" in found.stdout, found.stdout


def test_wheel_and_sdist_hold_the_whole_working_tree(tree: Tree, tmp_path: Path) -> None:
    """The wheel is made from the sdist."""
    made = tree.run("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tree.root), folder=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    modules = {
        f"trimode/{path.relative_to(tree.root)}"
        for folder in (tree.root / "trimode").iterdir()
        if folder.is_dir() and folder.name != "__pycache__"
        for path in (tree.root / folder.name).rglob("*.py")
    } | {f"trimode/{path.name}" for path in (tree.root / "trimode").glob("*.py")}
    assert "trimode/common/fresh.py" in modules
    data = {"trimode/py.typed", "trimode/runtime/openai_server/playground.html"}
    with zipfile.ZipFile(tmp_path / f"trimode-{VERSION}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"trimode-{VERSION}.dist-info/METADATA").decode()
    assert {name for name in names if name.endswith(".py")} == modules
    assert data <= names
    assert f"\nVersion: {VERSION}\n" in metadata
    with tarfile.open(tmp_path / f"trimode-{VERSION}.tar.gz") as sdist:
        inside = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert modules | data <= inside
    assert not [name for name in inside if name.startswith("tests/")]


def test_one_version() -> None:
    assert importlib.metadata.version("trimode") == trimode.__version__


def test_public_names_are_imported_without_the_build_tools() -> None:
    """In a fresh process: ``import trimode`` imports nothing large, and ``LLM`` none of the build's packages."""
    program = (
        "import json, sys\n"
        "import trimode\n"
        "first = set(sys.modules)\n"
        "from trimode import LLM, CompletionOutput, RequestOutput, SamplingParams, __version__\n"
        "print(json.dumps([sorted(first), sorted(sys.modules)]))"
    )
    first, all_names = json.loads(run(ROOT, sys.executable, "-c", program).stdout)
    assert not {"numpy", "onnxruntime", "pydantic", "click"} & set(first)
    assert "pydantic" in all_names
    assert not {"torch", "onnx", "transformers", "peft", "modelopt", "tensorrt_rtx", "triton"} & set(all_names)
