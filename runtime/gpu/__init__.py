"""What GPU targets share: device memory, streams, CUDA graphs, KV slots, buckets, captured passes.

| module | content |
|---|---|
| ``gpu_choice`` | the GPU of this machine that an engine was compiled for |
| ``device`` | the CUDA driver: memory, one stream, graphs |
| ``device_kv_pool`` | the KV pool in the GPU's memory |
| ``buckets`` | the shapes that steps are padded to |
| ``gpu_network`` | the interface that a target implements |
| ``pass_memory`` | inputs and results of passes, on the device and on the host |
| ``captured_passes`` | single passes and self-speculation cycles as CUDA graphs |
| ``gpu_executor`` | steps to captured passes |
"""
