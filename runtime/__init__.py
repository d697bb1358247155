"""Engine directory to text: executors, KV pool, decoding, scheduling, and the ways to call them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimode.runtime.llm import LLM, RequestOutput
    from trimode.runtime.outputs import CompletionOutput
    from trimode.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

_MODULES = {"LLM": "llm", "RequestOutput": "llm", "CompletionOutput": "outputs", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: :mod:`trimode.runtime.command` is to begin at once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
