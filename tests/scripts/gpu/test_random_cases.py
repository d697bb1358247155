"""Whether the random cases of the kernel tests are the same on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.gpu.kernel_launch import node_of, prepare
from tests.support import gpu_kernels
from trimode.plugins.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import json, sys
from hypothesis import given, settings, strategies
from tests.support.gpu_kernels import draw_the_same_cases_everywhere

def drawn():
    @settings(derandomize=True, database=None, deadline=None, max_examples=500)
    @given(strategies.integers(1, 10**6))
    def case(size):
        sizes.append(size)

    sizes = []
    case()
    return sizes

sys.path.insert(0, sys.argv[1])
found = [drawn()]
import first_module
found.append(drawn())
draw_the_same_cases_everywhere()
found.append(drawn())
import second_module
found.append(drawn())
print(json.dumps(found))
"""


def test_other_loaded_modules_do_not_change_random_cases(tmp_path: Path) -> None:
    """Without the function that the kernel tests call, integers in the source of any module would."""
    for name, start in (("first_module", 1000), ("second_module", 500_000)):
        (tmp_path / f"{name}.py").write_text(f"SIZES = {[start + 777 * index for index in range(200)]}\n")
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    alone, with_another, same, same_with_another = json.loads(ended.stdout)
    assert alone != with_another
    assert same == same_with_another
    assert len(set(same)) > 100


def test_the_list_has_no_kernel_that_a_gpu_run_would_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random case with such a kernel is left out of the listing run too: hypothesis draws other cases after it."""
    operator = OPERATORS["RmsNorm"]
    listed, executed = gpu_kernels.ListedKernels(90), list[int]()
    monkeypatch.setattr(
        gpu_kernels.TestedKernel, "fits", lambda kernel, sm: sm == 90 and kernel.constants["WIDTH"] % 2 == 0
    )

    @settings(derandomize=True, database=None, deadline=None, max_examples=20)
    @given(st.integers(1, 9))
    def case(width: int) -> None:
        inputs: dict[str, Any] = {"x": torch.ones(1, width), "weight": torch.ones(width), "epsilon": torch.ones(1)}
        listed(prepare(operator, inputs, next(iter(operator.tactics(node_of(inputs)).values()))))
        executed.append(width)

    case()
    assert set(executed) == {2, 4, 6, 8}
    listed.write(tmp_path / "kernels.json")
    kernels = list(gpu_kernels.listed_kernels(tmp_path / "kernels.json"))
    assert {kernel.constants["WIDTH"] for kernel in kernels} == {2, 4, 6, 8}
