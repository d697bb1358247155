"""TensorRT plugins: operators, their kernels, the references of these, compilation and TensorRT's declarations."""
