"""TensorRT plugins: operators, their kernels with references, launches and declarations."""
