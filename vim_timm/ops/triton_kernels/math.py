"""Functions shared by the kernels: places of rows, and scalar ones on the special-function unit where there is one.

The `.approx.ftz` forms are one instruction each; `tl.exp2` and `1 / x` would add a rescue of denormals that a scan does
not need. `FAST` is false in Triton's interpreter, which knows no assembly.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def places(rows, channels, DIM: tl.constexpr):
    """Those of contiguous rows (count, DIM)."""
    return tl.cast(rows, tl.int64)[:, None] * DIM + channels[None, :]


@triton.jit
def exp2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            'lg2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            'rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + exp2(x * -LOG2E, FAST), FAST)


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + e^x), and x itself above 20 as in torch. A series below e^x = 0.1, where log2(1 + e) loses its digits."""
    e = exp2(x * LOG2E, FAST)
    large = log2(1.0 + e, FAST) * LN2
    small = e * (1.0 - e * (0.5 - e * (0.333333333 - e * (0.25 - e * (0.2 - e * 0.166666667)))))
    return tl.where(x > 20.0, x, tl.where(e < 0.1, small, large))
