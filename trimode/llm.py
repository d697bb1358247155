"""``trimode.LLM``: an engine directory, a checkpoint folder or a Hugging Face model ID that answers prompts."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trimode.common.progress import Progress
from trimode.common.progress_bars import progress_bars
from trimode.engine_cache import BuildOptions, engine_of
from trimode.model.quantization import Method
from trimode.runtime.api.llm import EngineLLM


class LLM(EngineLLM):
    """Answers many requests at once, each in its own mode.

    model: an engine directory, a checkpoint folder, or a Hugging Face model ID such as
    ``nvidia/Nemotron-Labs-Diffusion-8B``. A checkpoint is quantised to w4a16 and built on first use, then kept in a
    cache (``trimode cache``); this needs the extra ``build``. target, method, group: how it is built, see
    :class:`trimode.engine_cache.BuildOptions`; a checkpoint that is int4 already is not quantised again. progress:
    called with stage, steps done, and steps in all; bars on stderr if None and stderr is a terminal.

    The other options are those of :class:`trimode.runtime.api.llm.EngineLLM`. Raises TriModeError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        target: str | None = None,
        method: Method | None = None,
        group: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        with ExitStack() as stack:
            report = stack.enter_context(progress_bars()) if progress is None else progress
            engine = engine_of(model, BuildOptions(target, method, group), report)
            super().__init__(engine, progress=report, **options)


def _signature() -> inspect.Signature:
    """The options of both classes, for ``help`` and notebooks."""
    own = inspect.signature(LLM.__init__).parameters
    inherited = inspect.signature(EngineLLM.__init__).parameters
    both = dict(inherited) | dict(own)
    named = {
        name: parameter
        for name, parameter in both.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    return inspect.Signature(sorted(named.values(), key=lambda parameter: parameter.kind))


LLM.__signature__ = _signature()  # type: ignore[attr-defined]
