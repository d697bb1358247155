"""Checkpoint to w4a16 checkpoint."""
