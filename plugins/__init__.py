"""TensorRT plugins: kernels, their references, registration. Empty until the `tensorrt` target is built."""
