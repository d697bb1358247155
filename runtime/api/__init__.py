"""What callers use: ``LLM`` and its results."""
