"""The mutants that scripts/mutation tries."""

from __future__ import annotations

from scripts.mutation.mutants import mutants_of

SOURCE = '''\
@dataclass(frozen=True)
class Pair(Base):
    size: int | None = 3

    def fits(self, rows: int | None) -> bool:
        """At most 3."""
        if not self.open:
            raise ValueError(f"{rows + 1} are too many")
        self.used += 2
        self.pairs = zip(self.pairs, rows, strict=True)
        return rows < self.size and "ä" == self.name
'''


def test_each_mutant_changes_one_operator_or_constant() -> None:
    found = list(mutants_of(SOURCE))
    assert sorted((mutant.line, mutant.before, mutant.after) for mutant in found) == [
        (3, "3", "4"),
        (7, "not self.open", "self.open"),
        (9, "2", "3"),
        (9, "self.used += 2", "self.used -= 2"),
        (11, '"ä" == self.name', "'ä' != self.name"),
        (11, "rows < self.size", "rows <= self.size"),
        (11, 'rows < self.size and "ä" == self.name', "rows < self.size or 'ä' == self.name"),
    ]
    assert {mutant.function for mutant in found if mutant.line > 3} == {5}
    assert [mutant.function for mutant in found if mutant.line == 3] == [None]
    for mutant in found:
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != SOURCE
        changed = [new for old, new in zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True) if old != new]
        assert len(changed) == 1
