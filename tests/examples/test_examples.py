"""Every example runs, and so do the README's snippets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from scripts.serving.server_process import KEY, Served, serving
from scripts.serving.triton_server import Ports
from tests.support.patience import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ANSWER = "60% of 440 is 264."


def run(*command: str | Path) -> str:
    """Standard output of a program that sees the working tree."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRIMODE_API_KEY": KEY}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def snippet(language: str, holding: str) -> str:
    """The README's code block in this language that holds this text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = (code for code in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S) if holding in code)
    return found


def test_every_example_is_run_here() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {name for name in names if f'"{name}"' in tests} == names


def test_batch(tiny_engine: Path) -> None:
    found = run(sys.executable, EXAMPLES / "batch.py", tiny_engine)
    assert ANSWER in found
    assert found.count("ended by stop") == 4


def test_async_streaming(tiny_engine: Path) -> None:
    found = run(sys.executable, EXAMPLES / "async_streaming.py", tiny_engine)
    assert re.search(rf"^first finished: .*{re.escape(ANSWER)}$", found, re.M)
    assert re.search(r"^second finished: .*So it is June\.$", found, re.M)
    assert "third finished: cancelled" in found


def test_openai_client(tiny_engine: Path) -> None:
    with serving(tiny_engine) as server:
        found = run(sys.executable, EXAMPLES / "openai_client.py", "--url", f"{server.url}/v1")
    for line in ("ar", "diffusion", "linear_spec", "streamed"):
        assert re.search(rf"^{line}: .*{re.escape(ANSWER)}$", found, re.M), found


def test_triton_client(triton: Ports) -> None:
    found = run(sys.executable, EXAMPLES / "triton_client.py", "--url", f"127.0.0.1:{triton.grpc}")
    assert found.splitlines()[-1].endswith(ANSWER)


def test_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is committed without outputs"
    client = NotebookClient(
        notebook, timeout=HANG_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.output_type == "stream")
    for mode in ("ar", "diffusion", "linear_spec"):
        assert re.search(rf"^{mode}: .*{re.escape(ANSWER)}$", printed, re.M), printed
    assert "linear_spec emits the tokens of ar: True" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_readmes_python(tiny_engine: Path) -> None:
    """With the engine that the tests share, since building one by AWQ takes minutes."""
    program = snippet("python", "import LLM")
    assert '"checkpoints/tiny"' in program
    found = run(sys.executable, "-c", program.replace("checkpoints/tiny", str(tiny_engine)))
    assert [line.partition(":")[0] for line in found.splitlines()] == ["ar", "diffusion", "linear_spec"]
    assert found.count(ANSWER) == 3


def test_the_readmes_curl(tiny_engine: Path) -> None:
    with serving(tiny_engine) as server:
        assert ANSWER in run("bash", "-c", curl_of(server))


def curl_of(server: Served) -> str:
    """The README's request, sent to this server with its key."""
    command = snippet("bash", "curl ")
    (request,) = re.findall(r"^curl .*?[^\\]\n", command, re.M | re.S)
    return request.strip().replace("http://127.0.0.1:8000", server.url) + f" -fsS -H 'authorization: Bearer {KEY}'"
