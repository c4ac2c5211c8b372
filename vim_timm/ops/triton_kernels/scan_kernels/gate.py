"""The gate over both directions' outputs, and its gradients."""

import triton
import triton.language as tl

from ..math import sigmoid


@triton.jit(do_not_specialize=['rows', 'length'])
def gate_forward(
    Y, Z, OUT, rows, length, scale, Z_sb, Z_sl,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TWO: tl.constexpr, HAS_Z: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """OUT = scale * SiLU(Z) * (Y of both directions); Y (cells, L, DIM), Z (batch, L, DIM) of any row stride."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = rows.to(tl.int64) * DIM
    mask = index < total
    y = tl.load(Y + index, mask=mask, other=0.0).to(tl.float32)
    if TWO:
        y += tl.load(Y + total + index, mask=mask, other=0.0).to(tl.float32)
    y *= scale
    if HAS_Z:
        row = index // DIM
        offset = (row // length) * Z_sb + (row % length) * Z_sl + index % DIM
        z = tl.load(Z + offset, mask=mask, other=0.0).to(tl.float32)
        y *= z * sigmoid(z, FAST)
    tl.store(OUT + index, y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows', 'length'])
def gate_backward(
    GRAD, Y, Z, GRAD_Y, GRAD_Z, rows, length, scale, Z_sb, Z_sl,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TWO: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD_Y = GRAD * scale * SiLU(Z), GRAD_Z = GRAD * scale * (Y of both directions) * SiLU'(Z)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = rows.to(tl.int64) * DIM
    mask = index < total
    row = index // DIM
    offset = (row // length) * Z_sb + (row % length) * Z_sl + index % DIM
    z = tl.load(Z + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + index, mask=mask, other=0.0).to(tl.float32) * scale
    y = tl.load(Y + index, mask=mask, other=0.0).to(tl.float32)
    if TWO:
        y += tl.load(Y + total + index, mask=mask, other=0.0).to(tl.float32)
    gate = sigmoid(z, FAST)
    tl.store(GRAD_Y + index, (grad * z * gate).to(GRAD_Y.dtype.element_ty), mask=mask)
    tl.store(GRAD_Z + index, (grad * y * gate * (1.0 + z * (1.0 - gate))).to(GRAD_Z.dtype.element_ty), mask=mask)
