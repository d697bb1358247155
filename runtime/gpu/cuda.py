"""The CUDA driver calls that a pass needs: memory, one stream, graphs.

All work goes through one stream of the device's primary context, the one that TensorRT uses. Addresses are integers.
Calls that put work on the stream return at once; :meth:`Device.synchronize` waits for it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from trimode.common.errors import TriModeError

Bytes = NDArray[np.uint8]


class Buffer:
    """Memory that is freed with this object: on the device, or page-locked on the host."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size


class Graph:
    """Captured work, ready to be launched again and again."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class Runs(NamedTuple):
    """Where runs of bytes begin, each ``pitch`` bytes after the last."""

    address: int
    pitch: int
    on_device: bool = True


class Device:
    """One GPU, by its number with the driver."""

    def __init__(self, ordinal: int) -> None:
        _checked(driver.cuInit(0))
        self._ordinal = ordinal
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(ordinal))))
        self.activate()
        self._stream = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    @property
    def stream(self) -> int:
        return int(self._stream)

    def activate(self) -> None:
        """Make this the calling thread's device: CUDA asks for that once a thread."""
        _checked(driver.cuCtxSetCurrent(self._context))

    def synchronize(self) -> None:
        """Wait for all work of the stream."""
        _checked(driver.cuStreamSynchronize(self._stream))

    # Memory.

    def allocate(self, size: int, purpose: str) -> Buffer:
        """Device memory, not cleared. Raises TriModeError if there is not enough for ``purpose``."""
        status, address = driver.cuMemAlloc(size)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise TriModeError(
                f"the GPU has no {size / 1e9:.2f} GB left for {purpose}; free some, or build with a smaller --capacity "
                "or --max-batch"
            )
        _checked((status,))
        return self._owned(Buffer(int(address), size), driver.cuMemFree)

    def allocate_page_locked(self, size: int) -> tuple[Buffer, Bytes]:
        """Host memory that the device copies from and to at full speed, and the same as an array."""
        buffer = Buffer(int(_checked(driver.cuMemHostAlloc(size, 0))), size)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(buffer.address))
        return self._owned(buffer, driver.cuMemFreeHost), array

    def _owned(self, buffer: Buffer, free: Callable[[int], Any]) -> Buffer:
        context, make_current = self._context, driver.cuCtxSetCurrent

        def release(address: int) -> None:
            make_current(context)
            free(address)

        weakref.finalize(buffer, release, buffer.address)
        return buffer

    # Work of the stream.

    def upload(self, to: int, host: int, size: int) -> None:
        _checked(driver.cuMemcpyHtoDAsync(to, host, size, self._stream))

    def download(self, host: int, source: int, size: int) -> None:
        _checked(driver.cuMemcpyDtoHAsync(host, source, size, self._stream))

    def copy(self, to: int, source: int, size: int) -> None:
        """Between two places of the device's memory."""
        _checked(driver.cuMemcpyDtoDAsync(to, source, size, self._stream))

    def clear(self, address: int, size: int) -> None:
        _checked(driver.cuMemsetD8Async(address, 0, size, self._stream))

    def copy_rows(self, to: Runs, source: Runs, width: int, count: int) -> None:
        """``count`` runs of ``width`` bytes."""
        plan, kinds = driver.CUDA_MEMCPY2D(), driver.CUmemorytype
        plan.WidthInBytes, plan.Height, plan.srcPitch, plan.dstPitch = width, count, source.pitch, to.pitch
        if source.on_device:
            plan.srcMemoryType, plan.srcDevice = kinds.CU_MEMORYTYPE_DEVICE, source.address
        else:
            plan.srcMemoryType, plan.srcHost = kinds.CU_MEMORYTYPE_HOST, source.address
        if to.on_device:
            plan.dstMemoryType, plan.dstDevice = kinds.CU_MEMORYTYPE_DEVICE, to.address
        else:
            plan.dstMemoryType, plan.dstHost = kinds.CU_MEMORYTYPE_HOST, to.address
        _checked(driver.cuMemcpy2DAsync(plan, self._stream))

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """The work that ``enqueue`` puts on the stream, captured and not run."""
        # Thread-local: what other threads do on the device is none of the capture's business.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _checked(driver.cuStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        finally:
            captured = driver.cuStreamEndCapture(self._stream)
        template = _checked(captured)
        graph = Graph(_checked(driver.cuGraphInstantiate(template, 0)))
        _checked(driver.cuGraphDestroy(template))
        weakref.finalize(graph, driver.cuGraphExecDestroy, graph.handle)
        return graph

    def launch(self, graph: Graph) -> None:
        _checked(driver.cuGraphLaunch(graph.handle, self._stream))

    # Physical memory, which several address ranges can map.

    def granularity(self) -> int:
        """What sizes of physical memory are multiples of."""
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(_checked(driver.cuMemGetAllocationGranularity(self._physical(), least)))

    def create_physical(self, content: Bytes) -> Any:
        """Physical memory that holds ``content``, a multiple of the granularity; :meth:`release_physical` it when it is
        mapped. Raises TriModeError if the device is full.
        """
        status, handle = driver.cuMemCreate(content.nbytes, self._physical(), 0)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise TriModeError(f"the GPU has no {content.nbytes / 1e9:.2f} GB left for the weights; free some")
        _checked((status,))
        address = _checked(driver.cuMemAddressReserve(content.nbytes, 0, 0, 0))
        _checked(driver.cuMemMap(address, content.nbytes, 0, handle, 0))
        access = driver.CUmemAccessDesc()
        access.location = self._physical().location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        _checked(driver.cuMemSetAccess(address, content.nbytes, [access], 1))
        self.upload(int(address), content.ctypes.data, content.nbytes)
        self.synchronize()
        _checked(driver.cuMemUnmap(address, content.nbytes))
        _checked(driver.cuMemAddressFree(address, content.nbytes))
        return handle

    def release_physical(self, handle: Any) -> None:
        """The memory itself lives as long as something maps it."""
        _checked(driver.cuMemRelease(handle))

    def _physical(self) -> Any:
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._ordinal
        return properties


def _checked(result: tuple[Any, ...]) -> Any:
    """What a driver call returns beside its status, which must be success."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
