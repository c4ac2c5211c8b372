"""Triton kernels of a sum and its RMSNorm, rows of channels at a time. All arithmetic is float32."""

import triton
import triton.language as tl

from .math import places


@triton.jit(do_not_specialize=['count'])
def add_norm(
    X, Y, weight, SUM, OUT, count, eps, DIM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, HAS_Y: tl.constexpr
):
    """SUM = X + Y, and OUT its norm; X's norm without Y, and SUM is not written. All are (count, DIM) contiguous."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    channels = tl.arange(0, BD)
    mask = (rows < count)[:, None] & (channels < DIM)[None, :]
    at = places(rows, channels, DIM)
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_Y:
        x += tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(SUM.dtype.element_ty)
        tl.store(SUM + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    w = tl.load(weight + channels, mask=channels < DIM, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
    tl.store(OUT + at, (x * scale * w).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def load_operands(
    SUM, GRAD_OUT, GRAD_SUM, rows, end, channels, DIM: tl.constexpr, HAS_GRAD_SUM: tl.constexpr
):  # fmt: skip
    """Rows of the sum, of its norm's gradient and of its own, as they are; zeros from `end` on."""
    mask = (rows < end)[:, None] & (channels < DIM)[None, :]
    at = places(rows, channels, DIM)
    x = tl.load(SUM + at, mask=mask, other=0.0)
    grad = tl.load(GRAD_OUT + at, mask=mask, other=0.0)
    of_sum = x
    if HAS_GRAD_SUM:
        of_sum = tl.load(GRAD_SUM + at, mask=mask, other=0.0)
    return x, grad, of_sum


@triton.jit(do_not_specialize=['count', 'span'])
def add_norm_backward(
    SUM, weight, GRAD_SUM, GRAD_OUT, GRAD_X, GRAD_Y, PART, count, span, eps,
    DIM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, HAS_GRAD_SUM: tl.constexpr, HAS_GRAD_Y: tl.constexpr,
):  # fmt: skip
    """GRAD_X for those of the sum and of its norm, also in GRAD_Y's dtype; PART (programs, DIM): sums for the weight.
    All others are (count, DIM) contiguous. The next rows are on their way while some are computed."""
    channels = tl.arange(0, BD)
    w = tl.load(weight + channels, mask=channels < DIM, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(0) * span
    end = tl.minimum(first + span, count)
    sums = tl.zeros([BR, BD], tl.float32)
    rows = first + tl.arange(0, BR)
    next_x, next_grad, next_of_sum = load_operands(SUM, GRAD_OUT, GRAD_SUM, rows, end, channels, DIM, HAS_GRAD_SUM)
    for start in range(first, end, BR):
        rows = start + tl.arange(0, BR)
        x, grad, of_sum = next_x.to(tl.float32), next_grad.to(tl.float32), next_of_sum.to(tl.float32)
        next_x, next_grad, next_of_sum = load_operands(
            SUM, GRAD_OUT, GRAD_SUM, rows + BR, end, channels, DIM, HAS_GRAD_SUM
        )
        at = places(rows, channels, DIM)
        inside = rows < end
        mask = inside[:, None] & (channels < DIM)[None, :]
        # an eps of 0 would make NaN of rows beyond the last, which sums hold too
        scale = tl.where(inside, tl.rsqrt(tl.sum(x * x, 1) / DIM + eps), 0.0)[:, None]
        x *= scale
        sums += grad * x
        grad *= w
        grad = scale * (grad - x * (tl.sum(grad * x, 1) / DIM)[:, None])
        if HAS_GRAD_SUM:
            grad += of_sum
        tl.store(GRAD_X + at, grad.to(GRAD_X.dtype.element_ty), mask=mask)
        if HAS_GRAD_Y:
            tl.store(GRAD_Y + at, grad.to(GRAD_Y.dtype.element_ty), mask=mask)
    tl.store(PART + tl.program_id(0) * DIM + channels, tl.sum(sums, 0), mask=channels < DIM)
