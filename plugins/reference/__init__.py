"""The operators in PyTorch, in fp32: what the kernels are tested against."""
