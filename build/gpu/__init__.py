"""What GPU targets share.

| module | content |
|---|---|
| ``gpu_target`` | options and limits of all GPU targets |
| ``kernel_target`` | targets with TriMode's kernels: ``cuda`` and ``tensorrt`` |
| ``kernel_network`` | their weight pool and kernels |
| ``kernel_emission`` | compilation of the kernels that an engine needs |
| ``plan_builder`` | targets whose networks are plans: ``rtx`` and ``tensorrt`` |
"""
