"""Triton kernels of the depthwise 3x3 convolution at the visible patches of masked images, with SiLU.

Tokens stand before the grid or on it; a table says of each which token, if any, every tap of the kernel meets, so that
time goes with the visible patches and no image of zeros exists. Tokens of all images are numbered through. All
arithmetic is float32. Strides of images and rows come in units of ALIGN numbers, as in `grid_conv_kernels`.
"""

import triton
import triton.language as tl

from .grid_conv_kernels import along, floats, load_taps, silu, store_tap_sums, through_silu, weighed

ORDER = tl.constexpr(9)  # the program behind those of the taps


@triton.jit
def load_places(KEEP, i, kept, stride, cells):
    """Cells of the grid of visible patches i, -1 for none and for what is outside the grid."""
    place = tl.load(KEEP + i * stride, mask=(i >= 0) & (i < kept), other=-1)
    return tl.where((place >= 0) & (place < cells), place, -1).to(tl.int32)


@triton.jit(do_not_specialize=['length', 'prefix', 'height', 'width', 'KEEP_sb'])
def masked_places(
    KEEP, NEIGHBOURS, length, prefix, height, width, KEEP_sb, KEEP_sl, BT: tl.constexpr, BU: tl.constexpr
):
    """NEIGHBOURS (10, batch, L) int32: the tokens that nine taps meet or -1, and the tokens by columns of their image,
    from KEEP (batch, L - prefix): cells of the tokens behind `prefix` others, which meet the middle tap alone and keep
    their place.

    Of tokens in one cell the last is met, and a token that is not its own neighbour is a mistake; the order by columns
    is a permutation whatever KEEP holds.
    """
    job = tl.program_id(1)
    entry = tl.program_id(2).to(tl.int64)
    KEEP += entry * KEEP_sb
    NEIGHBOURS += (job * tl.num_programs(2) + entry) * length
    cells, kept = height * width, length - prefix
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    place = load_places(KEEP, t - prefix, kept, KEEP_sl, cells)
    row, column = place // width, place % width
    if job == ORDER:
        key = tl.where(place < 0, cells, column * height + row)
        rank = tl.zeros([BT], tl.int32)
        for first in range(0, kept, BU):
            u = first + tl.arange(0, BU)
            other = load_places(KEEP, u, kept, KEEP_sl, cells)
            other_key = tl.where(other < 0, cells, other % width * height + other // width)[None, :]
            tie = (other_key == key[:, None]) & (u[None, :] < (t - prefix)[:, None])
            earlier = ((other_key < key[:, None]) | tie) & (u < kept)[None, :]
            rank += tl.sum(earlier.to(tl.int32), 1)
        tl.store(NEIGHBOURS + tl.where(t < prefix, t, prefix + rank), t, mask=t < length)
    else:
        row += job // 3 - 1
        column += job % 3 - 1
        inside = (place >= 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        wanted = tl.where(inside, row * width + column, -2)
        found = tl.where((t < prefix) & (job == 4), t, -1)
        for first in range(0, kept, BU):
            u = first + tl.arange(0, BU)
            same = load_places(KEEP, u, kept, KEEP_sl, cells)[None, :] == wanted[:, None]
            found = tl.maximum(found, tl.max(tl.where(same, (prefix + u)[None, :], -1), 1))
        tl.store(NEIGHBOURS + t, found, mask=t < length)


@triton.jit
def load_neighbour(X, NEXT, inside, channels, in_channels, stride, FAST: tl.constexpr):
    """Rows of the tokens in NEXT, zeros where there are none."""
    token = tl.load(NEXT, mask=inside, other=-1)
    at = X + (token * stride)[:, None] + channels[None, :]
    return floats(tl.load(at, mask=(token >= 0)[:, None] & in_channels[None, :], other=0.0), FAST)


@triton.jit
def load_neighbours(X, NEXT, step, inside, channels, in_channels, stride, row: tl.constexpr, FAST: tl.constexpr):
    """Rows of the tokens that the three taps of one row of the kernel meet."""
    NEXT += 3 * row * step
    return (
        load_neighbour(X, NEXT, inside, channels, in_channels, stride, FAST),
        load_neighbour(X, NEXT + step, inside, channels, in_channels, stride, FAST),
        load_neighbour(X, NEXT + 2 * step, inside, channels, in_channels, stride, FAST),
    )


SIZES = ['count', 'length', 'X_sb', 'X_sl', 'Y_sb', 'Y_sl']


@triton.jit(do_not_specialize=SIZES)
def masked_conv(
    X, weight, bias, NEIGHBOURS, Y, count, length, X_sb, X_sl, Y_sb, Y_sl,
    CHANNELS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, FLIP: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Y (batch, L, CHANNELS) from X (batch, L, CHANNELS), `count` tokens of L = `length`. FLIP turns the kernel by 180
    degrees. A token that is not its own neighbour is NaN."""
    X_sb = tl.cast(X_sb, tl.int64) * ALIGN
    X_sl = tl.cast(X_sl, tl.int64) * ALIGN
    Y_sb = tl.cast(Y_sb, tl.int64) * ALIGN
    Y_sl = tl.cast(Y_sl, tl.int64) * ALIGN
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    in_channels = channels < CHANNELS
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = tokens < count
    image, token = tokens // length, tokens % length
    x_at = X + (image * X_sb)[:, None]
    next_at = NEIGHBOURS + tokens
    a0, a1, a2 = load_taps(weight, channels, in_channels, 0, FLIP)
    b0, b1, b2 = load_taps(weight, channels, in_channels, 1, FLIP)
    c0, c1, c2 = load_taps(weight, channels, in_channels, 2, FLIP)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    x0, x1, x2 = load_neighbours(x_at, next_at, count, inside, channels, in_channels, X_sl, 0, FAST)
    y0, y1, y2 = load_neighbours(x_at, next_at, count, inside, channels, in_channels, X_sl, 1, FAST)
    z0, z1, z2 = load_neighbours(x_at, next_at, count, inside, channels, in_channels, X_sl, 2, FAST)
    y = along(along(along(offset, a0, a1, a2, x0, x1, x2), b0, b1, b2, y0, y1, y2), c0, c1, c2, z0, z1, z2)
    own = tl.load(next_at + 4 * count, mask=inside, other=-1)
    y = tl.where((own == token)[:, None], silu(y, SILU, FAST), float('nan'))
    to = Y + (image * Y_sb + token * Y_sl)[:, None] + channels[None, :]
    tl.store(to, y.to(Y.dtype.element_ty), mask=inside[:, None] & in_channels[None, :])


@triton.jit(do_not_specialize=[*SIZES, 'G_sb', 'G_sl'])
def masked_conv_gradients(
    X, weight, bias, NEIGHBOURS, GRAD_Y, GRAD, PART, count, length, X_sb, X_sl, Y_sb, Y_sl, G_sb, G_sl,
    CHANNELS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD (batch, L, CHANNELS), the gradient before the activation, and PART (programs, 10, CHANNELS): sums for each
    tap and the bias. A program takes one block of BT tokens after another."""
    X_sb = tl.cast(X_sb, tl.int64) * ALIGN
    X_sl = tl.cast(X_sl, tl.int64) * ALIGN
    Y_sb = tl.cast(Y_sb, tl.int64) * ALIGN
    Y_sl = tl.cast(Y_sl, tl.int64) * ALIGN
    G_sb = tl.cast(G_sb, tl.int64) * ALIGN
    G_sl = tl.cast(G_sl, tl.int64) * ALIGN
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    in_channels = channels < CHANNELS
    a0, a1, a2 = load_taps(weight, channels, in_channels, 0, False)
    b0, b1, b2 = load_taps(weight, channels, in_channels, 1, False)
    c0, c1, c2 = load_taps(weight, channels, in_channels, 2, False)
    offset = tl.zeros([1, BC], tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    zero = tl.zeros([BT, BC], tl.float32)
    sa0, sa1, sa2, sb0, sb1, sb2, sc0, sc1, sc2, sums = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for block in range(tl.program_id(0), tl.cdiv(count, BT), tl.num_programs(0)):
        tokens = block * BT + tl.arange(0, BT)
        inside = tokens < count
        image, token = tokens // length, tokens % length
        mask = inside[:, None] & in_channels[None, :]
        x_at = X + (image * X_sb)[:, None]
        next_at = NEIGHBOURS + tokens
        x0, x1, x2 = load_neighbours(x_at, next_at, count, inside, channels, in_channels, X_sl, 0, FAST)
        y0, y1, y2 = load_neighbours(x_at, next_at, count, inside, channels, in_channels, X_sl, 1, FAST)
        z0, z1, z2 = load_neighbours(x_at, next_at, count, inside, channels, in_channels, X_sl, 2, FAST)
        grad_at = GRAD_Y + (image * Y_sb + token * Y_sl)[:, None] + channels[None, :]
        grad_y = floats(tl.load(grad_at, mask=mask, other=0.0), FAST)
        y = along(along(along(offset, a0, a1, a2, x0, x1, x2), b0, b1, b2, y0, y1, y2), c0, c1, c2, z0, z1, z2)
        grad = through_silu(grad_y, y, FAST)
        to = GRAD + (image * G_sb + token * G_sl)[:, None] + channels[None, :]
        tl.store(to, grad.to(GRAD.dtype.element_ty), mask=mask)
        sums += grad
        sa0, sa1, sa2 = weighed(grad, sa0, sa1, sa2, x0, x1, x2)
        sb0, sb1, sb2 = weighed(grad, sb0, sb1, sb2, y0, y1, y2)
        sc0, sc1, sc2 = weighed(grad, sc0, sc1, sc2, z0, z1, z2)
    store_tap_sums(
        PART, sa0, sa1, sa2, sb0, sb1, sb2, sc0, sc1, sc2, sums, tl.program_id(0), channels, in_channels, CHANNELS
    )
