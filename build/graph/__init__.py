"""The network as ONNX graphs, and their weight pool."""
