"""The network in PyTorch: the reference that every executor and decoding mode is checked against."""

from trimode.common.openmp import configure_openmp

configure_openmp()  # before the modules of this package import torch
