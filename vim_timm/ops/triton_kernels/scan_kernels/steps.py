"""Steps of a scan: what the forward and the backward kernels do for one token or four."""

import triton
import triton.language as tl

from ...plain import reference
from .. import launch
from ..math import exp2, softplus

GROUP = tl.constexpr(launch.GROUP)
# Minus infinity times a step of 0 would be NaN, and so would the gradient of a step of 0 be where a larger number
# overflows.
FASTEST = tl.constexpr(reference.FASTEST)
RUNTIME = ['length', 'chunk', 'num_chunks', 'zero']  # arguments that kernels are not specialized for


@triton.jit
def load_row(X, offset, states, in_state, ALIGN: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """One token's vector of B or C as float32; ALIGN bytes divide its address (Triton cannot see that in a slice)."""
    row = tl.multiple_of(X + offset, ALIGN)
    if X.dtype.element_ty == tl.bfloat16 and ALIGN % 4 == 0 and N == NP:
        # Two numbers a word: a shift and a mask, where two conversions would take three instructions.
        half = tl.arange(0, NP // 2)
        words = tl.load(row.to(tl.pointer_type(tl.int32)) + half)
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), (NP,))
    else:
        return tl.load(row + states, mask=in_state, other=0.0).to(tl.float32)


@triton.jit
def within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE, as a constant where the blocks fill SIZE."""
    if SIZE % BLOCK == 0:
        return tl.full([BLOCK], 1, tl.int1)
    else:
        return index < SIZE


@triton.jit
def step_size(v, bias, ok, SOFTPLUS: tl.constexpr, FAST: tl.constexpr):
    """The discretisation step; 0, which leaves the state alone, beyond the end of the chunk."""
    v += bias
    if SOFTPLUS:
        v = softplus(v, FAST)
    return tl.where(ok, v, 0.0)


@triton.jit
def advance(h, d, u, b, a, FAST: tl.constexpr):
    return exp2(d[None, :] * a, FAST) * h + (d * u)[None, :] * b[:, None]
