"""Triton kernels of sums over rows, and over partial results.

Those of small tensors are one launch for several: each alone takes as long as all.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=['rows', 'span'])
def column_sums(X, PARTS, rows, span, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """PARTS (programs, COLUMNS) float32: sums over so many rows each of X (rows, COLUMNS), contiguous."""
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(0) * span
    end = tl.minimum(first + span, rows)
    total = tl.zeros([BR, BC], tl.float32)
    for start in range(first, end, BR):
        row = start + tl.arange(0, BR)
        at = X + tl.cast(row, tl.int64)[:, None] * COLUMNS + column[None, :]
        total += tl.load(at, mask=(row < end)[:, None] & (column < COLUMNS)[None, :], other=0.0).to(tl.float32)
    tl.store(PARTS + tl.program_id(0) * COLUMNS + column, tl.sum(total, 0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=['rows'])
def sum_parts(PARTS, OUT, rows, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """OUT (COLUMNS): the sum of PARTS (rows, COLUMNS), both float32 and contiguous."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BR, BC], tl.float32)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)
        at = PARTS + tl.cast(row, tl.int64)[:, None] * COLUMNS + column[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & (column < COLUMNS)[None, :], other=0.0)
    tl.store(OUT + column, tl.sum(total, 0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=['rows', 'length', 'OUT_sb', 'OUT_sl'])
def sum_rows(
    PARTS, OUT, rows, length, OUT_sb, OUT_sl,
    COUNT: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """OUT (batch, L, N) of any row stride from PARTS (COUNT, batch, L, N) float32, added in order; `rows` are
    batch * L. Strides of images and rows come in units of ALIGN numbers."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.arange(0, N)[None, :]
    inside = (row < rows)[:, None]
    at = PARTS + tl.cast(row, tl.int64)[:, None] * N + column
    total = tl.zeros([BR, N], tl.float32)
    for part in tl.static_range(COUNT):
        total += tl.load(at + part * tl.cast(rows, tl.int64) * N, mask=inside, other=0.0)
    image, token = tl.cast(row // length, tl.int64), tl.cast(row % length, tl.int64)
    to = OUT + (image * OUT_sb * ALIGN + token * OUT_sl * ALIGN)[:, None] + column
    tl.store(to, total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['r0', 'r1', 'r2', 'r3', 'r4', 'channels', 'c1', 'c2', 'c3', 'c4'])
def mixer_sums(
    P0, P1, P2, P3, P4, WEIGHT, BIAS, OUT1, OUT2, OUT3, OUT4, r0, r1, r2, r3, r4, channels, c1, c2, c3, c4,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Five tensors' sums over their rows; the second axis of the grid is the tensor. P0 (r0, 10, channels) are parts of
    a convolution's WEIGHT (channels, 9) and BIAS (channels), the others (rows, columns) of a tensor (columns)."""
    job = tl.program_id(1)
    # one loop for all: a program of five, each unrolled, takes longer to fetch than to run
    parts, out, rows, columns = P0, WEIGHT, r0, 10 * channels
    if job == 1:
        parts, out, rows, columns = P1, OUT1, r1, c1
    if job == 2:
        parts, out, rows, columns = P2, OUT2, r2, c2
    if job == 3:
        parts, out, rows, columns = P3, OUT3, r3, c3
    if job == 4:
        parts, out, rows, columns = P4, OUT4, r4, c4
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < columns
    total = tl.zeros([BR, BC], tl.float32)
    for first in range(0, tl.where(tl.program_id(0) * BC < columns, rows, 0), BR):
        row = first + tl.arange(0, BR)
        at = parts + tl.cast(row, tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    sums = tl.sum(total, 0)
    if job == 0:
        tap, channel = column // channels, column % channels
        tl.store(WEIGHT + channel * 9 + tap, sums, mask=tap < 9)
        tl.store(BIAS + channel, sums, mask=tap == 9)
    else:
        tl.store(out + column, sums, mask=inside)
