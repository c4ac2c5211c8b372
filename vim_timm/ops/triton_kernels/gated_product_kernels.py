"""Triton kernels of a SwiGLU's products that keep what is between them in registers. Sums and gate are float32.

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
def halves(ab, BIAS, both, inside, BM: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """a and b (BM, BH) of both side by side (BM, 2 BH), with their bias."""
    if HAS_BIAS:
        ab += tl.load(BIAS + both, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.split(tl.permute(tl.reshape(ab, [BM, 2, BH]), [0, 2, 1]))


@triton.jit
def gate(ab, BIAS, both, inside, BM: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr):
    """SiLU(a) b (BM, BH) of a and b side by side (BM, 2 BH), with their bias."""
    a, b = halves(ab, BIAS, both, inside, BM, BH, HAS_BIAS)
    return a * sigmoid(a, FAST) * b


@triton.jit
def store_rows(OUT, BIAS, y, rows, count, columns, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Columns of OUT (count, N): y with their bias."""
    if HAS_BIAS:
        y += tl.load(BIAS + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows < count)[:, None] & (columns < N)[None, :]
    tl.store(OUT + rows[:, None] * N + columns[None, :], y.to(OUT.dtype.element_ty), mask=mask)


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


@triton.jit(do_not_specialize=['count'])
def whole_swiglu(
    X, WEIGHT, BIAS, OUT_WEIGHT, OUT_BIAS, OUT, count,
    C: tl.constexpr, H: tl.constexpr, N: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, N0: tl.constexpr,
    N1: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUT_BIAS: tl.constexpr,
    EXACT: tl.constexpr, EXACT_OUT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """OUT (count, N) = h OUT_WEIGHT (N, H)^T + OUT_BIAS for h = SiLU(a) b, [a, b] = X (count, C) WEIGHT (2 H, C)^T +
    BIAS. Channels of X and OUT come in two pieces of powers of two each, the second of which may be 0."""
    rows = tl.cast(tl.program_id(0) * BM + tl.arange(0, BM), tl.int64)
    c0, c1 = tl.arange(0, C0), C0 + tl.arange(0, C1 if C1 > 0 else 1)
    n0, n1 = tl.arange(0, N0), N0 + tl.arange(0, N1 if N1 > 0 else 1)
    x0 = load_tile(X, rows, rows < count, c0, C, False)
    x1 = x0
    if C1 > 0:
        x1 = load_tile(X, rows, rows < count, c1, C, False)
    y0, y1 = tl.zeros([BM, N0], tl.float32), tl.zeros([BM, N1 if N1 > 0 else 1], tl.float32)
    half = tl.arange(0, 2 * BH) % BH
    for start in range(0, H, BH):
        both, inside = start + half + tl.arange(0, 2 * BH) // BH * H, start + half < H
        ab = tl.zeros([BM, 2 * BH], tl.float32)
        ab = product(x0, tl.trans(load_tile(WEIGHT, both, inside, c0, C, EXACT)), ab, FAST)
        if C1 > 0:
            ab = product(x1, tl.trans(load_tile(WEIGHT, both, inside, c1, C, EXACT)), ab, FAST)
        h = gate(ab, BIAS, both, inside, BM, BH, HAS_BIAS, FAST).to(X.dtype.element_ty)
        hidden = start + tl.arange(0, BH)
        y0 = product(h, tl.trans(load_tile(OUT_WEIGHT, n0, n0 < N, hidden, H, EXACT_OUT)), y0, FAST)
        if N1 > 0:
            y1 = product(h, tl.trans(load_tile(OUT_WEIGHT, n1, n1 < N, hidden, H, EXACT_OUT)), y1, FAST)
    store_rows(OUT, OUT_BIAS, y0, rows, count, n0, N, HAS_OUT_BIAS)
    if N1 > 0:
        store_rows(OUT, OUT_BIAS, y1, rows, count, n1, N, HAS_OUT_BIAS)


@triton.jit
def load_rows(MATRIX, rows, inside, columns, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """`load_tile` of a tile that may go beyond the last row, but not beyond the last column, if EXACT."""
    at = MATRIX + rows[:, None] * WIDTH + columns[None, :]
    if EXACT:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(MATRIX, tile, rows, inside, columns, LAST: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Puts a tile into a contiguous matrix of WIDTH columns, without columns from LAST on; there are none, if EXACT."""
    at = MATRIX + rows[:, None] * WIDTH + columns[None, :]
    tile = tile.to(MATRIX.dtype.element_ty)
    if EXACT:
        tl.store(at, tile, mask=inside[:, None])
    else:
        tl.store(at, tile, mask=inside[:, None] & (columns < LAST)[None, :])


@triton.jit
def sum_pairs(tile, BM: tl.constexpr, BH: tl.constexpr):
    """Sums (BM / 16, 8, BH) over the two of 16 rows of a tile that one thread has."""
    return tl.sum(tl.reshape(tile, [BM // 16, 2, 8, BH]), 1)


@triton.jit(do_not_specialize=['count', 'span'])
def swiglu_gradients(
    X, WEIGHT, BIAS, GRAD, GRAD_AB, PART, count, span,
    C: tl.constexpr, H: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD_AB (count, 2 H), gradients of [a, b] = X (count, C) WEIGHT (2 H, C)^T + BIAS for GRAD (count, H), that of
    SiLU(a) b, which takes the place of GRAD. PART (programs, 2 H): sums of GRAD_AB, before it is rounded, over a
    program's rows.

    A program owns columns, whose weights stay in shared memory in two pieces of C0 and C1 channels, powers of two (the
    second may be 0), and walks over tiles of rows.
    """
    start = tl.program_id(1) * BH
    half = tl.arange(0, 2 * BH) % BH
    both, inside = start + half + tl.arange(0, 2 * BH) // BH * H, start + half < H
    hidden = start + tl.arange(0, BH)
    c0, c1 = tl.arange(0, C0), C0 + tl.arange(0, C1 if C1 > 0 else 1)
    w0 = tl.trans(load_tile(WEIGHT, both, inside, c0, C, EXACT))
    if C1 > 0:
        w1 = tl.trans(load_tile(WEIGHT, both, inside, c1, C, EXACT))
    sums_a, sums_b = tl.zeros([BM // 16, 8, BH], tl.float32), tl.zeros([BM // 16, 8, BH], tl.float32)
    rows = tl.arange(0, BM)
    first = tl.program_id(0) * span
    for tile in range(first, tl.minimum(first + span, count), BM):
        at, there = tl.cast(tile, tl.int64), tile + rows < count
        grad = load_rows(GRAD + at * H, rows, there, hidden, H, EXACT)
        ab = tl.zeros([BM, 2 * BH], tl.float32)
        ab = product(load_rows(X + at * C, rows, there, c0, C, EXACT), w0, ab, FAST)
        if C1 > 0:
            ab = product(load_rows(X + at * C, rows, there, c1, C, EXACT), w1, ab, FAST)
        a, b = halves(ab, BIAS, both, inside, BM, BH, HAS_BIAS)
        slope = sigmoid(a, FAST)
        silu = a * slope
        slope += silu * (1.0 - slope)
        grad = grad.to(tl.float32)
        grad_a, grad_b = grad * b * slope, grad * silu
        sums_a += sum_pairs(grad_a, BM, BH)
        sums_b += sum_pairs(grad_b, BM, BH)
        store_tile(GRAD_AB + at * (2 * H), grad_a, rows, there, hidden, H, 2 * H, EXACT)
        store_tile(GRAD_AB + at * (2 * H) + H, grad_b, rows, there, hidden, H, 2 * H, EXACT)
        store_tile(GRAD + at * H, silu * b, rows, there, hidden, H, H, EXACT)
    part = PART + tl.program_id(0) * (2 * H) + hidden
    tl.store(part, tl.sum(tl.sum(sums_a, 0), 0), mask=hidden < H)
    tl.store(part + H, tl.sum(tl.sum(sums_b, 0), 0), mask=hidden < H)
