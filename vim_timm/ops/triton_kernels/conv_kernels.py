"""Triton kernels of the short depthwise convolution, channels-last, both directions in one pass over the tokens.

A program owns ROWS tokens of BD channels. The W - 1 neighbours on either side are loaded as shifted tiles, which hit the
first-level cache, so that memory is read once. Everything is computed in float32.
"""
import triton
import triton.language as tl

from .math import sigmoid


@triton.jit
def load_tile(X, t, channels, length, X_sl, in_dim):
    """Tokens t of one batch entry as float32; zeros beyond both ends."""
    mask = ((t >= 0) & (t < length))[:, None] & in_dim[None, :]
    return tl.load(X + t.to(tl.int64)[:, None] * X_sl + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def convolve(X, weight, bias, t, channels, length, X_sl, in_dim,
             W: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Convolution before the activation at tokens t: weight[:, W - 1] meets the token itself."""
    y = tl.zeros([t.shape[0], channels.shape[0]], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + channels, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(W):
        shift = W - 1 - k if REVERSE else k + 1 - W
        tap = tl.load(weight + channels * W + k, mask=in_dim, other=0.0).to(tl.float32)
        y += load_tile(X, t + shift, channels, length, X_sl, in_dim) * tap[None, :]
    return y


@triton.jit
def store_tile(Y, y, t, channels, length, DIM: tl.constexpr, in_dim):
    mask = (t < length)[:, None] & in_dim[None, :]
    tl.store(Y + t.to(tl.int64)[:, None] * DIM + channels[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['length'])
def conv_forward(
        X, weight_f, weight_b, bias_f, bias_b, Y_f, Y_b, length, X_sb, X_sl,
        DIM: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
        TWO: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):
    """Y_f, Y_b (batch, L, DIM) contiguous from X (batch, L, DIM) of any row stride."""
    channels = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(2).to(tl.int64)
    in_dim = channels < DIM
    X += entry * X_sb
    y = convolve(X, weight_f, bias_f, t, channels, length, X_sl, in_dim, W, False, HAS_BIAS)
    if SILU:
        y *= sigmoid(y, FAST)
    store_tile(Y_f + entry * length * DIM, y, t, channels, length, DIM, in_dim)
    if TWO:
        y = convolve(X, weight_b, bias_b, t, channels, length, X_sl, in_dim, W, True, HAS_BIAS)
        if SILU:
            y *= sigmoid(y, FAST)
        store_tile(Y_b + entry * length * DIM, y, t, channels, length, DIM, in_dim)


@triton.jit
def grad_before_silu(X, weight, bias, GRAD, t, channels, length, X_sl, GRAD_sl, in_dim, W: tl.constexpr,
                     REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr):
    """The gradient of the convolution's own output at tokens t; zeros beyond both ends."""
    grad = load_tile(GRAD, t, channels, length, GRAD_sl, in_dim)
    if SILU:
        y = convolve(X, weight, bias, t, channels, length, X_sl, in_dim, W, REVERSE, HAS_BIAS)
        gate = sigmoid(y, FAST)
        grad *= gate * (1.0 + y * (1.0 - gate))
    return grad


@triton.jit
def conv_backward_direction(X, weight, bias, GRAD, PART, grad_x, t, channels, length, X_sl, GRAD_sl, in_dim,
                            DIM: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr,
                            SILU: tl.constexpr, FAST: tl.constexpr):
    """Adds this direction's share of the input's gradient to grad_x and stores the sums of its weight and bias."""
    for k in tl.static_range(W):
        shift = k + 1 - W if REVERSE else W - 1 - k
        tap = tl.load(weight + channels * W + k, mask=in_dim, other=0.0).to(tl.float32)
        grad = grad_before_silu(X, weight, bias, GRAD, t + shift, channels, length, X_sl, GRAD_sl, in_dim,
                                W, REVERSE, HAS_BIAS, SILU, FAST)
        grad_x += grad * tap[None, :]
    # Tap W - 1 came last and has shift 0, so `grad` is now the gradient at the tokens themselves.
    for k in tl.static_range(W):
        shift = W - 1 - k if REVERSE else k + 1 - W
        x = load_tile(X, t + shift, channels, length, X_sl, in_dim)
        tl.store(PART + k * DIM + channels, tl.sum(grad * x, 0), mask=in_dim)
    tl.store(PART + W * DIM + channels, tl.sum(grad, 0), mask=in_dim)
    return grad_x


@triton.jit(do_not_specialize=['length'])
def conv_backward(
        X, weight_f, weight_b, bias_f, bias_b, GRAD_f, GRAD_b, GRAD_X, PART,
        length, X_sb, X_sl, GRAD_sb, GRAD_sl,
        DIM: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
        TWO: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):
    """GRAD_X (batch, L, DIM); PART (batch, blocks of rows, directions, W + 1, DIM): sums for each tap and the bias."""
    channels = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(2).to(tl.int64)
    in_dim = channels < DIM
    X += entry * X_sb
    PART += (entry * tl.num_programs(1) + tl.program_id(1)) * ((2 if TWO else 1) * (W + 1) * DIM)
    grad_x = tl.zeros([ROWS, BD], tl.float32)
    grad_x = conv_backward_direction(
        X, weight_f, bias_f, GRAD_f + entry * GRAD_sb, PART, grad_x, t, channels, length, X_sl, GRAD_sl, in_dim,
        DIM, W, False, HAS_BIAS, SILU, FAST)
    if TWO:
        grad_x = conv_backward_direction(
            X, weight_b, bias_b, GRAD_b + entry * GRAD_sb, PART + (W + 1) * DIM, grad_x, t, channels, length, X_sl,
            GRAD_sl, in_dim, DIM, W, True, HAS_BIAS, SILU, FAST)
    store_tile(GRAD_X + entry * length * DIM, grad_x, t, channels, length, DIM, in_dim)
