"""Target ``rtx``: plans compiled by TensorRT-RTX for named GPUs."""
