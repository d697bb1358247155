"""A test double of the CUDA driver. It needs no GPU and computes real numbers.

It replaces ``trimode.runtime.gpu.device.driver``. Host memory serves as device memory. Physical memory is a memory file
that is mapped at several addresses, like a GPU's. The work of a stream runs only when the stream is synchronised, so a
result that is read too early is missing. A captured graph is a list of operations with the addresses at the time of
capture, like a CUDA graph. Kernels are interpreted on the addresses of their launch. Each process is a GPU of its own,
whose memory others can open.

The double raises an error for faults that a GPU would not report, such as memory that is not allocated or too short. It
does not show that the real calls accept the arguments (only their names and parameters are compared with the real
bindings), and it gives no timing.
"""

# ruff: noqa: ARG002, N802, N803 - CUDA's names and arguments

from __future__ import annotations

import ctypes
import inspect
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver as real_driver

from tests.support.triton_interpreter import interpret
from trimode.build.gpu.kernel_emission import NeededKernel
from trimode.plugins.compilation import kernel_of
from trimode.plugins.operators import AllReduce, Operator

SUCCESS = real_driver.CUresult.CUDA_SUCCESS
FULL = real_driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
GRANULARITY = 1 << 16
STREAM = 77
SHARED_BLOCK = 2 << 20  # memory that a process can share with others is a multiple of it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED = 0x10


class FaultError(Exception):
    """A fault that would be undefined behaviour on a GPU."""


def map_memory(address: int | None, size: int, file: int | None) -> int:
    flags = mmap.MAP_SHARED if file is not None else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if address is not None:
        flags |= _MAP_FIXED
    access = mmap.PROT_READ | mmap.PROT_WRITE if file is not None else 0
    place = _libc.mmap(address, size, access, flags, -1 if file is None else file, 0)
    assert place not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(place)


class LibcudaDouble:
    """Stands in for the driver's own library: one GPU of compute capability 12.1, or a driver that does not start."""

    def __init__(self, status: int = 0, capability: tuple[int, int] = (12, 1)) -> None:
        self.status = status
        self.capability = capability

    def cuInit(self, _flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, _size: int, _device: Any) -> int:
        name.value = b"GB10"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _device: Any) -> int:
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 0


@dataclass
class KernelDouble:
    """A loaded kernel. shared_bytes: of dynamic shared memory that a launch may use."""

    kernel: NeededKernel
    shared_bytes: int = 48 << 10

    @property
    def constants(self) -> dict[str, int]:
        return {**self.kernel.constants, **self.kernel.tactic.constants}


_TORCH_TYPES = {
    "fp32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "bool": torch.bool,
}


class DriverDouble:
    """The driver calls of the executor. Enumerations and records are the real module's.

    kernels: by their cubin or PTX; they are interpreted. real: their type. computes: whether kernels write anything;
    otherwise only their launches are checked.
    """

    def __init__(
        self,
        memory: int = 1 << 31,
        kernels: Mapping[bytes, NeededKernel] | None = None,
        real: torch.dtype = torch.float32,
        computes: bool = True,
    ) -> None:
        self.free = memory
        self.computes = computes
        self.real = real
        self.capability = 121
        self.most_shared_bytes = 101376
        self.kernels = kernels or {}
        self.modules: list[KernelDouble] = []
        self.allocations: dict[int, np.ndarray] = {}  # device memory, by address
        self.shared: dict[int, int] = {}  # files of memory that other processes may open, by address
        self.opened: set[int] = set()  # addresses of memory of other processes
        self.page_locked: dict[int, np.ndarray] = {}
        self.files: dict[int, tuple[int, int]] = {}  # physical memory: (file, size) by handle
        self.mapped: dict[int, int] = {}  # sizes of mapped ranges, by address
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float | None] = {}  # milliseconds at which each was reached
        self.clock = 0.0  # of the GPU, in milliseconds; kernels alone take time
        self.milliseconds: Callable[[NeededKernel], float] = lambda _kernel: 1e-3
        self.current = False
        # What the tests count.
        self.synchronisations = self.launches = self.captures = 0
        self.crossed = 0  # bytes copied to the host
        self.kernel_launches: list[str] = []  # launched or captured operators

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu"):
            raise AttributeError(f"{name} is not among the calls that the double knows")
        return getattr(real_driver, name)

    # Device and stream.

    def cuInit(self, Flags):
        return (SUCCESS,)

    def cuDeviceGet(self, ordinal):
        return SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, dev):
        return SUCCESS, 1

    def cuCtxSetCurrent(self, ctx):
        self.current = ctx == 1
        return (SUCCESS,)

    def cuStreamCreate(self, Flags):
        return SUCCESS, STREAM

    def cuStreamSynchronize(self, hStream):
        self._known(hStream)
        if self.capturing is not None:
            raise FaultError("synchronised within a capture")
        self.synchronisations += 1
        waiting, self.queue = self.queue, []
        for work in waiting:
            work()
        return (SUCCESS,)

    def cuDeviceGetName(self, length, dev):
        return SUCCESS, b"GB10".ljust(length, b"\0")

    def cuDriverGetVersion(self):
        return SUCCESS, 13010

    # Events.

    def cuEventCreate(self, Flags):
        self.events[len(self.events) + 1] = None
        return SUCCESS, len(self.events)

    def cuEventRecord(self, hEvent, hStream):
        self._submit(hStream, lambda: self.events.update({hEvent: self.clock}))
        return (SUCCESS,)

    def cuEventElapsedTime(self, hStart, hEnd):
        start, end = self.events[hStart], self.events[hEnd]
        if start is None or end is None:
            return real_driver.CUresult.CUDA_ERROR_NOT_READY, 0.0
        return SUCCESS, end - start

    def cuEventDestroy(self, hEvent):
        self.events[hEvent] = None
        return (SUCCESS,)

    # Memory.

    def cuMemAlloc(self, bytesize):
        if bytesize > self.free:
            return FULL, 0
        self.free -= bytesize
        if bytesize % SHARED_BLOCK:
            memory = np.empty(bytesize, np.uint8)
        else:
            file = os.memfd_create("shared")
            os.ftruncate(file, bytesize)
            memory = np.frombuffer(mmap.mmap(file, bytesize), np.uint8)
            self.shared[memory.ctypes.data] = file
        memory[:] = 0xFF  # fresh device memory is not zero
        self.allocations[memory.ctypes.data] = memory
        return SUCCESS, memory.ctypes.data

    def cuMemFree(self, dptr):
        memory = self.allocations.pop(dptr)
        memory[:] = 0xFF
        if dptr in self.shared:
            os.close(self.shared.pop(dptr))
        self.free += memory.nbytes
        return (SUCCESS,)

    def cuIpcGetMemHandle(self, dptr):
        """Only whole blocks, since the driver would share the memory around a smaller one as well."""
        if dptr not in self.shared:
            raise FaultError(f"{dptr:#x} is no allocation of whole blocks")
        handle = real_driver.CUipcMemHandle()
        name = f"{os.getpid()} {self.shared[dptr]} {self.allocations[dptr].nbytes}".encode().ljust(64)
        ctypes.memmove(handle.getPtr(), name, len(name))
        return SUCCESS, handle

    def cuIpcOpenMemHandle(self, handle, Flags):
        assert Flags == real_driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        process, file, size = map(int, ctypes.string_at(handle.getPtr(), 64).split())
        if process == os.getpid():
            raise FaultError("a process opens its own memory")
        opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        memory = np.frombuffer(mmap.mmap(opened, size), np.uint8)
        os.close(opened)
        self.allocations[memory.ctypes.data] = memory
        self.opened.add(memory.ctypes.data)
        return SUCCESS, memory.ctypes.data

    def cuIpcCloseMemHandle(self, dptr):
        self.opened.remove(dptr)
        del self.allocations[dptr]
        return (SUCCESS,)

    def cuMemHostAlloc(self, bytesize, Flags):
        memory = np.full(bytesize, 0xFF, np.uint8)
        self.page_locked[memory.ctypes.data] = memory
        return SUCCESS, memory.ctypes.data

    def cuMemFreeHost(self, p):
        del self.page_locked[p]
        return (SUCCESS,)

    def cuMemsetD8Async(self, dstDevice, uc, N, hStream):
        self.on_device(dstDevice, N)
        self._submit(hStream, lambda: ctypes.memset(dstDevice, uc, N))
        return (SUCCESS,)

    def cuMemcpyHtoDAsync(self, dstDevice, srcHost, ByteCount, hStream):
        self.on_device(dstDevice, ByteCount)
        self._submit(hStream, lambda: ctypes.memmove(dstDevice, srcHost, ByteCount))
        return (SUCCESS,)

    def cuMemcpyDtoHAsync(self, dstHost, srcDevice, ByteCount, hStream):
        self.on_device(srcDevice, ByteCount)

        def copy() -> None:
            self.crossed += ByteCount
            ctypes.memmove(dstHost, srcDevice, ByteCount)

        self._submit(hStream, copy)
        return (SUCCESS,)

    def cuMemcpyDtoDAsync(self, dstDevice, srcDevice, ByteCount, hStream):
        self.on_device(dstDevice, ByteCount)
        self.on_device(srcDevice, ByteCount)
        self._submit(hStream, lambda: ctypes.memmove(dstDevice, srcDevice, ByteCount))
        return (SUCCESS,)

    def cuMemcpy2DAsync(self, pCopy, hStream):
        ends = []
        for side in ("src", "dst"):
            pitch = getattr(pCopy, f"{side}Pitch")
            if pCopy.WidthInBytes > pitch:
                raise FaultError("rows overlap")
            if getattr(pCopy, f"{side}MemoryType") == real_driver.CUmemorytype.CU_MEMORYTYPE_DEVICE:
                address = int(getattr(pCopy, f"{side}Device"))
                self.on_device(address, pitch * (pCopy.Height - 1) + pCopy.WidthInBytes)
            else:
                address = int(getattr(pCopy, f"{side}Host"))
            ends.append((address, pitch))
        (source, source_pitch), (to, to_pitch) = ends
        width, height = pCopy.WidthInBytes, pCopy.Height

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

        self._submit(hStream, copy)
        return (SUCCESS,)

    # Graphs.

    def cuStreamBeginCapture(self, hStream, mode):
        self._known(hStream)
        self.capturing = []
        return (SUCCESS,)

    def cuStreamEndCapture(self, hStream):
        self._known(hStream)
        captured, self.capturing = self.capturing, None
        self.captures += 1
        self.graphs[len(self.graphs) + 1] = captured or []
        return SUCCESS, len(self.graphs)

    def cuGraphInstantiate(self, hGraph, flags):
        return SUCCESS, hGraph

    def cuGraphDestroy(self, hGraph):
        return (SUCCESS,)

    def cuGraphExecDestroy(self, hGraphExec):
        return (SUCCESS,)

    def cuGraphLaunch(self, hGraphExec, hStream):
        self.launches += 1
        for work in self.graphs[hGraphExec]:
            self._submit(hStream, work)
        return (SUCCESS,)

    # Kernels.

    def cuDeviceGetAttribute(self, attrib, dev):
        attributes = real_driver.CUdevice_attribute
        return SUCCESS, {
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability // 10,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability % 10,
            attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: self.most_shared_bytes,
        }[attrib]

    def cuModuleLoadData(self, image):
        if not image.startswith(b"\x7fELF"):
            if not image.endswith(b"\0"):
                raise FaultError("PTX must end with a zero byte")
            image = image[:-1]
        self.modules.append(KernelDouble(self.kernels[image]))
        return SUCCESS, len(self.modules)

    def cuModuleGetFunction(self, hmod, name):
        function = self.modules[hmod - 1]
        operator = function.kernel.operator
        if kernel_of(operator).fn.__name__ != name.decode():
            raise FaultError(f"{operator.name} has no function {name.decode()}")
        return SUCCESS, function

    def cuFuncSetAttribute(self, hfunc, attrib, value):
        assert attrib == real_driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        hfunc.shared_bytes = value
        return (SUCCESS,)

    def cuLaunchKernelEx(self, config, f, kernelParams, extra):
        if config.sharedMemBytes > f.shared_bytes:
            raise FaultError(f"{config.sharedMemBytes} bytes of shared memory were not requested")
        operator, tactic = f.kernel.operator, f.kernel.tactic
        if (config.blockDimX, config.blockDimY, config.blockDimZ) != (32 * tactic.warps, 1, 1):
            raise FaultError(f"{operator.name} has blocks of {32 * tactic.warps} threads")
        kernel, grid = kernel_of(operator), (config.gridDimX, config.gridDimY, config.gridDimZ)
        # Like the driver, read the arguments now.
        arguments = self._arguments(operator, kernelParams)
        absent = {name: None for name in kernel.arg_names if name not in arguments and name not in f.constants}
        self.kernel_launches.append(operator.name)

        def run() -> None:
            if self.computes:
                interpret(kernel, grid, {**arguments, **absent}, f.constants, self._exchange(operator))
            self.clock += self.milliseconds(f.kernel)

        self._submit(int(config.hStream), run)
        return (SUCCESS,)

    def _exchange(self, operator: Operator) -> list[torch.Tensor]:
        """The memory of all ranks, which only their sums read."""
        addresses = {*self.shared, *self.opened} if isinstance(operator, AllReduce) else set()
        return [self._tensor(address, torch.int8) for address in addresses]

    def _arguments(self, operator: Operator, parameters: int) -> dict[str, Any]:
        """Integers, and tensors from their address to the end of their allocation."""
        names = operator.parameters
        pointers = np.frombuffer((ctypes.c_uint64 * len(names)).from_address(parameters), np.uint64)
        types = {operand.name: operand.type for operand in (*operator.inputs, *operator.outputs)}
        arguments: dict[str, Any] = {}
        for name, pointer in zip(names, pointers, strict=True):
            if name in types:
                address = ctypes.c_uint64.from_address(int(pointer)).value
                arguments[name] = self._tensor(address, _TORCH_TYPES.get(types[name], self.real))
            else:
                arguments[name] = ctypes.c_int32.from_address(int(pointer)).value
        return arguments

    def _tensor(self, address: int, dtype: torch.dtype) -> torch.Tensor:
        if address == 0:
            return torch.empty(0, dtype=dtype)
        if address % 16:
            raise FaultError(f"{address:#x} is not aligned to 16 bytes")
        for begin, memory in self.allocations.items():
            if begin <= address < begin + memory.nbytes:
                size = (begin + memory.nbytes - address) // dtype.itemsize * dtype.itemsize
                return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype)
        raise FaultError(f"{address:#x} is no memory of the device")

    # Physical memory.

    def cuMemGetAllocationGranularity(self, prop, option):
        return SUCCESS, GRANULARITY

    def cuMemCreate(self, size, prop, flags):
        if size % GRANULARITY:
            raise FaultError(f"{size} bytes are no multiple of the granularity")
        if size > self.free:
            return FULL, 0
        self.free -= size
        file = os.memfd_create("physical")
        os.ftruncate(file, size)
        self.files[file] = (file, size)
        return SUCCESS, file

    def cuMemRelease(self, handle):
        # The file lives on in its mappings.
        self.files.pop(handle)
        os.close(handle)
        return (SUCCESS,)

    def cuMemAddressReserve(self, size, alignment, addr, flags):
        return SUCCESS, map_memory(None, size, None)

    def cuMemMap(self, ptr, size, offset, handle, flags):
        assert offset == 0
        file, available = self.files[handle]
        if size > available:
            raise FaultError("mapped past the end of an allocation")
        map_memory(ptr, size, file)
        return (SUCCESS,)

    def cuMemSetAccess(self, ptr, size, desc, count):
        assert desc[0].flags == real_driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.mapped[ptr] = size
        return (SUCCESS,)

    def cuMemUnmap(self, ptr, size):
        assert self.mapped.pop(ptr) == size
        map_memory(ptr, size, None)
        return (SUCCESS,)

    def cuMemAddressFree(self, ptr, size):
        _libc.munmap(ptr, size)
        return (SUCCESS,)

    # For the double itself.

    def on_device(self, address: int, size: int) -> None:
        """Require that the range is device memory of a single allocation."""
        ranges = [(begin, memory.nbytes) for begin, memory in self.allocations.items()]
        if not any(
            begin <= address and address + size <= begin + length for begin, length in [*ranges, *self.mapped.items()]
        ):
            raise FaultError(f"{size} bytes at {address:#x} are no memory of the device")

    def submit(self, work: Callable[[], None]) -> None:
        if not self.current:
            raise FaultError("no context is current")
        (self.queue if self.capturing is None else self.capturing).append(work)

    def _submit(self, stream: Any, work: Callable[[], Any]) -> None:
        self._known(stream)
        self.submit(work)

    def _known(self, stream: Any) -> None:
        if stream != STREAM:
            raise FaultError(f"stream {stream} is not the one that was made")


def unknown_driver_calls() -> list[str]:
    """Calls of the double that do not exist in the real bindings, or that have other parameters there."""
    found = []
    for name, call in vars(DriverDouble).items():
        if name.startswith("cu"):
            real = getattr(real_driver, name, None)
            if real is None or list(inspect.signature(real).parameters) != list(inspect.signature(call).parameters)[1:]:
                found.append(name)
    return found
