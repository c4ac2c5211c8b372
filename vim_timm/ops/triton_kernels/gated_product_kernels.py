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
def gate(ab, BIAS, both, inside, BM: tl.constexpr, BH: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr):
    """SiLU(a) b (BM, BH) of a and b side by side (BM, 2 BH), with their bias."""
    if HAS_BIAS:
        ab += tl.load(BIAS + both, mask=inside, other=0.0).to(tl.float32)[None, :]
    a, b = tl.split(tl.permute(tl.reshape(ab, [BM, 2, BH]), [0, 2, 1]))
    return a * sigmoid(a, FAST) * b


@triton.jit
def store_rows(OUT, BIAS, y, rows, count, columns, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Columns of OUT (count, N): y with their bias."""
    if HAS_BIAS:
        y += tl.load(BIAS + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows < count)[:, None] & (columns < N)[None, :]
    tl.store(OUT + rows[:, None] * N + columns[None, :], y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def cast(FROM, TO, COUNT: tl.constexpr, BN: tl.constexpr):
    """TO (COUNT) = FROM, BN numbers at a time by all programs."""
    program, programs = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.num_programs(0), tl.int64)  # may be millions
    for first in tl.range(program * BN, COUNT, programs * BN, num_stages=1):
        at = first + tl.arange(0, BN)
        tl.store(TO + at, tl.load(FROM + at, mask=at < COUNT).to(TO.dtype.element_ty), mask=at < COUNT)


@triton.jit(do_not_specialize=['count'])
def gated_product(
    X, WEIGHT, BIAS, OUT, NEXT_WEIGHT, NEXT_BIAS, CAST_WEIGHT, CAST_BIAS, count,
    C: tl.constexpr, H: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """OUT (count, H) = SiLU(a) b for [a, b] = X (count, C) WEIGHT (2 H, C)^T + BIAS. CAST_WEIGHT and CAST_BIAS are so
    many numbers of the next product's weight and bias, or none, which would be launches of their own.

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
    cast(NEXT_WEIGHT, CAST_WEIGHT, WEIGHTS, BN)
    cast(NEXT_BIAS, CAST_BIAS, BIASES, BN)


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
def product_of_pieces(X, there, w0, w1, C: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr):
    """X (rows, C), zeros where no row is there, @ weights, of whose channels w0 are the first and w1 others, if any."""
    rows, c0 = tl.arange(0, there.shape[0]), tl.arange(0, w0.shape[0])
    ab = tl.zeros([there.shape[0], w0.shape[1]], tl.float32)
    ab = product(load_rows(X, rows, there, c0, C, EXACT), w0, ab, FAST)
    if C > w0.shape[0]:
        c1 = w0.shape[0] + tl.arange(0, w1.shape[0])
        ab = product(load_rows(X, rows, there, c1, C, EXACT), w1, ab, FAST)
    return ab


@triton.jit
def inside_of(row, last, hidden, H: tl.constexpr, EXACT: tl.constexpr):
    """Elements of a tile's lines before row `last`, and before unit H, as all are if EXACT."""
    if EXACT:
        return (row < last)[:, None]
    else:
        return (row < last)[:, None] & (hidden < H)


@triton.jit
def lines(ab, BM: tl.constexpr, BH: tl.constexpr):
    """a and b (BH / 32 * BM, 32) of a tile's product, hidden units in order again; lines go through 8 rows, the tile's
    groups of 16 rows, the group's halves, and groups of 32 units, as a thread has them."""
    ab = tl.reshape(ab, [BM // 16, 2, 8, 2, BH // 32, 4, 4, 2])
    a, b = tl.split(tl.permute(ab, [4, 1, 0, 2, 6, 5, 7, 3]))
    return tl.reshape(a, [BH // 32 * BM, 32]), tl.reshape(b, [BH // 32 * BM, 32])


@triton.jit
def sum_halves(tile, BM: tl.constexpr, BH: tl.constexpr):
    """Sums (BH / 32, BM / 2, 32) of a tile's lines over both halves of 16 rows, of which a thread has a row each."""
    return tl.sum(tl.reshape(tile, [BH // 32, 2, BM // 2, 32]), 1)


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
    second may be 0), and walks over tiles of rows; the next tile is read, and its product made, at the end of a step.
    Weights are in such an order that the four pairs of columns, 8 apart, which a thread has of 32 columns of a product
    are 8 neighbouring hidden units, so that it loads and stores them at once, with no exchange through shared memory.
    """
    start = tl.program_id(1) * BH
    column = tl.arange(0, 2 * BH)
    unit = start + column % BH // 32 * 32 + column // 2 % 4 * 8 + column // 8 % 4 * 2 + column % 2
    both, inside = unit + column // BH * H, unit < H
    w0 = tl.trans(load_tile(WEIGHT, both, inside, tl.arange(0, C0), C, EXACT))
    w1 = w0
    if C1 > 0:
        w1 = tl.trans(load_tile(WEIGHT, both, inside, C0 + tl.arange(0, C1), C, EXACT))
    if HAS_BIAS:
        bias = tl.load(BIAS + both, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums_a, sums_b = tl.zeros([BH // 32, BM // 2, 32], tl.float32), tl.zeros([BH // 32, BM // 2, 32], tl.float32)
    rows, line = tl.arange(0, BM), tl.arange(0, BH // 32 * BM)
    row = line // 8 % (BM // 16) * 16 + line // (BM // 2) % 2 * 8 + line % 8
    hidden = start + (line // BM * 32)[:, None] + tl.arange(0, 32)[None, :]
    in_h, in_ab = row[:, None] * H + hidden, row[:, None] * (2 * H) + hidden
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, count)
    at = tl.cast(first, tl.int64)
    grad = tl.load(GRAD + at * H + in_h, mask=inside_of(first + row, last, hidden, H, EXACT), other=0.0)
    ab = product_of_pieces(X + at * C, first + rows < last, w0, w1, C, EXACT, FAST)
    for tile in range(first, last, BM):
        if HAS_BIAS:
            ab += bias
        a, b = lines(ab, BM, BH)
        slope = sigmoid(a, FAST)
        silu = a * slope
        slope += silu * (1.0 - slope)
        grad_h = grad.to(tl.float32)
        grad_a, grad_b = grad_h * b * slope, grad_h * silu
        sums_a += sum_halves(grad_a, BM, BH)
        sums_b += sum_halves(grad_b, BM, BH)
        at, there = tl.cast(tile, tl.int64), inside_of(tile + row, last, hidden, H, EXACT)
        into = GRAD_AB + at * (2 * H) + in_ab
        tl.store(into, grad_a.to(GRAD_AB.dtype.element_ty), mask=there)
        tl.store(into + H, grad_b.to(GRAD_AB.dtype.element_ty), mask=there)
        tl.store(GRAD + at * H + in_h, (silu * b).to(GRAD.dtype.element_ty), mask=there)
        there = inside_of(tile + BM + row, last, hidden, H, EXACT)
        grad = tl.load(GRAD + (at + BM) * H + in_h, mask=there, other=0.0)
        ab = product_of_pieces(X + (at + BM) * C, tile + BM + rows < last, w0, w1, C, EXACT, FAST)
    units = start + tl.arange(0, BH)
    part = PART + tl.program_id(0) * (2 * H) + units
    tl.store(part, tl.reshape(tl.sum(sums_a, 1), [BH]), mask=units < H)
    tl.store(part + H, tl.reshape(tl.sum(sums_b, 1), [BH]), mask=units < H)
