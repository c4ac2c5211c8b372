"""Numbers that launches and kernels share: launches compute with them, sources get them as macros of the same names."""

import math
from typing import Iterable, Tuple, Union

from ..plain import reference

STATE = 16  # d_state
TILE = 16  # tokens that a warp takes at once, the height of a matrix product
REACH = 3  # tokens on each side that a convolution reaches
CHANNELS = 64  # of a block of all kernels but the scan's backward
BACKWARD_CHANNELS = 32  # of a block of the scan's backward, one warp
SCAN_THREADS = 64  # of a block of the scan, a warp for each direction
KEPT = 4  # tokens between two states that the backward pass starts again from
CONV_WARPS = 4  # of a block of the convolution's backward
CONV_GROUP = 8  # tokens that such a warp takes at once
PRODUCT_TOKENS = 32  # that a block of sums of outer products has in shared memory at once
FLAT_THREADS = 256  # of a block that takes numbers one by one, or sums of rows
SUM_COLUMNS = 128  # of a block of sums of rows
FASTEST = f'{reference.FASTEST:.9g}f'  # decay rate, in base 2
CONSTANTS = {name: value for name, value in globals().items() if name.isupper()}


def padded_rank(rank: int) -> int:
    return 16 * math.ceil(rank / 16)


def row(rank: int) -> int:
    """Numbers in a token's projections: dt, padded, B and C."""
    return padded_rank(rank) + 2 * STATE


def macros(given: Iterable[Tuple[str, int]]) -> Tuple[Tuple[str, Union[int, str]], ...]:
    """All macros of a source from those of a call, RANK (dt_rank) among them."""
    own = dict(given)
    return tuple({**CONSTANTS, 'RANK_PAD': padded_rank(own['RANK']), 'ROW': row(own['RANK']), **own}.items())


def project_shared(rank: int, warps: int, fused: bool) -> int:
    """Bytes of shared memory of a block of project.cu: the channels of two parts of x with its neighbours, of what
    warps convolve, and of two parts of the weights."""
    rows = 2 * (TILE * warps + 2 * REACH) + 2 * TILE * warps + (4 * row(rank) if fused else 0)
    return 2 * CHANNELS * rows
