"""Checkpoints and engines that the tests share; each is made once a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import logging as transformers_logging

from tests.random_checkpoint import write_random_checkpoint

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "tiny"


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of the family with a random adapter: shapes and formats, no skill."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The shipped, trained checkpoint."""
    return TINY


@pytest.fixture(scope="session")
def heldout() -> list[dict]:
    """Held-out problems: {"kind", "messages", "answer"}."""
    lines = (ROOT / "tests" / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
