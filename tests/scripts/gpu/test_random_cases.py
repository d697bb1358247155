"""Whether the random cases of the kernel tests are the same on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
