"""Triton kernel of what the others have to know of visible patches' places, and of the sums of decays that follow them.

Places of an image are compared with each other: no map of the grid exists, and nothing that KEEP holds leads outside.
"""

import triton
import triton.language as tl

from .decay_kernels import cumulate


@triton.jit
def load_places(KEEP, i, kept, stride, cells):
    """Cells of the grid of visible patches i, -1 for none and for what is outside the grid."""
    place = tl.load(KEEP + i * stride, mask=(i >= 0) & (i < kept), other=-1)
    return tl.where((place >= 0) & (place < cells), place, -1).to(tl.int32)


@triton.jit
def store_columns(KEEP, COLUMNS, t, length, prefix, height, width, stride, BU: tl.constexpr):
    """The tokens t of one image where they stand in COLUMNS (L)."""
    cells, kept = height * width, length - prefix
    place = load_places(KEEP, t - prefix, kept, stride, cells)
    key = tl.where(place < 0, cells, place % width * height + place // width)
    rank = t * 0
    for first in range(0, kept, BU):
        u = first + tl.arange(0, BU)
        other = load_places(KEEP, u, kept, stride, cells)
        other_key = tl.where(other < 0, cells, other % width * height + other // width)[None, :]
        tie = (other_key == key[:, None]) & (u[None, :] < (t - prefix)[:, None])
        earlier = ((other_key < key[:, None]) | tie) & (u < kept)[None, :]
        rank += tl.sum(earlier.to(tl.int32), 1)
    tl.store(COLUMNS + tl.where(t < prefix, t, prefix + rank), t, mask=t < length)


@triton.jit
def store_neighbours(KEEP, NEIGHBOURS, t, tap, length, prefix, height, width, stride, BU: tl.constexpr):
    """What one tap meets at the tokens t of one image, in NEIGHBOURS (9, L)."""
    cells, kept = height * width, length - prefix
    place = load_places(KEEP, t - prefix, kept, stride, cells)
    row, column = place // width + tap // 3 - 1, place % width + tap % 3 - 1
    inside = (place >= 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    wanted = tl.where(inside, row * width + column, -2)
    found = tl.where((t < prefix) & (tap == 4), t, -1)
    for first in range(0, kept, BU):
        u = first + tl.arange(0, BU)
        same = load_places(KEEP, u, kept, stride, cells)[None, :] == wanted[:, None]
        found = tl.maximum(found, tl.max(tl.where(same, (prefix + u)[None, :], -1), 1))
    tl.store(NEIGHBOURS + tap * length + t, found, mask=t < length)


@triton.jit(do_not_specialize=['length', 'heads', 'prefix', 'height', 'width', 'KEEP_sb'])
def masked_places(
    KEEP, NEIGHBOURS, COLUMNS, RAW, BIAS, A_LOG, DT, S,
    length, heads, prefix, height, width, KEEP_sb, KEEP_sl, RAW_sb, RAW_sl,
    HAS_COLUMNS: tl.constexpr, FIRST_COLUMNS: tl.constexpr, ORDERS: tl.constexpr, DECAYS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, STEP: tl.constexpr, BH: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """NEIGHBOURS (batch, 9, L) int32, the tokens that taps meet or -1, and COLUMNS (batch, L) int32, the tokens by
    columns of their image, if an order is by them. With DECAYS also DT and S, as of `decay_kernels.decay_forward`.

    KEEP (batch, L - prefix) has cells of the tokens behind `prefix` others, which meet the middle tap alone.

    Of tokens in one cell the last is met, and a token that is not its own neighbour is a mistake; COLUMNS is a
    permutation whatever KEEP holds.
    """
    job = tl.program_id(1)
    entry = tl.program_id(2).to(tl.int64)
    KEEP += entry * KEEP_sb
    COLUMNS += entry * length
    NEIGHBOURS += entry * 9 * length
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    if job < 9:
        store_neighbours(KEEP, NEIGHBOURS, t, job, length, prefix, height, width, KEEP_sl, BU)
    elif not DECAYS:
        store_columns(KEEP, COLUMNS, t, length, prefix, height, width, KEEP_sl, BU)
    elif tl.program_id(0) == 0:
        order = job - 9
        if HAS_COLUMNS:
            if job == 8 + ORDERS:  # the last order
                for first in range(0, length, BT):
                    store_columns(KEEP, COLUMNS, first + t, length, prefix, height, width, KEEP_sl, BU)
                tl.debug_barrier()
        cumulate(
            RAW + entry * RAW_sb, BIAS, A_LOG, COLUMNS, COLUMNS, DT + entry * heads * length,
            S + (entry * ORDERS + order) * heads * length, order, 0, length, length, heads, prefix, height, width,
            RAW_sl, HAS_BIAS, True, False, FIRST_COLUMNS, STEP, BH, FAST,
        )  # fmt: skip
