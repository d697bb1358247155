"""Launch compiled kernels with the CUDA driver, on torch's current stream and in torch's context."""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.gpu.kernel_launch import KernelLaunch

# A kernel with more dynamic shared memory than this must request it by an attribute.
_UNREQUESTED_SHARED_BYTES = 48 << 10
_REPEATS = 7


class CudaHost:
    """folder: written by ``emit``, such as ``.gpu/sm_90``, with PTX and a cubin for each kernel."""

    device = "cuda"

    def __init__(self, folder: Path) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._folder = folder
        self._index = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))["kernels"]
        self._functions: dict[tuple[str, str], Any] = {}
        torch.zeros(1, device="cuda")  # makes torch's context current

    def function(self, kernel: str, image: str = "cubin") -> Any:
        """image: ``cubin``, or ``ptx`` for the driver to compile."""
        if (kernel, image) not in self._functions:
            content = (self._folder / f"{kernel}.{image}").read_bytes() + b"\0"
            module = self._call("cuModuleLoadData", content)
            function = self._call("cuModuleGetFunction", module, self._index[kernel]["entry"].encode())
            if (shared := self._index[kernel]["shared_bytes"]) > _UNREQUESTED_SHARED_BYTES:
                attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", function, attribute, shared)
            self._functions[kernel, image] = function
        return self._functions[kernel, image]

    def launch(self, kernel: str, launched: KernelLaunch) -> None:
        values, types = [], []
        for argument in launched.arguments.values():
            values.append(argument.data_ptr() if isinstance(argument, Tensor) else argument)
            types.append(ctypes.c_void_p if isinstance(argument, Tensor) else ctypes.c_int32)
        entry = self._index[kernel]
        self._call(
            "cuLaunchKernel",
            self.function(kernel),
            *launched.grid,
            *(entry["threads"], 1, 1),
            entry["shared_bytes"],
            torch.cuda.current_stream().cuda_stream,
            (tuple(values), tuple(types)),
            0,
        )

    def microseconds(self, run: Callable[[int], object], runs: int) -> float | None:
        """Capture the runs in one CUDA graph. Returns the median time of its replays, divided by ``runs``."""
        for i in range(runs):
            run(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(runs):
                run(i)
        times = []
        for _ in range(_REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / runs)
        return statistics.median(times)

    def copy_bandwidth(self) -> float:
        """Bytes/s of a copy of 1 GiB in device memory, read and written."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        took = self.microseconds(lambda _run: target.copy_(source), 4)
        assert took is not None
        return 2 * source.nbytes / took * 1e6

    def read_bandwidth(self) -> float:
        """Bytes/s of a sum over 1 GiB in device memory."""
        source = torch.ones(1 << 28, device=self.device)
        took = self.microseconds(lambda _run: source.sum(), 4)
        assert took is not None
        return source.nbytes / took * 1e6

    def product_peak(self) -> float:
        """FLOP/s of a bf16 product of 8192 x 8192 x 8192."""
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        took = self.microseconds(lambda _run: a @ b, 4)
        assert took is not None
        return 2 * 8192**3 / took * 1e6

    def description(self) -> dict[str, str]:
        version = self._call("cuDriverGetVersion")
        return {
            "card": torch.cuda.get_device_name(),
            "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
            "torch": torch.__version__,
        }

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver; raises RuntimeError with the driver's error."""
        status, *found = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {status.name}")
        return found[0] if found else None
