"""Triton kernels of the depthwise 3x3 convolution on a grid of tokens, channels-last, with SiLU.

A program walks down `span` rows of the grid over BW columns and BC channels. A row of tokens is loaded at three shifts
(two of them from the cache) and meets three outputs, whose sums stay in registers, so no row is read twice from memory.
Forward, four rows are loaded before the first is used.
Tokens before the grid, `prefix` of them, are images of one pixel: the middle tap alone. All arithmetic is float32.
"""

import triton
import triton.language as tl

from .math import sigmoid


@triton.jit
def load_shifted(X, row, columns, channels, rows, width, stride, in_channels):
    """Tokens (row, columns) of the grid, zeros outside."""
    inside = (row >= 0) & (row < rows) & (columns >= 0) & (columns < width)
    at = X + tl.cast(row * width + columns, tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(at, mask=inside[:, None] & in_channels[None, :], other=0.0)


@triton.jit
def load_row(X, row, columns, channels, rows, width, stride, in_channels):
    """A row of tokens and its neighbours on the left and on the right: left, middle, right."""
    return (
        load_shifted(X, row, columns - 1, channels, rows, width, stride, in_channels),
        load_shifted(X, row, columns, channels, rows, width, stride, in_channels),
        load_shifted(X, row, columns + 1, channels, rows, width, stride, in_channels),
    )


@triton.jit
def along(tap_0, tap_1, tap_2, left, middle, right):
    """One row of the kernel along a row of tokens."""
    return tap_0 * left.to(tl.float32) + tap_1 * middle.to(tl.float32) + tap_2 * right.to(tl.float32)


@triton.jit
def load_tap(weight, channels, in_channels, row: tl.constexpr, column: tl.constexpr, FLIP: tl.constexpr):
    at = 8 - 3 * row - column if FLIP else 3 * row + column
    return tl.load(weight + channels * 9 + at, mask=in_channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_taps(weight, channels, in_channels, row: tl.constexpr, FLIP: tl.constexpr):
    """The three taps of one row of the kernel."""
    return (
        load_tap(weight, channels, in_channels, row, 0, FLIP),
        load_tap(weight, channels, in_channels, row, 1, FLIP),
        load_tap(weight, channels, in_channels, row, 2, FLIP),
    )


@triton.jit
def silu(y, SILU: tl.constexpr, FAST: tl.constexpr):
    if SILU:
        y *= sigmoid(y, FAST)
    return y


@triton.jit
def store_row(
    Y, y, row, first, end, columns, channels, width, stride, in_channels, SILU: tl.constexpr, FAST: tl.constexpr
):
    """Stores a row of outputs if it is the program's."""
    mask = (columns < width)[:, None] & in_channels[None, :] & (row >= first) & (row < end)
    at = Y + tl.cast(row * width + columns, tl.int64)[:, None] * stride + channels[None, :]
    tl.store(at, silu(y, SILU, FAST).to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['prefix', 'rows', 'width', 'span'])
def grid_conv(
    X, weight, bias, Y, prefix, rows, width, span, X_sb, X_sl, Y_sb, Y_sl,
    CHANNELS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    HAS_BIAS: tl.constexpr, FLIP: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Y (batch, L, CHANNELS) from X (batch, L, CHANNELS), of any row strides. FLIP turns the kernel by 180 degrees."""
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    in_channels = channels < CHANNELS
    blocks = tl.cdiv(width, BW)
    first = (tl.program_id(1) // blocks) * span
    columns = (tl.program_id(1) % blocks) * BW + tl.arange(0, BW)
    entry = tl.program_id(2).to(tl.int64)
    X += entry * X_sb
    Y += entry * Y_sb
    a0, a1, a2 = load_taps(weight, channels, in_channels, 0, FLIP)
    b0, b1, b2 = load_taps(weight, channels, in_channels, 1, FLIP)
    c0, c1, c2 = load_taps(weight, channels, in_channels, 2, FLIP)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    for start in range(0, tl.where(tl.program_id(1) == 0, prefix, 0), BP):
        t = start + tl.arange(0, BP)
        mask = (t < prefix)[:, None] & in_channels[None, :]
        x = tl.load(X + t[:, None] * X_sl + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        y = silu(offset + b1 * x, SILU, FAST)
        tl.store(Y + t[:, None] * Y_sl + channels[None, :], y.to(Y.dtype.element_ty), mask=mask)
    X += prefix * X_sl
    Y += prefix * Y_sl
    end = tl.minimum(first + span, rows)
    # sums of the row above the one that is loaded, and of its own
    above = tl.zeros([BW, BC], tl.float32)
    own = above + offset
    for row in range(first - 1, end + 1, 4):
        l0, m0, r0 = load_row(X, row, columns, channels, rows, width, X_sl, in_channels)
        l1, m1, r1 = load_row(X, row + 1, columns, channels, rows, width, X_sl, in_channels)
        l2, m2, r2 = load_row(X, row + 2, columns, channels, rows, width, X_sl, in_channels)
        l3, m3, r3 = load_row(X, row + 3, columns, channels, rows, width, X_sl, in_channels)
        y_0 = above + along(c0, c1, c2, l0, m0, r0)
        y_1 = own + along(b0, b1, b2, l0, m0, r0) + along(c0, c1, c2, l1, m1, r1)
        y_2 = offset + along(a0, a1, a2, l0, m0, r0) + along(b0, b1, b2, l1, m1, r1) + along(c0, c1, c2, l2, m2, r2)
        y_3 = offset + along(a0, a1, a2, l1, m1, r1) + along(b0, b1, b2, l2, m2, r2) + along(c0, c1, c2, l3, m3, r3)
        above = offset + along(a0, a1, a2, l2, m2, r2) + along(b0, b1, b2, l3, m3, r3)
        own = offset + along(a0, a1, a2, l3, m3, r3)
        store_row(Y, y_0, row - 1, first, end, columns, channels, width, Y_sl, in_channels, SILU, FAST)
        store_row(Y, y_1, row, first, end, columns, channels, width, Y_sl, in_channels, SILU, FAST)
        store_row(Y, y_2, row + 1, first, end, columns, channels, width, Y_sl, in_channels, SILU, FAST)
        store_row(Y, y_3, row + 2, first, end, columns, channels, width, Y_sl, in_channels, SILU, FAST)


@triton.jit
def through_silu(grad, y, FAST: tl.constexpr):
    """The gradient before the activation of y."""
    gate = sigmoid(y, FAST)
    return grad * gate * (1.0 + y * (1.0 - gate))


@triton.jit
def store_sum(PART, tile, channels, in_channels, tap: tl.constexpr, CHANNELS: tl.constexpr):
    tl.store(PART + tap * CHANNELS + channels, tl.sum(tile, 0), mask=in_channels)


@triton.jit(do_not_specialize=['prefix', 'rows', 'width', 'span'])
def grid_conv_gradients(
    X, weight, bias, GRAD_Y, GRAD, PART, prefix, rows, width, span, X_sb, X_sl, Y_sb, Y_sl, G_sb, G_sl,
    CHANNELS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD (batch, L, CHANNELS), the gradient before the activation, and PART (batch, programs, 10, CHANNELS): sums for
    each tap and the bias."""
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    in_channels = channels < CHANNELS
    blocks = tl.cdiv(width, BW)
    first = (tl.program_id(1) // blocks) * span
    columns = (tl.program_id(1) % blocks) * BW + tl.arange(0, BW)
    entry = tl.program_id(2).to(tl.int64)
    X += entry * X_sb
    GRAD_Y += entry * Y_sb
    GRAD += entry * G_sb
    PART += (entry * tl.num_programs(1) + tl.program_id(1)) * (10 * CHANNELS)
    a0, a1, a2 = load_taps(weight, channels, in_channels, 0, False)
    b0, b1, b2 = load_taps(weight, channels, in_channels, 1, False)
    c0, c1, c2 = load_taps(weight, channels, in_channels, 2, False)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    middle_tap = tl.zeros([1, BC], tl.float32)
    bias_sum = tl.zeros([1, BC], tl.float32)
    for start in range(0, tl.where(tl.program_id(1) == 0, prefix, 0), BP):
        t = start + tl.arange(0, BP)
        mask = (t < prefix)[:, None] & in_channels[None, :]
        x = tl.load(X + t[:, None] * X_sl + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD_Y + t[:, None] * Y_sl + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = through_silu(grad, offset + b1 * x, FAST)
        tl.store(GRAD + t[:, None] * G_sl + channels[None, :], grad.to(GRAD.dtype.element_ty), mask=mask)
        middle_tap += tl.sum(grad * x, 0)[None, :]
        bias_sum += tl.sum(grad, 0)[None, :]
    X += prefix * X_sl
    GRAD_Y += prefix * Y_sl
    GRAD += prefix * G_sl
    end = tl.minimum(first + span, rows)
    x0, x1, x2 = load_row(X, first - 1, columns, channels, rows, width, X_sl, in_channels)
    y0, y1, y2 = load_row(X, first, columns, channels, rows, width, X_sl, in_channels)
    zero = tl.zeros([BW, BC], tl.float32)
    sa0, sa1, sa2, sb0, sb1, sb2, sc0, sc1, sc2, sums = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    mask = (columns < width)[:, None] & in_channels[None, :]
    for row in range(first, end):
        z0, z1, z2 = load_row(X, row + 1, columns, channels, rows, width, X_sl, in_channels)
        token = tl.cast(row * width + columns, tl.int64)[:, None]
        grad = tl.load(GRAD_Y + token * Y_sl + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        y = offset + a0 * x0 + a1 * x1 + a2 * x2 + b0 * y0 + b1 * y1 + b2 * y2 + c0 * z0 + c1 * z1 + c2 * z2
        grad = through_silu(grad, y, FAST)
        tl.store(GRAD + token * G_sl + channels[None, :], grad.to(GRAD.dtype.element_ty), mask=mask)
        sums += grad
        sa0 += grad * x0
        sa1 += grad * x1
        sa2 += grad * x2
        sb0 += grad * y0
        sb1 += grad * y1
        sb2 += grad * y2
        sc0 += grad * z0
        sc1 += grad * z1
        sc2 += grad * z2
        x0, x1, x2, y0, y1, y2 = y0, y1, y2, z0, z1, z2
    store_sum(PART, sa0, channels, in_channels, 0, CHANNELS)
    store_sum(PART, sa1, channels, in_channels, 1, CHANNELS)
    store_sum(PART, sa2, channels, in_channels, 2, CHANNELS)
    store_sum(PART, sb0, channels, in_channels, 3, CHANNELS)
    store_sum(PART, tl.where(tl.arange(0, BW)[:, None] == 0, sb1 + middle_tap, sb1), channels, in_channels, 4, CHANNELS)
    store_sum(PART, sb2, channels, in_channels, 5, CHANNELS)
    store_sum(PART, sc0, channels, in_channels, 6, CHANNELS)
    store_sum(PART, sc1, channels, in_channels, 7, CHANNELS)
    store_sum(PART, sc2, channels, in_channels, 8, CHANNELS)
    store_sum(PART, tl.where(tl.arange(0, BW)[:, None] == 0, sums + bias_sum, sums), channels, in_channels, 9, CHANNELS)
