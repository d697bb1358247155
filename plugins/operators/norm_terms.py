"""What the operator before a norm writes for the operator after it, which computes the norm.

That is the residual stream times the norm's weight, and sums of the stream's squares.
"""

from __future__ import annotations

from trimode.plugins.operators.operator import Dim, Operand, ceil_div

# Columns of the residual stream whose squares are summed together: a tile.
NORM_COLUMNS = 64
# The most tiles that a product adds up (trimode.plugins.kernels.norm_terms).
MOST_NORM_TILES = 255

SQUARES = Operand("squares", "fp32", ("norm tiles", "M"))
EPSILON = Operand("epsilon", "fp32", ("1",))
NEXT_SQUARES = SQUARES._replace(name="next_squares")


def norm_tiles(width: Dim) -> Dim:
    """Tiles of a stream of so many columns."""
    return ceil_div(width, NORM_COLUMNS)
