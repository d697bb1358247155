"""cos and sin of the rotary angles, for queries and for keys.

An angle is the fp32 product of a position and a frequency, up to 262,143 radians. The GPU's own cos and sin are
approximate, and the accurate ones of its library need a stack for large angles. So the angle is reduced in fp64 to a
quarter turn, with an error below 1e-10, and fp32 polynomials do the rest.

Source of the polynomials: Cephes, single/sinf.c.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotations_kernel(
    position_ids,
    frequencies,
    key_scale,
    query_scales,
    query_cos,
    query_sin,
    key_cos,
    key_sin,
    HALF: tl.constexpr,
    SCALES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """A program handles one token."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, triton.next_power_of_2(HALF))
    exists = pair < HALF
    position = tl.load(position_ids + token)
    cos, sin = _cos_sin(position.to(tl.float32) * tl.load(frequencies + pair, mask=exists, other=0.0))
    of_keys = tl.load(key_scale)
    of_queries = tl.load(query_scales + tl.minimum(position // LENGTH, SCALES - 1))
    at = token * HALF + pair
    element = query_cos.dtype.element_ty
    tl.store(query_cos + at, (cos * of_queries).to(element), mask=exists)
    tl.store(query_sin + at, (sin * of_queries).to(element), mask=exists)
    tl.store(key_cos + at, (cos * of_keys).to(element), mask=exists)
    tl.store(key_sin + at, (sin * of_keys).to(element), mask=exists)


@triton.jit
def _cos_sin(angle):
    """Of fp32 angles, in fp32."""
    wide = angle.to(tl.float64)
    turns = tl.floor(wide * 0.6366197723675814 + 0.5)  # quarter turns, of pi / 2
    x = (wide - turns * 1.5707963267948966).to(tl.float32)
    z = x * x
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quarter = turns.to(tl.int32)
    swapped = (quarter & 1) != 0
    of_cos, of_sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where(((quarter + 1) & 2) != 0, -of_cos, of_cos), tl.where((quarter & 2) != 0, -of_sin, of_sin)
