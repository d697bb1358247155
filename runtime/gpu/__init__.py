"""What GPU targets share: device memory, streams, CUDA graphs, KV slots, shapes of passes."""
