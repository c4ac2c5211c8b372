"""Triton kernels of SiLU(a) b and its gradients, elements of rows of [a, b]. All arithmetic is float32."""

import triton
import triton.language as tl

from .math import sigmoid


@triton.jit(do_not_specialize=['count'])
def swiglu(AB, OUT, count, DIM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr):
    """AB (count, 2 DIM), OUT (count, DIM), both contiguous."""
    rows = tl.cast(tl.program_id(0) * BR + tl.arange(0, BR), tl.int64)[:, None]
    channels = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    mask = (rows < count) & (channels < DIM)
    a = tl.load(AB + rows * (2 * DIM) + channels, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(AB + rows * (2 * DIM) + DIM + channels, mask=mask, other=0.0).to(tl.float32)
    out = a * sigmoid(a, FAST) * b
    tl.store(OUT + rows * DIM + channels, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['count', 'span'])
def swiglu_backward(
    AB, GRAD, PART, count, span,
    DIM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients take the place of AB (count, 2 DIM), and the output that of its gradient, GRAD (count, DIM). PART
    (programs, 2 DIM): sums of the former over a program's rows."""
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    first = tl.program_id(0) * span
    sums_a, sums_b = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
    for start in range(first, tl.minimum(first + span, count), BR):
        rows = start + tl.arange(0, BR)
        mask = (rows < tl.minimum(first + span, count))[:, None] & (channels < DIM)[None, :]
        row = tl.cast(rows, tl.int64)[:, None] * DIM
        at_a = 2 * row + channels[None, :]
        a = tl.load(AB + at_a, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(AB + at_a + DIM, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + row + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(a, FAST)
        grad_a = grad * b * (gate * (1.0 + a * (1.0 - gate)))
        grad_b = grad * (a * gate)
        sums_a += grad_a
        sums_b += grad_b
        tl.store(AB + at_a, grad_a.to(AB.dtype.element_ty), mask=mask)
        tl.store(AB + at_a + DIM, grad_b.to(AB.dtype.element_ty), mask=mask)
        tl.store(GRAD + row + channels[None, :], (a * gate * b).to(GRAD.dtype.element_ty), mask=mask)
    part = PART + tl.program_id(0) * (2 * DIM) + channels
    tl.store(part, tl.sum(sums_a, 0), mask=channels < DIM)
    tl.store(part + DIM, tl.sum(sums_b, 0), mask=channels < DIM)
