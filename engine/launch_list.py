"""``launches.json``: an engine as a list of kernel launches, in the order of execution.

A launch names an operator of the domain ``trimode`` (:mod:`trimode.plugins.operators`), its tensors and its attributes.
The operator computes the launch's grid, scalars and output shapes from the shapes of its inputs. A dimension is an
integer or a symbol, whose value each pass gives:

| symbol | value |
|---|---|
| ``batch``, ``step`` | sequences of the pass, and tokens of each |
| ``rows`` | logit rows of each sequence |
| ``capacity`` | rows of a sequence in the KV pool |
| ``top_k`` | candidates of a row |
| ``asked`` | asked ids of a row; 0 for none |

An output that aliases an input has the input's memory. All other outputs are temporary, except ``results``. A tensor
without elements has no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from trimode.common.records import read_json_record
from trimode.engine.record import Record
from trimode.model.step import ElementType

LAUNCHES = "launches.json"
FORMAT_VERSION: Literal[2] = 2
# When a pass makes a launch: always; with or without a token mask.
Condition = Literal["always", "masked", "unmasked"]


class LaunchTensor(Record):
    """A tensor with the symbols of its shape."""

    name: str
    type: ElementType
    shape: tuple[int | str, ...]

    def sizes(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """The shape, with the values of its symbols."""
        return tuple(symbols[dim] if isinstance(dim, str) else dim for dim in self.shape)


class Launch(Record):
    """attributes: of the operator; a string is a symbol."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int | str] = Field(default_factory=dict)
    when: Condition = "always"

    def values(self, symbols: Mapping[str, int]) -> dict[str, int]:
        """The attributes, with the values of their symbols."""
        return {name: symbols[value] if isinstance(value, str) else value for name, value in self.attributes.items()}


class LaunchList(Record):
    """inputs: tensors that the runtime binds. weights: ranges of the weight pool, by the pool's names. results: outputs
    that the runtime reads.
    """

    format_version: Literal[2]
    inputs: tuple[LaunchTensor, ...]
    weights: tuple[LaunchTensor, ...]
    launches: tuple[Launch, ...]
    results: tuple[str, ...]

    def write(self, folder: Path) -> None:
        (folder / LAUNCHES).write_text(self.model_dump_json(indent=1, exclude_defaults=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> LaunchList:
        """Raises TriModeError if the file is missing or of another format."""
        return read_json_record(cls, folder / LAUNCHES)
