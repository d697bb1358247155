"""Which tests scripts/mutation runs for a mutant."""

from __future__ import annotations

from pathlib import Path

from scripts.mutation import run
from scripts.mutation.mutants import Mutant

FILE = "runtime/kv/slots.py"


def recorded(name: str, seconds: float, *calls: tuple[str, int]) -> run.RecordedTest:
    return run.RecordedTest(name, seconds, frozenset(calls))


def chosen(function: int | None, tests: list[run.RecordedTest]) -> list[str]:
    place = run.Place(Path(FILE), Mutant(9, "1", "2", "", function))
    return [test.name for test in run.tests_of(place, tests)]


def test_those_that_call_its_function_or_outside_functions_any_of_its_file() -> None:
    tests = [
        recorded("a::one", 1.0, (FILE, 7), ("runtime/kv/other.py", 3)),
        recorded("a::two", 1.0, (FILE, 3)),
        recorded("a::three", 1.0, ("runtime/kv/other.py", 7)),
        recorded("a::four", 1.0),
    ]
    assert chosen(7, tests) == ["a::one"]
    assert chosen(3, tests) == ["a::two"]
    assert chosen(None, tests) == ["a::one", "a::two", "a::four"]  # the last one may compare constants
    assert chosen(4, tests) == []


def test_the_fastest_ones_that_take_a_minute_together_by_file() -> None:
    """A file's tests run together, since they share what they set up."""
    times = {"slow::a": 31.0, "quick::b": 2.0, "slow::c": 4.0, "quick::d": 20.0, "slow::e": 3.9}
    tests = [recorded(name, seconds, (FILE, 7)) for name, seconds in times.items()]
    assert chosen(7, tests) == ["slow::e", "slow::c", "quick::b", "quick::d"]
    assert chosen(7, [recorded("slow::a", 99.0, (FILE, 7)), recorded("slow::b", 61.0, (FILE, 7))]) == ["slow::b"]


def test_an_end_without_a_failed_test_is_told_from_a_caught_mutant(tmp_path: Path) -> None:
    """A run whose environment has gone ends as a run whose mutant breaks every import does, so it is tried without."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/conftest.py").write_text("import core\n")
    (tmp_path / "tests/test_core.py").write_text("import core\n\n\ndef test_one():\n    assert core.ONE == 1\n")
    (tmp_path / "core.py").write_text("ONE = 1\n")
    tests = [recorded("tests/test_core.py::test_one", 1.0)]

    def of(source: str) -> run.Outcome:
        return run.mutated_outcome(tmp_path, run.Place(Path("core.py"), Mutant(1, "1", "2", source, None)), tests)

    assert of("ONE = 1\n").caught_by is None
    assert (of("ONE = 2\n").caught_by, of("ONE = 2\n").failed) == ("tests/test_core.py::test_one", True)
    assert (of("ONE = 1 / 0\n").caught_by, of("ONE = 1 / 0\n").failed) == ("exit status 4", False)
    assert run.runs_without_mutant(tmp_path, tests)
    (tmp_path / "core.py").unlink()
    assert not run.runs_without_mutant(tmp_path, tests)
