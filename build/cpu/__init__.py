"""Target ``cpu``: ONNX Runtime over one file of prepacked weights."""
