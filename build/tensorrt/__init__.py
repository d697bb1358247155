"""Target ``tensorrt``: graphs and kernels that TensorRT compiles on the machine with the GPU."""
