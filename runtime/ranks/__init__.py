"""Tensor parallelism: the processes that run an engine's ranks, and the executor that stands for all of them."""
