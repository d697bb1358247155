"""Target ``cuda``: a list of launches and the kernels, which the runtime launches without TensorRT."""
