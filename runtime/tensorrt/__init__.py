"""Target ``tensorrt``: TensorRT plans with our plugins. The extra ``[tensorrt]`` is imported when an engine is loaded.

| module | content |
|---|---|
| ``plan_loading`` | both plans, deserialised |
| ``tensorrt_network`` | execution contexts, bound to memory |
| ``tensorrt_executor`` | both engines over one weight pool and one KV pool |
"""
