"""The builder's list of kernels is parsed completely, or refused."""

from __future__ import annotations

import pytest

from trimode.build.rtx.kernel_list import KernelTensor, PlanKernel, parse_kernels

TENSOR = "{{ Name: {}, Dimensions: [{}], Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear) Row major }}"
LINE = (
    "Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [ {constants}], Outputs: [ {outputs}], "
    "TacticName: t, StreamId: 1, Metadata: {metadata}"
)
PRODUCT = LINE.format(
    name="__myl_Fc_1",
    kind="runtime_fusion",
    inputs=TENSOR.format("x", "-1,128", "BFloat16"),
    constants=TENSOR.format("w", "128,64", "Int4") + ", " + TENSOR.format("s", "1,64", "BFloat16"),
    outputs=TENSOR.format("y", "-1,64", "BFloat16"),
    metadata="[ONNX Layer: layers.0/DequantizeLinear_3][ONNX Layer: layers.0/MatMul_4]",
)
SIGNAL = (
    "Name: s, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, EventId: 1, "
    "Metadata: "
)
SHAPES = (
    "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: a }], StreamId: 0"
)


def test_lines_become_kernels_except_for_events() -> None:
    (kernel,) = parse_kernels(["something else", "\n".join(["Layers:", SHAPES, SIGNAL, PRODUCT])]).root
    assert kernel == PlanKernel(
        name="__myl_Fc_1",
        kind="runtime_fusion",
        stream=1,
        inputs=(KernelTensor(name="x", dims=(-1, 128), dtype="BFloat16"),),
        constants=(
            KernelTensor(name="w", dims=(128, 64), dtype="Int4"),
            KernelTensor(name="s", dims=(1, 64), dtype="BFloat16"),
        ),
        outputs=(KernelTensor(name="y", dims=(-1, 64), dtype="BFloat16"),),
        sources=("layers.0/DequantizeLinear_3", "layers.0/MatMul_4"),
    )


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ([], "lists no kernels"),
        ([SIGNAL], "lists no kernels"),
        ([PRODUCT + "\n" + PRODUCT.replace("Constants", "Weights")], "1 of 2 kernels"),
    ],
)
def test_a_log_of_another_form_is_refused(log: list[str], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        parse_kernels(log)
