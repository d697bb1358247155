"""A pytest plugin for ``pytest tests/plugins --gpu`` without a GPU: a double of the driver interprets the kernels.

``$TESTED_KERNELS`` is the list of kernels that ``--list-kernels`` wrote. The kernels, which only name themselves, are
written into the folder ``$KERNEL_FOLDER``. Without ``$KERNELS_COMPUTE``, or with 1 there, they are interpreted. Types
other than fp32 are not supported.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.gpu_kernels import compile_kernels
from tests.support.interpreting_gpu import interpreting_gpu
from tests.support.uncompiled_kernels import UncompiledKernels

with pytest.MonkeyPatch.context() as _patch:
    _compiler = UncompiledKernels(_patch)
    compile_kernels(Path(os.environ["TESTED_KERNELS"]), Path(os.environ["KERNEL_FOLDER"]), 121)
_gpu = interpreting_gpu(_compiler.kernels, torch.float32, computes=os.environ.get("KERNELS_COMPUTE", "1") == "1")
_gpu.__enter__()  # until the process ends
