"""TriMode: build and run tri-mode language models. The public names, imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimode.common.version import __version__

if TYPE_CHECKING:
    from trimode.llm import LLM
    from trimode.runtime.api.request_output import RequestOutput
    from trimode.runtime.request.guided_decoding import GuidedDecodingParams
    from trimode.runtime.request.outputs import CompletionOutput
    from trimode.runtime.request.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "GuidedDecodingParams", "RequestOutput", "SamplingParams", "__version__"]

_MODULES = {
    "LLM": "trimode.llm",
    "RequestOutput": "trimode.runtime.api.request_output",
    "CompletionOutput": "trimode.runtime.request.outputs",
    "GuidedDecodingParams": "trimode.runtime.request.guided_decoding",
    "SamplingParams": "trimode.runtime.request.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import trimode`` is fast and needs no optional package."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
