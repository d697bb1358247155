"""Install the wheel alone in a fresh environment and answer prompts there: ``make wheel-test``.

    python -m scripts.check_wheel dist

The environment holds the base dependencies only. Its decoding loop must be compiled, and its answers must equal those
that the working tree gives, whose loop is interpreted: in every mode, with drafts of every kind, drawn tokens,
penalties, grammars and many requests at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[1]
BUILD_PACKAGES = {"torch", "onnx", "transformers", "peft", "nvidia-modelopt", "fastapi"}
COMPILED = ("decoding.sequence", "grammar.matcher", "scheduling.auto_block")  # some of those in setup.py
# Printed by it: the answers, and the files of the compiled modules.
ANSWERS = """
import importlib, json, sys
from trimode import LLM, GuidedDecodingParams, SamplingParams

modules = [importlib.import_module("trimode.runtime." + name).__file__ for name in json.loads(sys.argv[2])]
prompts = ["What is 60% of 440?", "Repeat: red, green, blue.", "Give the facts about Ana as JSON."]
schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
settings = [
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16, "logprobs": 2},
    {"mode": "linear_spec", "draft_threshold": 0.5, "stop": ["4"]},
    {"mode": "linear_spec", "tree_width": 24, "lookup": True, "logit_bias": {300: 2.0}, "min_tokens": 4},
    {"mode": "linear_spec", "temperature": 0.9, "seed": 3, "top_p": 0.9, "frequency_penalty": 0.5},
    {"mode": "diffusion", "block_length": 8},
    {"mode": "auto", "n": 2, "temperature": 1.0, "seed": 5},
    {"mode": "linear_spec", "block_length": 16, "guided_decoding": GuidedDecodingParams(json=schema)},
    {"mode": "auto", "guided_decoding": GuidedDecodingParams(regex="[a-z ]{5,20}"), "temperature": 0.8, "seed": 7},
    {"mode": "linear_spec", "tree_width": 16, "guided_decoding": GuidedDecodingParams(json=schema), "logprobs": 0},
]
params = [SamplingParams(max_tokens=40, **setting) for setting in settings for _ in prompts]
with LLM(sys.argv[1], threads=1) as llm:
    answers = llm.generate(prompts * len(settings), params)
found = [[output.token_ids, output.finish_reason] for answer in answers for output in answer.outputs]
print(json.dumps({"answers": found, "modules": modules}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with one wheel")
    (wheel,) = parser.parse_args().folder.resolve().glob("trimode-*.whl")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        quantize_checkpoint(Checkpoint(ROOT / "checkpoints/tiny"), scratch / "w4a16", method="rtn", group=64)
        build_engine(Checkpoint(scratch / "w4a16"), scratch / "engine")
        venv.create(scratch / "environment", with_pip=True)
        binaries = scratch / "environment" / "bin"
        output(scratch, binaries / "python", "-m", "pip", "install", "--quiet", wheel)
        installed = {package["name"] for package in pip_list(scratch, binaries / "python")}
        surplus = installed & BUILD_PACKAGES
        if surplus:
            sys.exit(f"{wheel.name}: the base dependencies include {', '.join(sorted(surplus))}")
        script = ("-c", ANSWERS, scratch / "engine", json.dumps(COMPILED))
        found = json.loads(output(scratch, binaries / "python", *script))
        expected = json.loads(output(ROOT, sys.executable, *script))
        output(scratch, binaries / "trimode", "generate", scratch / "engine", "--prompt", "Hello", "--max-tokens", "4")
    interpreted = [module for module in found["modules"] if not module.endswith(".so")]
    if interpreted:
        sys.exit(f"{wheel.name} is not compiled: {', '.join(interpreted)}; build it with `make wheel`")
    if any(module.endswith(".so") for module in expected["modules"]):
        sys.exit("the working tree has compiled modules; remove them: they would hide changes of their sources")
    pairs = zip(found["answers"], expected["answers"], strict=True)
    other = [index for index, (mine, theirs) in enumerate(pairs) if mine != theirs]
    if other:
        first = found["answers"][other[0]], expected["answers"][other[0]]
        sys.exit(f"{wheel.name}: answers {other} are not those of the working tree; the first: {first[0]}, {first[1]}")
    print(
        f"{wheel.name}, compiled, with {len(installed)} packages: {len(found['answers'])} answers as the working tree's"
    )


def pip_list(folder: Path, python: Path) -> Any:
    return json.loads(output(folder, python, "-m", "pip", "list", "--format", "json"))


def output(folder: Path, *command: object) -> str:
    """Standard output of a command that must succeed. PYTHONPATH is unset, so the installed package is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    parts = [str(part) for part in command]
    done = subprocess.run(parts, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
