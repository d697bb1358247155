"""Target ``cuda``: TriMode's kernels, launched through the CUDA driver.

| module | content |
|---|---|
| ``kernels`` | the kernels of a GPU, loaded when they are first needed |
| ``cuda_network`` | an engine's launches, bound to memory |
| ``cuda_executor`` | both engines over one weight pool and one KV pool |
| ``exchange`` | memory through which ranks add up their partial sums |
| ``cuda_rank_executor`` | the part of an engine that one rank holds |
| ``rank_process`` | what a rank's process runs |
"""
