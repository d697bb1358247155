"""TensorRT plugins: operators, kernels, references, compilation, and declarations for TensorRT."""
