"""The network in PyTorch: the oracle that every executor and decoding mode is checked against."""
