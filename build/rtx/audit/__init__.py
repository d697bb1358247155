"""Kernels, bytes and least time of compiled plans, counted without a GPU."""
