"""The command line in separate processes: output, exit code and signals."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import pytest

from tests.support.command import run_here
from tests.support.patience import HANG_SECONDS
from trimode import LLM, __version__
from trimode.cli.commands import SUMMARIES, commands
from trimode.cli.prompt import read_prompt
from trimode.common.errors import TriModeError

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
    command = [sys.executable, "-m", "trimode", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def one_line_error(result: subprocess.CompletedProcess[bytes] | subprocess.CompletedProcess[str]) -> str:
    text = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
    assert result.returncode == 2, text
    assert text.startswith("trimode: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize("mode", ["auto", "ar", "diffusion", "linear_spec"])
def test_generate_json(random_engine: Path, mode: str) -> None:
    result = trimode("generate", random_engine, "--prompt", "Hi", "--mode", mode, "--max-tokens", 9, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer.keys() == JSON_FIELDS
    assert answer["passes"].keys() == {"prefill", "draft", "denoise", "commit"}
    assert len(answer["token_ids"]) == answer["completion_tokens"] <= 9


def test_streamed_text_is_the_text_of_the_json(random_engine: Path) -> None:
    arguments = ["generate", random_engine, "--prompt", "-", "--max-tokens", 20, "--temperature", 1.3]
    streamed = trimode(*arguments, "--seed", 5, stdin="Grüße 🙂\n".encode())
    answer = json.loads(trimode(*arguments, "--seed", 5, "--json", stdin="Grüße 🙂\n".encode()).stdout)
    assert streamed.stdout.decode() == answer["text"] + "\n"
    assert b"tokens per cycle" in streamed.stderr


def test_an_answer_is_explained_on_stderr(random_engine: Path) -> None:
    options = ["--max-tokens", 20, "--lookup", "--explain"]
    result = trimode("generate", random_engine, "--prompt", "Hi", "--mode", "auto", *options)
    assert result.returncode == 0, result.stderr
    for shown in (b"drafts of a cycle", b"milliseconds of a pass", b"commit"):
        assert shown in result.stderr
        assert shown not in result.stdout


def test_chat_template_or_not(random_engine: Path) -> None:
    common = ["generate", random_engine, "--prompt", "abc", "--max-tokens", 1, "--json"]
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
    "too long": (["--prompt", "word " * 3000], "no room for an answer in the context of 8192 tokens"),
    "too many tokens": (["--prompt", "x", "--max-tokens", "9000"], "exceeds the context of 8192 tokens"),
    "no adapter where none is used": (
        ["--prompt", "x", "--mode", "diffusion", "--no-adapter"],
        "--no-adapter has no effect in mode diffusion",
    ),
    "no prompt": ([], "--prompt"),
    "unknown option": (["--prompt", "x", "--quick"], "--quick"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_bad_requests_are_one_line_and_exit_code_2(random_engine: Path, case: str) -> None:
    arguments, message = BAD_GENERATE[case]
    result = run_here("generate", random_engine, *arguments)
    assert message in one_line_error(result)
    assert result.stdout == ""


def test_bad_stdin(random_engine: Path) -> None:
    result = trimode("generate", random_engine, "--prompt", "-", stdin=b"abc\xff")
    assert "not UTF-8 (byte 3)" in one_line_error(result)


def test_bad_folders(tmp_path: Path, random_checkpoint: Path) -> None:
    assert "is not an engine directory" in one_line_error(run_here("info", tmp_path))
    assert "is not a folder" in one_line_error(run_here("build", tmp_path / "none", tmp_path / "out"))
    assert "is not a folder" in one_line_error(run_here("quantize", tmp_path / "none", tmp_path / "out"))
    assert "config.json is missing" in one_line_error(run_here("build", tmp_path, tmp_path / "out"))
    occupied = one_line_error(run_here("quantize", random_checkpoint, random_checkpoint, "--method", "rtn"))
    assert "exists already" in occupied
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_quantize_build_and_info_print_json(random_checkpoint: Path, tmp_path: Path) -> None:
    quantized = run_here("quantize", random_checkpoint, tmp_path / "w4", "--method", "rtn", "--json")
    assert json.loads(quantized.stdout)["method"] == "rtn"
    built = json.loads(run_here("build", tmp_path / "w4", tmp_path / "engine", "--json").stdout)
    assert built == json.loads(run_here("info", tmp_path / "engine", "--json").stdout)
    assert "int4 in groups of 128" in run_here("info", tmp_path / "engine").stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "w4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_leaves_nothing(random_checkpoint: Path, tmp_path: Path, number: int) -> None:
    """A real signal while it writes; a pause replaces the time that large files would take."""
    program = (
        "import time, trimode.build.engine_builder as engine, trimode.cli.main as command\n"
        "hashed = engine.hash_files\n"
        "def slow(*arguments):\n    print('hashing', flush=True)\n    time.sleep(60)\n    return hashed(*arguments)\n"
        "engine.hash_files = slow\n"
        "command.main()"
    )
    command = [sys.executable, "-c", program, "build", str(random_checkpoint), str(tmp_path / "engine")]
    # If a shell started the tests in the background, they ignore SIGINT, and child processes inherit this.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hashing\n"
        time.sleep(0.05)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("trimode.cli.commands", ["--version"]),
        ("click", ["--version"]),
        ("numpy.linalg", ["info", "none"]),
        ("llguidance", ["generate", "none", "--prompt", "x"]),
        ("tokenizers", ["build", "none", "out"]),
        ("onnx", ["build", "none", "out"]),
        ("fastapi", ["serve", "none"]),
    ],
)
def test_an_interrupt_during_imports_is_one_line(module: str, arguments: list[str], tmp_path: Path) -> None:
    """A real signal, when the installed entry point imports ``module``."""
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
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "trimode: interrupted\n")


def test_the_version() -> None:
    assert trimode("--version").stdout.decode() == f"trimode, version {__version__}\n"


def test_help_lists_every_command_with_its_full_summary_and_imports_none() -> None:
    program = (
        "import json, sys\n"
        "from trimode.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    environment = os.environ | {"COLUMNS": "80"}
    found = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True, env=environment
    )
    *lines, modules = found.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name, summary in SUMMARIES.items():
        assert [line.split(None, 1) for line in lines].count([name, summary]) == 1
    assert not {"numpy", "onnxruntime", "pydantic", "rich", *(f"trimode.cli.{name}" for name in SUMMARIES)} & set(
        json.loads(modules)
    )


def test_every_module_of_a_command_is_listed() -> None:
    modules = {path.stem for path in (ROOT / "cli").glob("*.py") if "\n@click.command" in path.read_text()}
    groups = {path.stem for path in (ROOT / "cli").glob("*.py") if "\n@click.group" in path.read_text()}
    assert modules | groups - {"commands"} == set(SUMMARIES)


@pytest.mark.parametrize("name", SUMMARIES)
def test_help_of_each_command(name: str) -> None:
    with click.Context(commands, info_name="trimode") as parent:
        command = commands.get_command(parent, name)
        assert command is not None
        text = command.get_help(click.Context(command, parent=parent, info_name=name))
    assert f"Usage: trimode {name} " in text
    assert "_" not in re.sub(r"[a-z]+_spec|\$[A-Z_]+", "", text.split("Options:")[0])


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["generate", "x", "--quick"], "trimode generate"),
        (["generate"], "trimode generate"),
        (["build", "x", "y", "--target", "abacus"], "trimode build"),
        (["audit", "x", "--step", "one"], "trimode audit"),
        (["complie"], "trimode"),
        (["--quick"], "trimode"),
    ],
)
def test_a_usage_error_names_the_help(arguments: list[str], command: str) -> None:
    assert re.search(rf"[^.?][.?] Try '{command} --help'\.\n$", one_line_error(run_here(*arguments)))


def test_a_missing_package_names_its_extra(tmp_path: Path) -> None:
    for package, extra, arguments in (
        ("onnx", "build", ["build", "x", "y"]),
        ("fastapi", "serve", ["serve", "x"]),
    ):
        program = f"import sys; sys.modules[{package!r}] = None; from trimode.cli.main import main; main()"
        command = [sys.executable, "-c", program, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        found = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, env=environment)
        assert f"the package {package} is not installed: pip install 'trimode[{extra}]'" in one_line_error(found)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    environment = os.environ | {
        "_TRIMODE_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "trimode qu",
        "COMP_CWORD": "qu" if shell == "fish" else "1",
    }
    found = subprocess.run(
        [sys.executable, "-m", "trimode"], capture_output=True, text=True, check=False, env=environment
    )
    assert "quantize" in found.stdout
    assert "build" not in found.stdout


BYTES_OF_A_PROMPT = {
    "a byte order mark": (b"\xef\xbb\xbfabc\n", "abc"),
    "CRLF": (b"ab\r\nc\r\n", "ab\nc"),
    "both": (b"\xef\xbb\xbfab\r\nc", "ab\nc"),
    "two line breaks at the end": (b"abc\n\n", "abc\n"),
    "spaces": (b"  abc ", "  abc "),
    "a byte order mark inside": ("ab\ufeffc".encode(), "ab\ufeffc"),
}


@pytest.mark.parametrize("case", BYTES_OF_A_PROMPT)
def test_a_prompt_from_stdin(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected = BYTES_OF_A_PROMPT[case]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert read_prompt("-") == expected


def test_a_prompt_with_crlf_gives_the_answer_of_the_same_prompt_with_lf(random_engine: Path) -> None:
    arguments = ["generate", random_engine, "--prompt", "-", "--max-tokens", 8, "--json"]
    answers = [
        json.loads(trimode(*arguments, stdin=given).stdout) for given in (b"one\ntwo\n", b"\xef\xbb\xbfone\r\ntwo\r\n")
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[0]["prompt_tokens"] == answers[1]["prompt_tokens"]


def with_closed(stream: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run the command from a shell that closes one of its standard streams."""
    script = f'exec "$@" {stream}'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "trimode", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False)


def test_closed_stdin(random_engine: Path) -> None:
    common = ["generate", random_engine, "--max-tokens", 3, "--json"]
    assert "stdin is closed" in one_line_error(with_closed("<&-", *common, "--prompt", "-"))
    closed = with_closed("<&-", *common, "--prompt", "abc")
    assert closed.returncode == 0, closed.stderr
    assert len(json.loads(closed.stdout)["token_ids"]) == 3


def test_closed_stdout_and_stderr(random_engine: Path) -> None:
    arguments = ["generate", random_engine, "--max-tokens", 3, "--prompt", "abc"]
    silent = with_closed(">&-", *arguments)
    assert (silent.returncode, silent.stdout) == (0, b"")
    assert b"tokens per cycle" in silent.stderr
    failed = with_closed("2>&-", "info", "none")
    assert (failed.returncode, failed.stdout, failed.stderr) == (2, b"", b"")


def test_the_default_mode_is_the_default_of_the_api(random_engine: Path) -> None:
    default = inspect.signature(LLM).parameters["mode"].default
    arguments = ["generate", random_engine, "--prompt", "x", "--max-tokens", 2, "--no-adapter"]
    assert json.loads(trimode(*arguments, "--json").stdout)["mode"] == default
    assert trimode(*arguments).stderr.decode().startswith(f"[{default}: 2 tokens in ")


def test_dynamo_names_the_environment_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamo", None)
    monkeypatch.delitem(sys.modules, "trimode.runtime.dynamo.worker", raising=False)
    with pytest.raises(TriModeError, match=r"in an environment of its own \(`make dynamo-environment`\)"):
        commands.main(["dynamo", "no-engine"], standalone_mode=False)
