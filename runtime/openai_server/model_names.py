"""The names under which clients know the model: each served name, and an alias ``name:mode`` for every mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

from trimode.runtime.openai_server.http_errors import NO_MODEL, ApiError
from trimode.runtime.request.sampling_params import Mode


class ModelName(NamedTuple):
    """``root``: the served name of an alias. ``mode``: the mode that an alias selects."""

    name: str
    root: str
    mode: Mode | None


class ModelNames:
    """``names``: at least one; the first is the default."""

    def __init__(self, names: Sequence[str]) -> None:
        aliases = [ModelName(f"{name}:{mode}", name, mode) for name in names for mode in get_args(Mode)]
        served = [ModelName(name, name, None) for name in names]
        self._found = {found.name: found for found in [*aliases, *served]}
        self._names = list(dict.fromkeys(names))

    @property
    def default(self) -> ModelName:
        return self._found[self._names[0]]

    def __iter__(self) -> Iterator[ModelName]:
        """The served names, then their aliases."""
        yield from (self._found[name] for name in self._names)
        yield from (found for found in self._found.values() if found.mode is not None)

    def resolve(self, name: str | None) -> ModelName:
        """None and "" stand for the default. Raises ApiError (404) for a name that is not served."""
        if not name:
            return self.default
        if name not in self._found:
            served = ", ".join(self._names)
            raise ApiError(NO_MODEL, f"the model {name[:100]!r} does not exist; this server has {served}", "model")
        return self._found[name]
