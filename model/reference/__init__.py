"""The network in PyTorch: the reference that every executor and decoding mode is checked against."""

from trimode.common.openmp import wait_passively

wait_passively()  # before the modules of this package import torch
