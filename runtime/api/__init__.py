"""The Python API: ``EngineLLM`` and its results."""
