"""Reference of the gated activation's kernel."""

from __future__ import annotations

from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up: [.., I] from [.., 2 I], the columns of gate first."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)
