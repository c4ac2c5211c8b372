"""Triton kernels of the depthwise 3x3 convolution on a grid of tokens, channels-last, with SiLU.

A program walks down `span` rows of the grids over BW columns and BC channels, one part of the grids after
another. The columns of all images are numbered through, so that no lanes idle at narrow grids. A row of tokens is
loaded at three shifts (two of them from the cache) and meets three outputs, whose sums stay in registers, so no row is
read twice from memory. Four rows, three of them in the gradients, are loaded before the first is used.
Tokens before the grid, `prefix` of them, are images of one pixel: the middle tap alone. All arithmetic is float32.
Strides of images and rows come in units of ALIGN numbers, a power of two: loads are vectors as wide as that.
"""

import triton
import triton.language as tl

from .math import sigmoid


@triton.jit
def floats(x, FAST: tl.constexpr):
    """x as float32: bfloat16 in one instruction a number, where the compiler takes two for every other."""
    if FAST and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            'shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;', '=r,=r,r', [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def load_row(at, row, rows, step, stride, left, middle, right, FAST: tl.constexpr):
    """A row of tokens and its neighbours on the left and on the right, zeros outside: left, middle, right."""
    at += row * step
    inside = (row >= 0) & (row < rows)
    return (
        floats(tl.load(at - stride, mask=left & inside, other=0.0), FAST),
        floats(tl.load(at, mask=middle & inside, other=0.0), FAST),
        floats(tl.load(at + stride, mask=right & inside, other=0.0), FAST),
    )


@triton.jit
def along(y, tap_0, tap_1, tap_2, left, middle, right):
    """y and one row of the kernel along a row of tokens, summed in a chain of fused multiplications and additions."""
    return y + tap_0 * left + tap_1 * middle + tap_2 * right


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
def first_row(X, image, column, channels, prefix, X_sb, X_sl):
    """Addresses of the tokens of the grids' first row."""
    return X + (image * X_sb + (prefix + column) * X_sl)[:, None] + channels[None, :]


@triton.jit
def store_row(at, y, mask, SILU: tl.constexpr, FAST: tl.constexpr):
    tl.store(at, silu(y, SILU, FAST).to(at.dtype.element_ty), mask=mask)


SIZES = ['images', 'prefix', 'rows', 'width', 'span', 'spans', 'parts', 'X_sb', 'X_sl', 'Y_sb', 'Y_sl']


@triton.jit(do_not_specialize=SIZES)
def grid_conv(
    X, weight, bias, Y, images, prefix, rows, width, span, spans, parts, X_sb, X_sl, Y_sb, Y_sl,
    CHANNELS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, FLIP: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Y (images, L, CHANNELS) from X (images, L, CHANNELS). FLIP turns the kernel by 180 degrees."""
    X_sb = tl.cast(X_sb, tl.int64) * ALIGN
    X_sl = tl.cast(X_sl, tl.int64) * ALIGN
    Y_sb = tl.cast(Y_sb, tl.int64) * ALIGN
    Y_sl = tl.cast(Y_sl, tl.int64) * ALIGN
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    in_channels = channels < CHANNELS
    a0, a1, a2 = load_taps(weight, channels, in_channels, 0, FLIP)
    b0, b1, b2 = load_taps(weight, channels, in_channels, 1, FLIP)
    c0, c1, c2 = load_taps(weight, channels, in_channels, 2, FLIP)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    for part in range(tl.program_id(1), parts, tl.num_programs(1)):
        columns = (part // spans) * BW + tl.arange(0, BW)
        image = columns // width
        column = columns % width
        first = (part % spans) * span
        end = tl.minimum(first + span, rows)
        middle = (image < images)[:, None] & in_channels[None, :]
        left = middle & (column > 0)[:, None]
        right = middle & (column < width - 1)[:, None]
        x_at = first_row(X, image, column, channels, prefix, X_sb, X_sl)
        y_at = first_row(Y, image, column, channels, prefix, Y_sb, Y_sl)
        alone = middle & (column == 0)[:, None] & (first == 0)
        for t in range(-prefix, 0):
            x = tl.load(x_at + t * X_sl, mask=alone, other=0.0).to(tl.float32)
            tl.store(y_at + t * Y_sl, silu(offset + b1 * x, SILU, FAST).to(Y.dtype.element_ty), mask=alone)
        X_step, Y_step = width * X_sl, width * Y_sl
        # sums of the row above the one that is loaded, and of its own
        above = tl.zeros([BW, BC], tl.float32)
        own = above + offset
        for row in range(first - 1, end + 1, 4):
            l0, m0, r0 = load_row(x_at, row, rows, X_step, X_sl, left, middle, right, FAST)
            l1, m1, r1 = load_row(x_at, row + 1, rows, X_step, X_sl, left, middle, right, FAST)
            l2, m2, r2 = load_row(x_at, row + 2, rows, X_step, X_sl, left, middle, right, FAST)
            l3, m3, r3 = load_row(x_at, row + 3, rows, X_step, X_sl, left, middle, right, FAST)
            y_0 = along(above, c0, c1, c2, l0, m0, r0)
            y_1 = along(along(own, b0, b1, b2, l0, m0, r0), c0, c1, c2, l1, m1, r1)
            y_2 = along(along(along(offset, a0, a1, a2, l0, m0, r0), b0, b1, b2, l1, m1, r1), c0, c1, c2, l2, m2, r2)
            y_3 = along(along(along(offset, a0, a1, a2, l1, m1, r1), b0, b1, b2, l2, m2, r2), c0, c1, c2, l3, m3, r3)
            above = along(along(offset, a0, a1, a2, l2, m2, r2), b0, b1, b2, l3, m3, r3)
            own = along(offset, a0, a1, a2, l3, m3, r3)
            store_row(y_at + (row - 1) * Y_step, y_0, middle & (row > first), SILU, FAST)
            store_row(y_at + row * Y_step, y_1, middle & (row >= first) & (row < end), SILU, FAST)
            store_row(y_at + (row + 1) * Y_step, y_2, middle & (row + 1 < end), SILU, FAST)
            store_row(y_at + (row + 2) * Y_step, y_3, middle & (row + 2 < end), SILU, FAST)


@triton.jit
def through_silu(grad, y, FAST: tl.constexpr):
    """The gradient before the activation of y."""
    gate = sigmoid(y, FAST)
    return grad * gate * (1.0 + y * (1.0 - gate))


@triton.jit
def weighed(grad, sum_0, sum_1, sum_2, left, middle, right):
    """Sums of one row of taps and what a row of gradients adds."""
    return sum_0 + grad * left, sum_1 + grad * middle, sum_2 + grad * right


@triton.jit
def store_sum(PART, tile, channels, in_channels, tap: tl.constexpr, CHANNELS: tl.constexpr):
    tl.store(PART + tap * CHANNELS + channels, tl.sum(tile, 0), mask=in_channels)


@triton.jit
def store_tap_sums(
    PART, a0, a1, a2, b0, b1, b2, c0, c1, c2, sums, program, channels, in_channels, CHANNELS: tl.constexpr
):  # fmt: skip
    """One program's PART (10, CHANNELS) of the sums for each tap and the bias."""
    PART += program.to(tl.int64) * (10 * CHANNELS)
    store_sum(PART, a0, channels, in_channels, 0, CHANNELS)
    store_sum(PART, a1, channels, in_channels, 1, CHANNELS)
    store_sum(PART, a2, channels, in_channels, 2, CHANNELS)
    store_sum(PART, b0, channels, in_channels, 3, CHANNELS)
    store_sum(PART, b1, channels, in_channels, 4, CHANNELS)
    store_sum(PART, b2, channels, in_channels, 5, CHANNELS)
    store_sum(PART, c0, channels, in_channels, 6, CHANNELS)
    store_sum(PART, c1, channels, in_channels, 7, CHANNELS)
    store_sum(PART, c2, channels, in_channels, 8, CHANNELS)
    store_sum(PART, sums, channels, in_channels, 9, CHANNELS)


@triton.jit(do_not_specialize=[*SIZES, 'G_sb', 'G_sl'])
def grid_conv_gradients(
    X, weight, bias, GRAD_Y, GRAD, PART, images, prefix, rows, width, span, spans, parts,
    X_sb, X_sl, Y_sb, Y_sl, G_sb, G_sl,
    CHANNELS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD (images, L, CHANNELS), the gradient before the activation, and PART (programs, 10, CHANNELS): sums for each
    tap and the bias."""
    X_sb = tl.cast(X_sb, tl.int64) * ALIGN
    X_sl = tl.cast(X_sl, tl.int64) * ALIGN
    Y_sb = tl.cast(Y_sb, tl.int64) * ALIGN
    Y_sl = tl.cast(Y_sl, tl.int64) * ALIGN
    G_sb = tl.cast(G_sb, tl.int64) * ALIGN
    G_sl = tl.cast(G_sl, tl.int64) * ALIGN
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    in_channels = channels < CHANNELS
    a0, a1, a2 = load_taps(weight, channels, in_channels, 0, False)
    b0, b1, b2 = load_taps(weight, channels, in_channels, 1, False)
    c0, c1, c2 = load_taps(weight, channels, in_channels, 2, False)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    zero = tl.zeros([BW, BC], tl.float32)
    sa0, sa1, sa2, sb0, sb1, sb2, sc0, sc1, sc2, sums = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for part in range(tl.program_id(1), parts, tl.num_programs(1)):
        columns = (part // spans) * BW + tl.arange(0, BW)
        image = columns // width
        column = columns % width
        first = (part % spans) * span
        end = tl.minimum(first + span, rows)
        middle = (image < images)[:, None] & in_channels[None, :]
        left = middle & (column > 0)[:, None]
        right = middle & (column < width - 1)[:, None]
        x_at = first_row(X, image, column, channels, prefix, X_sb, X_sl)
        y_at = first_row(GRAD_Y, image, column, channels, prefix, Y_sb, Y_sl)
        g_at = first_row(GRAD, image, column, channels, prefix, G_sb, G_sl)
        alone = middle & (column == 0)[:, None] & (first == 0)
        for t in range(-prefix, 0):
            x = tl.load(x_at + t * X_sl, mask=alone, other=0.0).to(tl.float32)
            grad = tl.load(y_at + t * Y_sl, mask=alone, other=0.0).to(tl.float32)
            grad = through_silu(grad, offset + b1 * x, FAST)
            tl.store(g_at + t * G_sl, grad.to(GRAD.dtype.element_ty), mask=alone)
            sb1 += grad * x
            sums += grad
        X_step, Y_step, G_step = width * X_sl, width * Y_sl, width * G_sl
        x0, x1, x2 = load_row(x_at, first - 1, rows, X_step, X_sl, left, middle, right, FAST)
        y0, y1, y2 = load_row(x_at, first, rows, X_step, X_sl, left, middle, right, FAST)
        for row in range(first, end, 3):
            z0, z1, z2 = load_row(x_at, row + 1, rows, X_step, X_sl, left, middle, right, FAST)
            u0, u1, u2 = load_row(x_at, row + 2, rows, X_step, X_sl, left, middle, right, FAST)
            v0, v1, v2 = load_row(x_at, row + 3, rows, X_step, X_sl, left, middle, right, FAST)
            grad_y = floats(tl.load(y_at + row * Y_step, mask=middle, other=0.0), FAST)
            grad_z = floats(tl.load(y_at + (row + 1) * Y_step, mask=middle & (row + 1 < end), other=0.0), FAST)
            grad_u = floats(tl.load(y_at + (row + 2) * Y_step, mask=middle & (row + 2 < end), other=0.0), FAST)

            y = along(along(along(offset, a0, a1, a2, x0, x1, x2), b0, b1, b2, y0, y1, y2), c0, c1, c2, z0, z1, z2)
            grad = through_silu(grad_y, y, FAST)
            tl.store(g_at + row * G_step, grad.to(GRAD.dtype.element_ty), mask=middle)
            sums += grad
            sa0, sa1, sa2 = weighed(grad, sa0, sa1, sa2, x0, x1, x2)
            sb0, sb1, sb2 = weighed(grad, sb0, sb1, sb2, y0, y1, y2)
            sc0, sc1, sc2 = weighed(grad, sc0, sc1, sc2, z0, z1, z2)

            y = along(along(along(offset, a0, a1, a2, y0, y1, y2), b0, b1, b2, z0, z1, z2), c0, c1, c2, u0, u1, u2)
            grad = through_silu(grad_z, y, FAST)
            tl.store(g_at + (row + 1) * G_step, grad.to(GRAD.dtype.element_ty), mask=middle & (row + 1 < end))
            sums += grad
            sa0, sa1, sa2 = weighed(grad, sa0, sa1, sa2, y0, y1, y2)
            sb0, sb1, sb2 = weighed(grad, sb0, sb1, sb2, z0, z1, z2)
            sc0, sc1, sc2 = weighed(grad, sc0, sc1, sc2, u0, u1, u2)

            y = along(along(along(offset, a0, a1, a2, z0, z1, z2), b0, b1, b2, u0, u1, u2), c0, c1, c2, v0, v1, v2)
            grad = through_silu(grad_u, y, FAST)
            tl.store(g_at + (row + 2) * G_step, grad.to(GRAD.dtype.element_ty), mask=middle & (row + 2 < end))
            sums += grad
            sa0, sa1, sa2 = weighed(grad, sa0, sa1, sa2, z0, z1, z2)
            sb0, sb1, sb2 = weighed(grad, sb0, sb1, sb2, u0, u1, u2)
            sc0, sc1, sc2 = weighed(grad, sc0, sc1, sc2, v0, v1, v2)
            x0, x1, x2, y0, y1, y2 = u0, u1, u2, v0, v1, v2
    store_tap_sums(
        PART, sa0, sa1, sa2, sb0, sb1, sb2, sc0, sc1, sc2, sums, tl.program_id(1), channels, in_channels, CHANNELS
    )
