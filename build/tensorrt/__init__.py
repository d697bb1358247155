"""Target ``tensorrt``: graphs and kernels, which TensorRT compiles to plans on the machine with the GPU."""
