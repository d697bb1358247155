"""Continuous batching: which sequences share a pass, what passes cost, and the block length of mode ``auto``."""
