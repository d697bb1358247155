"""A GPU through the CUDA driver: memory, one stream, and graphs.

All work uses one stream of the device's primary context, which is also TensorRT's context. Addresses are integers.
Methods that put work on the stream return immediately; :meth:`Device.synchronize` waits for the work.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from trimode.common.errors import TriModeError

Bytes = NDArray[np.uint8]
# How a cubin begins. PTX is text, which must end with a zero byte.
_ELF = b"\x7fELF"
# Bytes of a handle for memory of several processes, CU_IPC_HANDLE_SIZE.
_SHARED_NAME = 64
# A kernel with more dynamic shared memory than this must request it by an attribute.
_UNREQUESTED_SHARED_BYTES = 48 << 10


class Buffer:
    """Memory on the device, or page-locked memory on the host, that is freed with this object."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size


class Graph:
    """Captured work that can be launched repeatedly."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class Kernel(NamedTuple):
    """A loaded kernel. threads: of a block. shared_bytes: of dynamic shared memory."""

    function: Any
    threads: int
    shared_bytes: int


class BoundLaunch:
    """One launch of a kernel with its arguments. grid: blocks. The kernel's parameters are the addresses ``inputs``,
    32-bit ``scalars``, and the addresses ``outputs``, in this order.
    """

    __slots__ = ("_pointers", "_scalars", "_values", "grid", "kernel")

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        inputs: Sequence[int],
        scalars: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        # Few objects: an engine has thousands of launches, and the garbage collector visits all objects. The kernel
        # reads the first four of a scalar's eight bytes.
        values = (*inputs, *(scalar & 0xFFFFFFFF for scalar in scalars), *outputs)
        self._values = (ctypes.c_uint64 * len(values))(*values)
        begin, size = ctypes.addressof(self._values), ctypes.sizeof(ctypes.c_uint64)
        self._pointers = (ctypes.c_uint64 * len(values))(*range(begin, begin + size * len(values), size))
        self._scalars = range(len(inputs), len(inputs) + len(scalars))

    def addresses_in(self, memory: Buffer) -> list[int]:
        """The arguments that are addresses in ``memory``, by their numbers."""
        end = memory.address + memory.size
        return [
            number
            for number, value in enumerate(self._values)
            if memory.address <= value < end and number not in self._scalars
        ]

    def move(self, arguments: Sequence[int], distance: int) -> None:
        """Add bytes to addresses among the arguments. Work that was enqueued or captured before is not changed."""
        for number in arguments:
            self._values[number] += distance

    @property
    def parameters(self) -> int:
        """The address of an array of pointers to the arguments, as ``cuLaunchKernel`` takes it."""
        return ctypes.addressof(self._pointers)


class Runs(NamedTuple):
    """Runs of bytes, the first at ``address``, each ``pitch`` bytes after the previous one."""

    address: int
    pitch: int
    on_device: bool = True


class Device:
    """One GPU, by the driver's number of it."""

    def __init__(self, ordinal: int) -> None:
        _checked(driver.cuInit(0))
        self._ordinal = ordinal
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(ordinal))))
        self.activate()
        self._stream = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    @property
    def stream(self) -> int:
        return int(self._stream)

    @property
    def name(self) -> str:
        return bytes(_checked(driver.cuDeviceGetName(256, self._ordinal))).rstrip(b"\0").decode()

    @property
    def driver_version(self) -> int:
        """13010 for CUDA 13.1."""
        return int(_checked(driver.cuDriverGetVersion()))

    def activate(self) -> None:
        """Make this the current device of the calling thread, as CUDA requires of every thread."""
        _checked(driver.cuCtxSetCurrent(self._context))

    def synchronize(self) -> None:
        """Wait for all work of the stream."""
        _checked(driver.cuStreamSynchronize(self._stream))

    # Kernels.

    @property
    def compute_capability(self) -> int:
        """121 for 12.1."""
        attributes = driver.CUdevice_attribute
        return 10 * self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) + self._attribute(
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        )

    @property
    def most_shared_bytes(self) -> int:
        """The most dynamic shared memory of a block."""
        return self._attribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)

    def _attribute(self, attribute: Any) -> int:
        return int(_checked(driver.cuDeviceGetAttribute(attribute, self._ordinal)))

    def load_kernel(self, image: bytes, entry: str, threads: int, shared_bytes: int) -> Kernel:
        """image: PTX, which the driver compiles, or a cubin. entry: the function's name in it."""
        module = _checked(driver.cuModuleLoadData(image if image.startswith(_ELF) else image + b"\0"))
        function = _checked(driver.cuModuleGetFunction(module, entry.encode()))
        if shared_bytes > _UNREQUESTED_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
        return Kernel(function, threads, shared_bytes)

    def launch_kernel(self, launch: BoundLaunch) -> None:
        """Put a launch on the stream. ``launch`` must exist until the work is done or captured."""
        kernel, config = launch.kernel, driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes, config.hStream = kernel.shared_bytes, self._stream
        _checked(driver.cuLaunchKernelEx(config, kernel.function, launch.parameters, 0))

    # Memory.

    def allocate(self, size: int, purpose: str) -> Buffer:
        """Uninitialised device memory. Raises TriModeError that names ``purpose`` if there is not enough."""
        status, address = driver.cuMemAlloc(size)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise TriModeError(
                f"the GPU has no {size / 1e9:.2f} GB left for {purpose}; free some, or build with a smaller --capacity "
                "or --max-batch"
            )
        _checked((status,))
        return self._owned(Buffer(int(address), size), driver.cuMemFree)

    def store(self, array: NDArray[Any], purpose: str) -> Buffer:
        """Device memory that holds a copy of ``array``."""
        buffer = self.allocate(array.nbytes, purpose)
        self.upload(buffer.address, array.ctypes.data, array.nbytes)
        self.synchronize()
        return buffer

    def share(self, buffer: Buffer) -> bytes:
        """A name of device memory, by which another process can open it."""
        handle = _checked(driver.cuIpcGetMemHandle(buffer.address))
        return bytes(_bytes_of(handle))

    def open_shared(self, name: bytes) -> Buffer:
        """The memory that another process has shared, in this process. It may be on another GPU. Raises TriModeError if
        this GPU cannot read it.
        """
        handle = driver.CUipcMemHandle()
        _bytes_of(handle)[:] = name
        flag = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        status, address = driver.cuIpcOpenMemHandle(handle, flag)
        if status in (
            driver.CUresult.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
            driver.CUresult.CUDA_ERROR_NOT_SUPPORTED,
            driver.CUresult.CUDA_ERROR_INVALID_CONTEXT,
        ):
            raise TriModeError(
                f"GPU {self._ordinal} cannot read the memory of another rank's GPU ({status.name}); ranks need GPUs "
                "with peer access, by NVLink or PCIe"
            )
        _checked((status,))
        return self._owned(Buffer(int(address), 0), driver.cuIpcCloseMemHandle)

    def allocate_page_locked(self, size: int) -> tuple[Buffer, Bytes]:
        """Host memory that copies to and from the device use directly, and the same memory as an array."""
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
        """Copy within the device's memory."""
        _checked(driver.cuMemcpyDtoDAsync(to, source, size, self._stream))

    def fill(self, address: int, byte: int, size: int) -> None:
        _checked(driver.cuMemsetD8Async(address, byte, size, self._stream))

    def copy_rows(self, to: Runs, source: Runs, width: int, count: int) -> None:
        """Copy ``count`` runs of ``width`` bytes."""
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
        """Capture the work that ``enqueue`` puts on the stream, without running it."""
        # Thread-local, so that calls of other threads do not invalidate the capture.
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

    def seconds(self, enqueue: Callable[[], None]) -> float:
        """Put work on the stream and wait for it. Returns the time that the GPU took for it."""
        start, end = (_checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DEFAULT)) for _ in range(2))
        try:
            _checked(driver.cuEventRecord(start, self._stream))
            enqueue()
            _checked(driver.cuEventRecord(end, self._stream))
            self.synchronize()
            return float(_checked(driver.cuEventElapsedTime(start, end))) / 1e3
        finally:
            for event in (start, end):
                driver.cuEventDestroy(event)

    # Physical memory, which can be mapped into several address ranges.

    def granularity(self) -> int:
        """Sizes of physical memory are multiples of this number of bytes."""
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(_checked(driver.cuMemGetAllocationGranularity(self._physical(), least)))

    def create_physical(self, content: Bytes) -> Any:
        """Physical memory that holds ``content``, whose size is a multiple of the granularity. Call
        :meth:`release_physical` once it is mapped. Raises TriModeError if the device is full.
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
        """Drop the handle; the memory stays allocated while it is mapped."""
        _checked(driver.cuMemRelease(handle))

    def _physical(self) -> Any:
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._ordinal
        return properties


def _bytes_of(handle: Any) -> Any:
    """The bytes of a handle for memory of several processes, as a ctypes array. It does not keep the handle alive."""
    return (ctypes.c_uint8 * _SHARED_NAME).from_address(handle.getPtr())


def _checked(result: tuple[Any, ...]) -> Any:
    """The value that a driver call returned with its status. Raises RuntimeError unless it succeeded."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
