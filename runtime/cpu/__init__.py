"""Target ``cpu``: ONNX Runtime sessions over the engine's mapped weights."""
