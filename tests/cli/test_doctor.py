"""``trimode doctor``: what is installed, what is missing, and the remedy."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

from tests.support.driver_double import LibcudaDouble
from trimode.cli import machine_report as doctor


def absent(_name: str) -> None:
    raise OSError("libcuda.so.1: cannot open shared object file")


def test_a_gpu_is_named_with_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble())
    found = doctor.examine()
    assert found.driver == "CUDA 13.1"
    assert found.gpus == [doctor.Gpu(ordinal=0, name="GB10", compute_capability=121)]


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (absent, "none (libcuda.so.1 is not installed)"),
        (lambda _name: LibcudaDouble(3), "does not start (CUDA error 3)"),
    ],
)
def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch, library: Any, words: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    found = doctor.examine()
    assert words in found.driver
    assert ("GPU", "none") in found.lines()


@pytest.mark.parametrize(
    ("missing", "target", "remedy"),
    [
        ("onnx", "cpu", "trimode[build]"),
        ("onnx", "rtx", "trimode[build,rtx]"),
        ("tensorrt-rtx-cu13", "rtx", "trimode[build,rtx]"),
        ("triton", "cuda", "trimode[build]"),
        ("triton", "tensorrt", "trimode[build]"),
    ],
)
def test_a_missing_package_comes_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, missing: str, target: str, remedy: str
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == missing else "1.0")
    assert remedy in doctor.examine().targets[target]


@pytest.mark.parametrize(
    ("library", "missing", "words"),
    [
        (LibcudaDouble(), None, "runs on GB10, if built with --sm 121; builds and audits"),
        (LibcudaDouble(capability=(9, 0)), None, "does not run: it needs a GPU of compute capability 75, 80, 86"),
        (LibcudaDouble(100), None, "does not run: it needs an NVIDIA GPU and its driver; builds and audits"),
        (LibcudaDouble(), "cuda-bindings", "does not run: pip install 'trimode[rtx]'; builds"),
    ],
)
def test_whether_rtx_runs(
    monkeypatch: pytest.MonkeyPatch, library: LibcudaDouble, missing: str | None, words: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == missing else "1.0")
    assert doctor.examine().targets["rtx"].startswith(words)


def test_the_command_prints_it() -> None:
    program = [sys.executable, "-m", "trimode", "doctor"]
    found = subprocess.run(program, capture_output=True, text=True, check=True)
    assert "target cpu" in found.stdout
    assert found.stderr == ""


@pytest.mark.parametrize(
    ("installed", "library", "words"),
    [
        ({"onnx"}, absent, "does not build: pip install 'trimode[build]'"),
        ({"onnx", "triton"}, absent, "builds with --emit-only; to compile: pip install 'trimode[tensorrt]'"),
        ({"onnx", "triton", "tensorrt-cu13"}, absent, "builds with --emit-only; to compile it needs an NVIDIA GPU"),
        ({"tensorrt-cu13"}, absent, "does not run: it needs an NVIDIA GPU and its driver; does not build"),
        ({"tensorrt-cu13"}, LibcudaDouble(), "does not run: pip install 'trimode[tensorrt]'; does not build"),
        ({"cuda-bindings"}, LibcudaDouble(), "does not run: pip install 'trimode[tensorrt]'; does not build"),
        (
            {"tensorrt", "cuda-bindings"},
            LibcudaDouble(capability=(7, 5)),
            "it needs a GPU of compute capability 80, 86",
        ),
        (
            {"tensorrt", "cuda-bindings"},
            LibcudaDouble(),
            "runs on GB10, if compiled there (no plan was ever run); does",
        ),
        ({"onnx", "triton", "tensorrt-cu13", "cuda-bindings"}, LibcudaDouble(), "(no plan was ever run); builds"),
    ],
)
def test_what_target_tensorrt_lacks(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], library: Any, words: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library if callable(library) else lambda _name: library)
    monkeypatch.setattr(doctor, "_version", lambda package: "1" if package in installed else None)
    assert words in doctor.examine().targets["tensorrt"]
