"""Continuous batching: which sequences share a pass, and the block length of mode ``auto``."""
