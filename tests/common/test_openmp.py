"""Torch's idle threads sleep, whichever module of the project imports torch first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trimode.common import openmp

WAYS = {
    "the reference": "import trimode.model.reference.network",
    "AWQ": "import trimode.quantize.awq",
}


def openmp_settings(program: str, **variables: str) -> str:
    """The settings that the OpenMP library prints when it is loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **variables}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("way", WAYS)
def test_idle_threads_sleep(way: str) -> None:
    assert "GOMP_SPINCOUNT = '0'" in openmp_settings(WAYS[way])


def test_what_the_user_set_is_kept() -> None:
    settings = openmp_settings(WAYS["the reference"], OMP_WAIT_POLICY="ACTIVE")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in settings
    assert "GOMP_SPINCOUNT = '0'" not in settings


def test_threads_follow_the_cpu_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("OMP_NUM_THREADS", None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(openmp, "usable_cpus", lambda: 3)
    openmp.configure_openmp()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.setattr(openmp, "usable_cpus", lambda: 5)
    openmp.configure_openmp()
    assert os.environ["OMP_NUM_THREADS"] == "3"
