"""The network as ONNX graphs, and the weight pool that they name."""
