"""Triton kernels of a SwiGLU's products that keep what is between them out of memory. Sums and gate are float32.

A tile of weights has rows of a and the same rows of b one behind the other, so that a product makes both at once and a
thread has each a with its b.
"""

import triton
import triton.language as tl

from .math import sigmoid


@triton.jit
def product(a, b, sums, FAST: tl.constexpr):
    """sums + a @ b; of float32 numbers in Triton's interpreter, which multiplies no others."""
    if FAST:
        return tl.dot(a, b, sums)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision='ieee')


@triton.jit
def load_tile(MATRIX, rows, inside, columns, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Elements of a contiguous matrix of WIDTH columns, zeros in rows that are not inside and beyond the last column;
    none are, if EXACT."""
    at = MATRIX + rows[:, None] * WIDTH + columns[None, :]
    if EXACT:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def gate(ab, BIAS, both, inside, BM: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr):
    """SiLU(a) b (BM, BH) of a and b side by side (BM, 2 BH), with their bias."""
    if HAS_BIAS:
        ab += tl.load(BIAS + both, mask=inside, other=0.0).to(tl.float32)[None, :]
    a, b = tl.split(tl.permute(tl.reshape(ab, [BM, 2, BH]), [0, 2, 1]))
    return a * sigmoid(a, FAST) * b


@triton.jit(do_not_specialize=['count'])
def gated_product(
    X, WEIGHT, BIAS, OUT, count,
    C: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """OUT (count, H) = SiLU(a) b for [a, b] = X (count, C) WEIGHT (2 H, C)^T + BIAS.

    Programs go through GROUP tiles of rows, then to the next columns, so that few tiles of both operands are in use at
    a time.
    """
    columns: tl.constexpr = (H + BH - 1) // BH
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    place = tl.program_id(0) % (GROUP * columns)
    group = tl.minimum(tl.cdiv(count, BM) - first, GROUP)
    start = place // group * BH
    rows = tl.cast((first + place % group) * BM + tl.arange(0, BM), tl.int64)
    half = tl.arange(0, 2 * BH) % BH
    both, inside = start + half + tl.arange(0, 2 * BH) // BH * H, start + half < H
    ab = tl.zeros([BM, 2 * BH], tl.float32)
    for k in range(0, C, BC):
        channels = k + tl.arange(0, BC)
        x = load_tile(X, rows, rows < count, channels, C, False)
        ab = product(x, tl.trans(load_tile(WEIGHT, both, inside, channels, C, EXACT)), ab, FAST)
    hidden = start + tl.arange(0, BH)
    out = gate(ab, BIAS, both, inside, BM, BH, HAS_BIAS, FAST).to(OUT.dtype.element_ty)
    tl.store(OUT + rows[:, None] * H + hidden[None, :], out, mask=(rows < count)[:, None] & (hidden < H)[None, :])
