"""Engine directory to text: executors, KV pool, decoding, scheduling, and the ways to call them."""

from trimode.runtime.llm import LLM, RequestOutput
from trimode.runtime.outputs import CompletionOutput
from trimode.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
