"""Triton kernels of the short depthwise convolution, channels-last, both directions in one pass over the tokens.

A program walks over `chunk` tokens of BD channels with a window of rows in registers, so that every row is loaded once
and no intermediate is computed twice. Four taps always: a narrower convolution has zeros before its first tap. In the
backward direction tap k meets token t + 3 - k, in the forward direction t - 3 + k. All arithmetic is float32.
"""

import triton
import triton.language as tl

from .math import sigmoid


@triton.jit
def load_row(X, t, channels, length, X_sl, in_dim):
    """Token t of one batch entry as float32; zeros beyond both ends."""
    mask = in_dim & (t >= 0) & (t < length)
    return tl.load(X + tl.cast(t, tl.int64) * X_sl + channels, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_tap(weight, channels, in_dim, k: tl.constexpr, W: tl.constexpr):
    if k < 4 - W:
        return tl.zeros(channels.shape, tl.float32)
    else:
        return tl.load(weight + channels * W + (k - (4 - W)), mask=in_dim, other=0.0).to(tl.float32)


@triton.jit
def load_taps(weight, bias, channels, in_dim, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The four taps and the bias of one direction."""
    offset = tl.zeros(channels.shape, tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channels, mask=in_dim, other=0.0).to(tl.float32)
    return (
        load_tap(weight, channels, in_dim, 0, W),
        load_tap(weight, channels, in_dim, 1, W),
        load_tap(weight, channels, in_dim, 2, W),
        load_tap(weight, channels, in_dim, 3, W),
        offset,
    )


@triton.jit(do_not_specialize=['length', 'chunk'])
def conv_forward(
    X, weight_f, weight_b, bias_f, bias_b, Y_f, Y_b, length, chunk, X_sb, X_sl,
    DIM: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Y_f, Y_b (batch, L, DIM) contiguous from X (batch, L, DIM) of any row stride."""
    channels = tl.program_id(0) * BD + tl.arange(0, BD)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, length)
    entry = tl.program_id(2).to(tl.int64)
    in_dim = channels < DIM
    X += entry * X_sb
    Y_f += (entry * length + begin) * DIM
    Y_b += (entry * length + begin) * DIM
    f0, f1, f2, f3, f_bias = load_taps(weight_f, bias_f, channels, in_dim, W, HAS_BIAS)
    b0, b1, b2, b3, b_bias = load_taps(weight_b, bias_b, channels, in_dim, W, HAS_BIAS)
    # x0 to x6 are tokens t - 3 to t + 3; the next one is on its way while these are used.
    x0 = load_row(X, begin - 3, channels, length, X_sl, in_dim)
    x1 = load_row(X, begin - 2, channels, length, X_sl, in_dim)
    x2 = load_row(X, begin - 1, channels, length, X_sl, in_dim)
    x3 = load_row(X, begin, channels, length, X_sl, in_dim)
    x4 = load_row(X, begin + 1, channels, length, X_sl, in_dim)
    x5 = load_row(X, begin + 2, channels, length, X_sl, in_dim)
    x6 = load_row(X, begin + 3, channels, length, X_sl, in_dim)
    for t in range(begin, end):
        ahead = load_row(X, t + 4, channels, length, X_sl, in_dim)
        y = f_bias + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3
        if SILU:
            y *= sigmoid(y, FAST)
        tl.store(Y_f + channels, y.to(Y_f.dtype.element_ty), mask=in_dim)
        Y_f += DIM
        if TWO:
            y = b_bias + b0 * x6 + b1 * x5 + b2 * x4 + b3 * x3
            if SILU:
                y *= sigmoid(y, FAST)
            tl.store(Y_b + channels, y.to(Y_b.dtype.element_ty), mask=in_dim)
            Y_b += DIM
        x0, x1, x2, x3, x4, x5, x6 = x1, x2, x3, x4, x5, x6, ahead


@triton.jit
def through_silu(grad, y, SILU: tl.constexpr, FAST: tl.constexpr):
    """The gradient before the activation of y."""
    if SILU:
        gate = sigmoid(y, FAST)
        grad *= gate * (1.0 + y * (1.0 - gate))
    return grad


@triton.jit
def store_sums(PART, s0, s1, s2, s3, s_bias, channels, in_dim, DIM: tl.constexpr, W: tl.constexpr):
    """The sums of taps 4 - W to 3 and of the bias, (W + 1, DIM)."""
    if W >= 4:
        tl.store(PART + channels, s0, mask=in_dim)
    if W >= 3:
        tl.store(PART + (W - 3) * DIM + channels, s1, mask=in_dim)
    if W >= 2:
        tl.store(PART + (W - 2) * DIM + channels, s2, mask=in_dim)
    tl.store(PART + (W - 1) * DIM + channels, s3, mask=in_dim)
    tl.store(PART + W * DIM + channels, s_bias, mask=in_dim)


@triton.jit(do_not_specialize=['length', 'chunk'])
def conv_backward(
    X, weight_f, weight_b, bias_f, bias_b, GRAD_f, GRAD_b, GRAD_X, PART,
    length, chunk, X_sb, X_sl, GRAD_sb, GRAD_sl,
    DIM: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD_X (batch, L, DIM); PART (batch, chunks, directions, W + 1, DIM): sums for each tap and the bias.

    At token t the gradients of both directions' outputs before the activation are made (p for the forward direction, q
    for the backward one), and with them GRAD_X of token t - 3 is complete: p of t - 3 to t, q of t - 6 to t - 3.
    """
    channels = tl.program_id(0) * BD + tl.arange(0, BD)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, length)
    entry = tl.program_id(2).to(tl.int64)
    in_dim = channels < DIM
    X += entry * X_sb
    GRAD_f += entry * GRAD_sb
    GRAD_b += entry * GRAD_sb
    GRAD_X += entry * length * DIM
    PART += (entry * tl.num_programs(1) + tl.program_id(1)) * ((2 if TWO else 1) * (W + 1) * DIM)
    f0, f1, f2, f3, f_bias = load_taps(weight_f, bias_f, channels, in_dim, W, HAS_BIAS)
    b0, b1, b2, b3, b_bias = load_taps(weight_b, bias_b, channels, in_dim, W, HAS_BIAS)
    # Zeros from beyond the sequence: Triton 3.6 makes one of loop-carried values that start as the same constant.
    beyond = 2 * length
    p0 = load_row(X, beyond, channels, length, X_sl, in_dim)
    p1 = load_row(X, beyond + 1, channels, length, X_sl, in_dim)
    p2 = load_row(X, beyond + 2, channels, length, X_sl, in_dim)
    q0 = load_row(X, beyond + 3, channels, length, X_sl, in_dim)
    q1 = load_row(X, beyond + 4, channels, length, X_sl, in_dim)
    q2 = load_row(X, beyond + 5, channels, length, X_sl, in_dim)
    q3 = load_row(X, beyond + 6, channels, length, X_sl, in_dim)
    q4 = load_row(X, beyond + 7, channels, length, X_sl, in_dim)
    q5 = load_row(X, beyond + 8, channels, length, X_sl, in_dim)
    zero = tl.zeros([BD], tl.float32)
    sf0, sf1, sf2, sf3, sf = zero, zero, zero, zero, zero
    sb0, sb1, sb2, sb3, sb = zero, zero, zero, zero, zero
    first = begin - 3
    x0 = load_row(X, first - 3, channels, length, X_sl, in_dim)
    x1 = load_row(X, first - 2, channels, length, X_sl, in_dim)
    x2 = load_row(X, first - 1, channels, length, X_sl, in_dim)
    x3 = load_row(X, first, channels, length, X_sl, in_dim)
    x4 = load_row(X, first + 1, channels, length, X_sl, in_dim)
    x5 = load_row(X, first + 2, channels, length, X_sl, in_dim)
    x6 = load_row(X, first + 3, channels, length, X_sl, in_dim)
    grad_f = load_row(GRAD_f, first, channels, length, GRAD_sl, in_dim)
    grad_b = zero
    if TWO:
        grad_b = load_row(GRAD_b, first, channels, length, GRAD_sl, in_dim)
    for t in range(first, end + 3):
        ahead = load_row(X, t + 4, channels, length, X_sl, in_dim)
        next_f = load_row(GRAD_f, t + 1, channels, length, GRAD_sl, in_dim)
        own = tl.where((t >= begin) & (t < end), 1.0, 0.0)
        p3 = through_silu(grad_f, f_bias + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, SILU, FAST)
        grad_x = f3 * p0 + f2 * p1 + f1 * p2 + f0 * p3
        p = p3 * own
        sf0 += p * x0
        sf1 += p * x1
        sf2 += p * x2
        sf3 += p * x3
        sf += p
        p0, p1, p2 = p1, p2, p3
        grad_f = next_f
        if TWO:
            next_b = load_row(GRAD_b, t + 1, channels, length, GRAD_sl, in_dim)
            q6 = through_silu(grad_b, b_bias + b0 * x6 + b1 * x5 + b2 * x4 + b3 * x3, SILU, FAST)
            grad_x += b0 * q0 + b1 * q1 + b2 * q2 + b3 * q3
            q = q6 * own
            sb0 += q * x6
            sb1 += q * x5
            sb2 += q * x4
            sb3 += q * x3
            sb += q
            q0, q1, q2, q3, q4, q5 = q1, q2, q3, q4, q5, q6
            grad_b = next_b
        done = in_dim & (t - 3 >= begin)
        tl.store(GRAD_X + tl.cast(t - 3, tl.int64) * DIM + channels, grad_x.to(GRAD_X.dtype.element_ty), mask=done)
        x0, x1, x2, x3, x4, x5, x6 = x1, x2, x3, x4, x5, x6, ahead
    store_sums(PART, sf0, sf1, sf2, sf3, sf, channels, in_dim, DIM, W)
    if TWO:
        store_sums(PART + (W + 1) * DIM, sb0, sb1, sb2, sb3, sb, channels, in_dim, DIM, W)
