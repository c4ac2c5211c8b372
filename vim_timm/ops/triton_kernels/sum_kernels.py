"""Triton kernel of sums over partial results, of several tensors in one launch: each alone takes as long as all."""

import triton
import triton.language as tl


@triton.jit
def column_sums(PARTS, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """The program's BC columns, and their sums in PARTS (rows, columns), contiguous."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < columns
    total = tl.zeros([BR, BC], tl.float32)
    for first in range(0, tl.where(tl.program_id(0) * BC < columns, rows, 0), BR):
        row = first + tl.arange(0, BR)
        at = PARTS + tl.cast(row, tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    return column, tl.sum(total, 0)


@triton.jit
def store_sums(PARTS, OUT, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """OUT (columns), sums of PARTS."""
    column, total = column_sums(PARTS, rows, columns, BR, BC)
    tl.store(OUT + column, total, mask=column < columns)


@triton.jit
def store_taps(PARTS, WEIGHT, BIAS, rows, channels, BR: tl.constexpr, BC: tl.constexpr):
    """WEIGHT (channels, 9) and BIAS (channels), sums of PARTS (rows, 10, channels)."""
    column, total = column_sums(PARTS, rows, 10 * channels, BR, BC)
    tap, channel = column // channels, column % channels
    tl.store(WEIGHT + channel * 9 + tap, total, mask=tap < 9)
    tl.store(BIAS + channel, total, mask=tap == 9)


@triton.jit(do_not_specialize=['r0', 'r1', 'r2', 'r3', 'r4', 'channels', 'c1', 'c2', 'c3', 'c4'])
def mixer_sums(
    P0, P1, P2, P3, P4, WEIGHT, BIAS, OUT1, OUT2, OUT3, OUT4, r0, r1, r2, r3, r4, channels, c1, c2, c3, c4,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Five tensors' sums over their rows, those of the first as a convolution's weight and bias; the second axis of the
    grid is the tensor."""
    job = tl.program_id(1)
    if job == 0:
        store_taps(P0, WEIGHT, BIAS, r0, channels, BR, BC)
    if job == 1:
        store_sums(P1, OUT1, r1, c1, BR, BC)
    if job == 2:
        store_sums(P2, OUT2, r2, c2, BR, BC)
    if job == 3:
        store_sums(P3, OUT3, r3, c3, BR, BC)
    if job == 4:
        store_sums(P4, OUT4, r4, c4, BR, BC)
