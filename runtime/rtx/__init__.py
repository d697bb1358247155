"""Target ``rtx``: TensorRT-RTX plans on a GPU. The extra ``[rtx]`` is imported only when such an engine is loaded."""
