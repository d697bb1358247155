"""Execute a kernel on the CPU in Triton's interpreter, with every memory access checked and counted.

Triton itself interprets either all kernels of a process or none, by a variable that it reads on import. Here single
kernels are interpreted, so the same process can compile others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from tests.support.triton_types import types_made_once
from trimode.common.errors import TriModeError

_POINTER = np.dtype(np.uint64)
_cached_numpy_type = cache(interpreter._get_np_dtype)


@dataclass
class Traffic:
    """Accesses to one tensor. loaded, stored: bytes, every access counted. touched: distinct bytes."""

    bytes: int
    loaded: int = 0
    stored: int = 0
    touched: int = 0


def interpret(
    kernel: JITFunction[Any],
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    reachable: Sequence[Tensor] = (),
) -> dict[str, Traffic]:
    """Launch ``kernel`` over ``grid`` and count its traffic by the names of its tensors.

    arguments: contiguous tensors and integers, by parameter. reachable: further memory that the kernel may read and
    write, whose addresses it finds in its tensors. Raises TriModeError if the kernel loads or stores outside its
    tensors.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    tensors |= {f"reachable {index}": tensor for index, tensor in enumerate(reachable)}
    memory = _Memory(tensors)
    with types_made_once(), _interpreter_of(memory):
        try:
            interpreter.InterpretedFunction(kernel.fn)[grid](**arguments, **constants)
        except interpreter.InterpreterError as error:
            if memory.fault:
                raise TriModeError(f"{kernel.fn.__name__} {memory.fault}") from error
            raise
    return memory.traffic()


class _Memory:
    """The tensors of a kernel. Two names of the same memory (an in-place output) are counted under the first one."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names: list[str] = []
        self._traffic: list[Traffic] = []
        self._touched: list[NDArray[np.bool_]] = []
        self._bases: list[int] = []
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            if tensor.data_ptr() in self._bases:
                continue
            self._names.append(name)
            self._traffic.append(Traffic(tensor.nbytes))
            self._touched.append(np.zeros(tensor.nbytes, bool))
            self._bases.append(tensor.data_ptr())
        self.fault: str | None = None

    def access(self, pointers: Any, mask: NDArray[np.bool_], store: bool) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        index = int(np.searchsorted(self._bases, addresses.min(), side="right")) - 1
        offsets = addresses - self._bases[index] if index >= 0 else addresses
        if index < 0 or offsets.max() + size > self._traffic[index].bytes:
            near = self._names[max(index, 0)]
            self.fault = f"{'stores' if store else 'loads'} outside its tensors, near {near}"
            raise IndexError(self.fault)
        traffic = self._traffic[index]
        if store:
            traffic.stored += addresses.size * size
        else:
            traffic.loaded += addresses.size * size
        # Accesses are to whole elements, so the first byte of each is marked.
        self._touched[index][offsets] = True
        traffic.touched = size

    def traffic(self) -> dict[str, Traffic]:
        for traffic, touched in zip(self._traffic, self._touched, strict=True):
            traffic.touched *= int(touched.sum())
        return dict(zip(self._names, self._traffic, strict=True))


@contextmanager
def _interpreter_of(memory: _Memory) -> Iterator[None]:
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    subtract = builder.create_fsub
    call = JITFunction.__call__

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        memory.access(pointers, mask.data, store=False)
        return load(pointers, mask, *rest)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.access(pointers, mask.data, store=True)
        return store(pointers, value, mask, *rest)

    def exact_dot(a: Any, b: Any, total: Any, *_: Any) -> Any:
        """In fp64 and rounded once, so that no other row of a product changes a row's sum, as on tensor cores. (The
        interpreter would also multiply the integers that it stores bf16 as.)
        """
        found = _widened(a).data.astype(np.float64) @ _widened(b).data.astype(np.float64)
        return interpreter.TensorHandle(found.astype(total.data.dtype) + total.data, total.dtype.scalar)

    def exact_subtract(a: Any, b: Any) -> Any:
        difference = subtract(_widened(a), _widened(b))
        return builder.create_fp_trunc(difference, a.dtype) if a.dtype.scalar == tl.bfloat16 else difference

    semantic, numpy_type = interpreter.interpreter_semantic, interpreter._get_np_dtype
    # It executes ten operations for each one that it checks, and asserts nothing without the builder's option `debug`.
    semantic.binary_op_sanitize_overflow_impl = lambda *_: None
    interpreter._get_np_dtype = _numpy_type
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_dot, builder.create_fsub = exact_dot, exact_subtract
    JITFunction.__call__ = lambda self, *args, **kwargs: self.fn(*args, **kwargs)
    # Functions of Triton's own library import the language as `core`; only that name leads them to the interpreter.
    language = interpreter._patch_lang(tl.zeros.fn)
    try:
        yield
    finally:
        language.restore()
        del semantic.binary_op_sanitize_overflow_impl
        interpreter._get_np_dtype = numpy_type
        del builder.create_masked_load, builder.create_masked_store, builder.create_dot, builder.create_fsub
        JITFunction.__call__ = call


def _numpy_type(dtype: Any) -> Any:
    """As Triton's own, which makes its table in every call."""
    element = dtype.scalar
    return _POINTER if element.is_ptr() else _cached_numpy_type(element)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = torch.from_numpy(operand.data.astype(np.int32) << 16)
    return interpreter.TensorHandle(bits.view(torch.float32).numpy(), tl.float32)
