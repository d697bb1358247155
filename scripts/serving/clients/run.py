"""Third-party clients, unchanged, against `trimode serve`: prints a table of versions and results.

    python -m scripts.serving.clients.run ENGINE [--only NAME ...]

ENGINE is built from the shipped checkpoint. Each client is installed by pip or npm into its own folder under
``.clients`` and gets its own server. Exits with 1 if a client fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from scripts.serving.server_process import KEY, Served, serving

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ENVIRONMENTS = ROOT / ".clients"
TOKENIZER = ROOT / "checkpoints" / "tiny"
LIMIT_SECONDS = 900
# No reports of use, and no look-ups on the hub.
QUIET = {"DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
HUB_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
Command = Callable[[Path, str], list[str]]


class Client(NamedTuple):
    """``command``: from the client's environment and the server's URL. ``uses``: what it does, for the table.
    ``beside``: packages installed with it. ``requirements``: installed in place of the package's own.
    """

    name: str
    package: str
    uses: str
    command: Command
    registry: str = "PyPI"
    variables: Mapping[str, str] = HUB_OFFLINE
    beside: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()


def _script(name: str) -> Command:
    return lambda environment, url: [str(environment / "bin" / "python"), str(HERE / name), url, KEY]


def _program(name: str) -> Command:
    def command(environment: Path, url: str) -> list[str]:
        program = environment / name
        program.write_bytes((HERE / name).read_bytes())  # node looks for packages in the program's folder
        return ["node", str(program), url, KEY]

    return command


def _lm_eval(environment: Path, url: str) -> list[str]:
    """Local tasks, so that nothing is downloaded: generation, and log-likelihoods of token ids."""
    program = str(environment / "bin" / "lm_eval")
    common = f"model=tiny,base_url={url}/v1/completions,num_concurrent=2,max_retries=1"
    commands = [
        [program, "--model", "local-completions", "--model_args", f"{common},{tokenizer}", "--tasks", task]
        for task, tokenizer in (
            ("trimode_sums", "tokenizer_backend=None"),
            ("trimode_choices", f"tokenizer_backend=remote,auth_token={KEY}"),
        )
    ]
    return ["sh", "-c", " && ".join(shlex.join([*command, "--include_path", str(HERE)]) for command in commands)]


def _guidellm(environment: Path, url: str) -> list[str]:
    arguments = ["--backend", f"kind=openai_http,target={url},model=tiny,api_key={KEY}"]
    arguments += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"]
    arguments += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
    arguments += ["--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--disable-progress"]
    output = f"kind=json,path={environment / 'results.json'}"
    return [str(environment / "bin" / "guidellm"), "run", *arguments, "--output", output]


def _aiperf(environment: Path, url: str) -> list[str]:
    arguments = ["--model", "tiny", "--tokenizer", str(TOKENIZER), "--url", url, "--api-key", KEY, "--streaming"]
    arguments += ["--endpoint-type", "chat", "--request-count", "6", "--concurrency", "2", "--ui", "none"]
    arguments += ["--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16"]
    arguments += ["--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:16"]
    return [str(environment / "bin" / "aiperf"), "profile", *arguments, "--artifact-dir", str(environment / "results")]


def _vllm_bench(environment: Path, url: str) -> list[str]:
    """Chats, then completions. The program exits with 0 although requests have failed, so the count is checked."""
    vllm = f"'{environment}/bin/python' -m vllm.entrypoints.cli.main bench serve --base-url {url} --model tiny"
    vllm += (
        f" --tokenizer '{TOKENIZER}' --dataset-name random --random-input-len 32 --random-output-len 16 --ignore-eos"
    )
    vllm += " --num-prompts 6 --max-concurrency 2"
    runs = ("openai-chat --endpoint /v1/chat/completions", "openai --endpoint /v1/completions")
    checked = [f"{vllm} --backend {run} | tee /dev/stderr | grep -q 'Successful requests: *6'" for run in runs]
    return ["bash", "-c", " && ".join(checked)]


# What `vllm bench serve` imports; vLLM's own requirements contain packages for GPUs.
_VLLM_BENCH = (
    *("torch==2.13.0", "transformers", "openai", "openai-harmony", "fastapi", "uvicorn", "uvloop", "aiohttp"),
    *("requests", "urllib3", "cbor2", "msgspec", "orjson", "cloudpickle", "pybase64", "blake3", "cachetools", "regex"),
    *("pillow", "psutil", "py-cpuinfo", "pyzmq", "partial-json-parser", "prometheus-client", "watchfiles"),
    *("xgrammar", "llguidance", "einops"),
)

CLIENTS = (
    Client("openai (Python)", "openai", "chat, stream, completions, logprobs, errors", _script("chat_with_openai.py")),
    Client(
        "openai (Python), tools and responses",
        "openai",
        "tools, parsing, stream helpers, errors; Responses API: streamed, not streamed, parsed",
        _script("tools_with_openai.py"),
    ),
    Client(
        "openai (JavaScript)", "openai", "chat, stream, completions, errors", _program("chat_with_openai.mjs"), "npm"
    ),
    Client(
        "openai (JavaScript), tools and responses",
        "openai",
        "tools, stream helper; Responses API: streamed, not streamed, parsed",
        _program("tools_with_openai.mjs"),
        "npm",
    ),
    Client("LangChain", "langchain-openai", "invoke, stream, batch, tool turns", _script("chat_with_langchain.py")),
    Client(
        "LangChain, agents",
        "langchain",
        "bound tools, three kinds of structured output, agents; both APIs",
        _script("agent_with_langchain.py"),
        beside=("langchain-openai",),
    ),
    Client(
        "llama-index",
        "llama-index-llms-openai-like",
        "chat, stream, completion",
        _script("chat_with_llama_index.py"),
    ),
    Client("LiteLLM", "litellm", "completion, stream, text completion, errors", _script("chat_with_litellm.py")),
    Client(
        "instructor",
        "instructor",
        "Pydantic models through tools and through JSON schemas, streamed",
        _script("typed_with_instructor.py"),
    ),
    Client(
        "pydantic-ai",
        "pydantic-ai-slim[openai]",
        "typed output through tools and JSON schemas, tool turns, streams; both APIs",
        _script("agent_with_pydantic_ai.py"),
    ),
    Client(
        "openai-agents",
        "openai-agents",
        "a tool call, its result and the final answer; streams; typed output; both APIs",
        _script("agent_with_openai_agents.py"),
    ),
    Client(
        "AI SDK",
        "ai",
        "tool calls, results and the final answer; objects; streams; both APIs",
        _program("agent_with_ai_sdk.mjs"),
        "npm",
        beside=("@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"),
    ),
    Client("lm-eval", "lm-eval[api]", "a generation and a multiple-choice task through local-completions", _lm_eval),
    Client("guidellm", "guidellm", "a benchmark with synthetic prompts", _guidellm),
    # Offline, aiperf does not accept a local folder as tokenizer.
    Client("aiperf", "aiperf", "a streaming profile with min_tokens and ignore_eos", _aiperf, variables={}),
    Client(
        "vLLM's bench serve",
        "vllm",
        "a benchmark of random chats and completions with ignore_eos",
        _vllm_bench,
        variables={**HUB_OFFLINE, "VLLM_NO_USAGE_STATS": "1"},
        requirements=_VLLM_BENCH,
    ),
)


def _variables() -> dict[str, str]:
    """Without PYTHONPATH, by which a client would see this project's packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def installed(client: Client) -> Path:
    """The client's environment, made if it does not exist."""
    environment = ENVIRONMENTS / re.sub(r"\W+", "-", f"{client.registry} {client.package}".lower()).strip("-")
    if (environment / "ready").exists():
        return environment
    if client.registry == "npm":
        environment.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--silent", client.package, *client.beside]
        subprocess.run(command, cwd=environment, check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        install = [environment / "bin" / "pip", "install", "--quiet"]
        own = ["--no-deps"] if client.requirements else []
        subprocess.run([*install, *own, client.package, *client.beside], check=True, env=_variables())
        if client.requirements:
            subprocess.run([*install, *client.requirements], check=True, env=_variables())
    (environment / "ready").touch()
    return environment


def version(client: Client, environment: Path) -> str:
    if client.registry == "npm":
        package = environment / "node_modules" / client.package / "package.json"
        return str(json.loads(package.read_text(encoding="utf-8"))["version"])
    name = client.package.partition("[")[0]
    program = f"from importlib.metadata import version; print(version({name!r}))"
    command = [environment / "bin" / "python", "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(client: Client, environment: Path, server: Served) -> str | None:
    """The end of the client's output if it failed."""
    found = subprocess.run(
        client.command(environment, server.url),
        cwd=HERE,
        env={**_variables(), **QUIET, **client.variables, "OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    return None if found.returncode == 0 else found.stdout[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--only", nargs="*", choices=[client.name for client in CLIENTS])
    options = parser.parse_args()
    failed = False
    print("| client | version | what it does | successful requests | errors | unknown fields | result |")
    print("|---|---|---|---|---|---|---|")
    for client in CLIENTS:
        if options.only and client.name not in options.only:
            continue
        environment = installed(client)
        with serving(options.engine, "--log-level", "info") as server:
            error = run(client, environment, server)
            time.sleep(0.2)
            log = list(server.log)
        failed |= error is not None
        requests = [line for line in log if " trimode.request: POST " in line]
        answered = sum(" 200 " in line for line in requests)
        ignored = {line.partition("fields: ")[2].strip() for line in log if "ignored unknown fields" in line}
        result = "passed" if error is None else "failed"
        counts = (str(answered), str(len(requests) - answered), "; ".join(sorted(ignored)) or "none")
        columns = (client.name, version(client, environment), client.uses, *counts, result)
        print(f"| {' | '.join(columns)} |", flush=True)
        if error is not None:
            print(error, file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
