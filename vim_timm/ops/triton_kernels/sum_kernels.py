"""Triton kernel of sums over partial results, of several tensors in one launch: each alone takes as long as all."""

import triton
import triton.language as tl


@triton.jit
def column_sums(PARTS, OUT, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """OUT (columns) from PARTS (rows, columns), both contiguous, for the program's BC columns."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < columns
    total = tl.zeros([BR, BC], tl.float32)
    for first in range(0, tl.where(tl.program_id(0) * BC < columns, rows, 0), BR):
        row = first + tl.arange(0, BR)
        at = PARTS + tl.cast(row, tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    tl.store(OUT + column, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=['r0', 'r1', 'r2', 'r3', 'r4', 'c0', 'c1', 'c2', 'c3', 'c4'])
def five_sums(
    P0, P1, P2, P3, P4, OUT0, OUT1, OUT2, OUT3, OUT4, r0, r1, r2, r3, r4, c0, c1, c2, c3, c4,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Five tensors' sums over their rows; the second axis of the grid is the tensor."""
    job = tl.program_id(1)
    if job == 0:
        column_sums(P0, OUT0, r0, c0, BR, BC)
    if job == 1:
        column_sums(P1, OUT1, r1, c1, BR, BC)
    if job == 2:
        column_sums(P2, OUT2, r2, c2, BR, BC)
    if job == 3:
        column_sums(P3, OUT3, r3, c3, BR, BC)
    if job == 4:
        column_sums(P4, OUT4, r4, c4, BR, BC)
