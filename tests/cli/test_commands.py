"""The command line as a user meets it: in its own process, by its output and its exit code."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JSON_FIELDS = {
    "text",
    "token_ids",
    "finish_reason",
    "mode",
    "prompt_tokens",
    "completion_tokens",
    "passes",
    "cycles",
    "drafted",
    "accepted",
    "tokens_per_forward",
    "mean_acceptance",
    "time_to_first_token",
    "seconds",
}


def trimode(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from trimode.cli.command import main; main()", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def one_line_error(result: subprocess.CompletedProcess[bytes]) -> str:
    text = result.stderr.decode()
    assert result.returncode == 2, text
    assert text.startswith("trimode: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize("mode", ["auto", "ar", "diffusion", "linear_spec"])
def test_generate_json(random_engine: Path, mode: str) -> None:
    result = trimode(
        "generate", "--engine", random_engine, "--prompt", "Hi", "--mode", mode, "--max-tokens", 9, "--json"
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer.keys() == JSON_FIELDS
    assert answer["passes"].keys() == {"prefill", "draft", "denoise", "commit"}
    assert len(answer["token_ids"]) == answer["completion_tokens"] <= 9


def test_streamed_text_is_the_text_of_the_json(random_engine: Path) -> None:
    arguments = ["generate", "--engine", random_engine, "--prompt", "-", "--max-tokens", 20, "--temperature", 1.3]
    streamed = trimode(*arguments, "--seed", 5, stdin="Grüße 🙂\n".encode())
    answer = json.loads(trimode(*arguments, "--seed", 5, "--json", stdin="Grüße 🙂\n".encode()).stdout)
    assert streamed.stdout.decode() == answer["text"] + "\n"
    assert b"tokens a cycle" in streamed.stderr


def test_chat_template_or_not(random_engine: Path) -> None:
    common = ["generate", "--engine", random_engine, "--prompt", "abc", "--max-tokens", 1, "--json"]
    plain = json.loads(trimode(*common, "--no-chat-template").stdout)
    assert plain["prompt_tokens"] == 3
    assert json.loads(trimode(*common).stdout)["prompt_tokens"] > 3


BAD_GENERATE = {
    "empty prompt": (["--prompt", ""], "the prompt is empty"),
    "blank prompt": (["--prompt", " \n "], "the prompt is empty"),
    "no tokens wanted": (["--prompt", "x", "--max-tokens", "0"], "max_tokens is 0"),
    "unknown mode": (["--prompt", "x", "--mode", "quadratic"], "quadratic"),
    "not a number": (["--prompt", "x", "--threshold", "high"], "high"),
    "threshold": (["--prompt", "x", "--threshold", "1.5"], "threshold is 1.5"),
    "too long": (["--prompt", "word " * 3000], "exceeds the engine's capacity of 8192"),
    "too many tokens": (["--prompt", "x", "--max-tokens", "9000"], "exceeds the engine's capacity"),
    "no adapter where none is used": (
        ["--prompt", "x", "--mode", "diffusion", "--no-adapter"],
        "--no-adapter has no meaning in mode diffusion",
    ),
    "no prompt": ([], "--prompt"),
    "unknown option": (["--prompt", "x", "--quick"], "--quick"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_bad_requests_are_one_line_and_exit_code_2(random_engine: Path, case: str) -> None:
    arguments, message = BAD_GENERATE[case]
    result = trimode("generate", "--engine", random_engine, *arguments)
    assert message in one_line_error(result)
    assert result.stdout == b""


def test_bad_stdin(random_engine: Path) -> None:
    result = trimode("generate", "--engine", random_engine, "--prompt", "-", stdin=b"abc\xff")
    assert "not UTF-8 (byte 3)" in one_line_error(result)


def test_bad_folders(tmp_path: Path, random_checkpoint: Path) -> None:
    assert "is not an engine directory" in one_line_error(trimode("info", tmp_path))
    assert "is not a folder" in one_line_error(trimode("build", tmp_path / "none", tmp_path / "out"))
    assert "is not a folder" in one_line_error(trimode("quantize", tmp_path / "none", tmp_path / "out"))
    assert "config.json is missing" in one_line_error(trimode("build", tmp_path, tmp_path / "out"))
    occupied = one_line_error(trimode("quantize", random_checkpoint, random_checkpoint, "--method", "rtn"))
    assert "exists already" in occupied
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_the_whole_way_in_json(random_checkpoint: Path, tmp_path: Path) -> None:
    quantized = trimode("quantize", random_checkpoint, tmp_path / "w4", "--method", "rtn", "--json")
    assert json.loads(quantized.stdout)["method"] == "rtn"
    built = json.loads(trimode("build", tmp_path / "w4", tmp_path / "engine", "--json").stdout)
    assert built == json.loads(trimode("info", tmp_path / "engine", "--json").stdout)
    assert "int4 in groups of 128" in trimode("info", tmp_path / "engine").stdout.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "w4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_leaves_nothing(random_checkpoint: Path, tmp_path: Path, number: int) -> None:
    """Stopped by a real signal while it writes: a pause stands where the big files would take their time."""
    program = (
        "import time, trimode.build.engine_builder as engine, trimode.cli.command as command\n"
        "hashed = engine.hash_files\n"
        "def slow(*arguments):\n    print('hashing', flush=True)\n    time.sleep(60)\n    return hashed(*arguments)\n"
        "engine.hash_files = slow\n"
        "command.main()"
    )
    command = [sys.executable, "-c", program, "build", str(random_checkpoint), str(tmp_path / "engine")]
    # A shell that starts the tests in the background has them ignore SIGINT, and their children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hashing\n"
        time.sleep(0.05)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["trimode.cli.commands", "click", "numpy.linalg", "onnxruntime", "tokenizers"])
def test_an_interrupt_among_the_first_imports_is_one_line(module: str) -> None:
    """A real signal when the installed command comes to import ``module``, which is before it has come to itself."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["trimode"]
    program = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from {entry.replace(':', ' import ')}\n"
        "main()"
    )
    found = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "trimode: interrupted\n")


def test_help_and_version() -> None:
    assert "quantize" in trimode("--help").stdout.decode()
    assert trimode("--version").returncode == 0
