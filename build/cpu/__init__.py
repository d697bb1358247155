"""Target ``cpu``: graphs for ONNX Runtime over one file of prepacked weights."""
