"""One engine behind Triton Inference Server's Python backend, by the tensors of TensorRT-LLM's own model."""
