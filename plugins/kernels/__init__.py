"""The operators' kernels in the Triton language."""
