"""Triton kernels of RMSNorm(y) * SiLU(z), rows of channels at a time. All arithmetic is float32.

Strides of images and rows come in units of ALIGN numbers, as in `grid_conv_kernels`.
"""

import triton
import triton.language as tl

from .math import places, sigmoid


@triton.jit
def addresses(X, rows, channels, length, X_sb, X_sl, ALIGN: tl.constexpr):
    """Those of rows of X (batch, L, D), of any strides, numbered over batch and tokens."""
    at = tl.cast(rows // length, tl.int64) * X_sb + tl.cast(rows % length, tl.int64) * X_sl
    return X + (at * ALIGN)[:, None] + channels[None, :]


@triton.jit
def load_rows(X, rows, channels, mask, length, X_sb, X_sl, ALIGN: tl.constexpr):
    """Rows of X, as they are."""
    return tl.load(addresses(X, rows, channels, length, X_sb, X_sl, ALIGN), mask=mask, other=0.0)


@triton.jit(do_not_specialize=['count', 'length'])
def gated_norm(
    Y, Z, weight, OUT, count, length, eps, Y_sb, Y_sl, Z_sb, Z_sl,
    DIM: tl.constexpr, ALIGN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """OUT (count, DIM) contiguous."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    channels = tl.arange(0, BD)
    mask = (rows < count)[:, None] & (channels < DIM)[None, :]
    y = load_rows(Y, rows, channels, mask, length, Y_sb, Y_sl, ALIGN).to(tl.float32)
    z = load_rows(Z, rows, channels, mask, length, Z_sb, Z_sl, ALIGN).to(tl.float32)
    w = tl.load(weight + channels, mask=channels < DIM, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(y * y, 1) / DIM + eps)[:, None]
    out = y * scale * w * (z * sigmoid(z, FAST))
    tl.store(OUT + places(rows, channels, DIM), out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def load_operands(
    Y, Z, GRAD, rows, end, channels, length, Y_sb, Y_sl, Z_sb, Z_sl, DIM: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Rows of y, z and the gradient, as they are; zeros from `end` on."""
    mask = (rows < end)[:, None] & (channels < DIM)[None, :]
    y = load_rows(Y, rows, channels, mask, length, Y_sb, Y_sl, ALIGN)
    z = load_rows(Z, rows, channels, mask, length, Z_sb, Z_sl, ALIGN)
    return y, z, tl.load(GRAD + places(rows, channels, DIM), mask=mask, other=0.0)


@triton.jit(do_not_specialize=['count', 'length', 'span'])
def gated_norm_backward(
    Y, Z, weight, GRAD, GRAD_Y, GRAD_Z, PART, count, length, span, eps, Y_sb, Y_sl, Z_sb, Z_sl, G_sb, G_sl,
    DIM: tl.constexpr, ALIGN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, AGAIN: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """GRAD, GRAD_Y (count, DIM) contiguous, GRAD_Z with strides G, PART (programs, DIM): sums for the weight.
    AGAIN puts the output in the place of its gradient. The next rows are on their way while some are computed."""
    channels = tl.arange(0, BD)
    w = tl.load(weight + channels, mask=channels < DIM, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(0) * span
    end = tl.minimum(first + span, count)
    sums = tl.zeros([BR, BD], tl.float32)
    rows = first + tl.arange(0, BR)
    next_y, next_z, next_grad = load_operands(
        Y, Z, GRAD, rows, end, channels, length, Y_sb, Y_sl, Z_sb, Z_sl, DIM, ALIGN
    )
    for start in range(first, end, BR):
        rows = start + tl.arange(0, BR)
        y, z, grad = next_y.to(tl.float32), next_z.to(tl.float32), next_grad.to(tl.float32)
        next_y, next_z, next_grad = load_operands(
            Y, Z, GRAD, rows + BR, end, channels, length, Y_sb, Y_sl, Z_sb, Z_sl, DIM, ALIGN
        )
        inside = rows < end
        mask = inside[:, None] & (channels < DIM)[None, :]
        at = places(rows, channels, DIM)
        # an eps of 0 would make NaN of rows beyond the last, which sums hold too
        scale = tl.where(inside, tl.rsqrt(tl.sum(y * y, 1) / DIM + eps), 0.0)[:, None]
        gate = sigmoid(z, FAST)
        y *= scale
        through_gate = grad * (z * gate)
        sums += through_gate * y
        grad_y = through_gate * w
        grad_y = scale * (grad_y - y * (tl.sum(grad_y * y, 1) / DIM)[:, None])
        tl.store(GRAD_Y + at, grad_y.to(GRAD_Y.dtype.element_ty), mask=mask)
        grad_z = grad * y * w * (gate * (1.0 + z * (1.0 - gate)))
        to = addresses(GRAD_Z, rows, channels, length, G_sb, G_sl, ALIGN)
        tl.store(to, grad_z.to(GRAD_Z.dtype.element_ty), mask=mask)
        if AGAIN:
            tl.store(GRAD + at, (y * w * (z * gate)).to(GRAD.dtype.element_ty), mask=mask)
    tl.store(PART + tl.program_id(0) * DIM + channels, tl.sum(sums, 0), mask=channels < DIM)
