"""Triton kernels from projected step sizes to dt and s = cumsum(dt exp(A_log)) in every order of tokens, and back."""

import triton
import triton.language as tl

from ..plain import reference, ssd
from .math import LOG2E, exp2, sigmoid, softplus

MOST_GROWTH = tl.constexpr(ssd.MOST_GROWTH)
LARGEST_LOG = tl.constexpr(reference.LARGEST_LOG)


@triton.jit
def visited(VISITS, t, length, by_columns, prefix, height, width, TABLE: tl.constexpr):
    """The tokens visited at times t: as they stand, or by columns of the grid behind `prefix` tokens or in VISITS."""
    if TABLE:
        tokens = tl.load(VISITS + t, mask=(t < length) & by_columns, other=0)
    else:
        cell = t - prefix
        tokens = tl.where(cell < 0, t, prefix + (cell % height) * width + cell // height)
    return tl.where(by_columns, tokens, t)


@triton.jit
def moving(MOVES, tokens, inside, prefix, HAS_MOVES: tl.constexpr):
    """1 for tokens at which states decay, 0 for prefix tokens: the first ones, or as MOVES says."""
    if HAS_MOVES:
        return tl.load(MOVES + tokens, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.where(tokens < prefix, 0.0, 1.0)


@triton.jit
def load_rate(A_LOG, h, in_heads, FAST: tl.constexpr):
    """exp(A_log), finite as in `plain.ssd.decays`."""
    A_log = tl.load(A_LOG + h, mask=in_heads, other=0.0).to(tl.float32)
    return exp2(tl.where(A_log > LARGEST_LOG, LARGEST_LOG, A_log) * LOG2E, FAST)


@triton.jit(do_not_specialize=['length', 'heads', 'prefix', 'height', 'width', 'span'])
def decay_forward(
    RAW, BIAS, A_LOG, VISITS, MOVES, DT, S, length, heads, prefix, height, width, span, RAW_sb, RAW_sl, VISITS_sb,
    HAS_BIAS: tl.constexpr, TABLE: tl.constexpr, HAS_MOVES: tl.constexpr, FIRST_COLUMNS: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """DT (batch, H, L) and S (batch, orders, H, L), times log2(e), from RAW (batch, L, H) of any row stride.

    A program takes `span` tokens, with which s begins anew.
    """
    order, orders = tl.program_id(0), tl.num_programs(0)
    entry = tl.program_id(1).to(tl.int64)
    h = tl.arange(0, BH)[None, :]
    RAW += entry * RAW_sb
    VISITS += entry * VISITS_sb
    DT += entry * heads * length
    S += (entry * orders + order) * heads * length
    in_heads = h < heads
    rate = load_rate(A_LOG + order * heads, h, in_heads, FAST)
    bias = tl.zeros([1, BH], tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + h, mask=in_heads, other=0.0).to(tl.float32)
    before = tl.zeros([BH], tl.float32)
    first = tl.program_id(2) * span
    for start in range(first, tl.minimum(first + span, length), BT):
        t = start + tl.arange(0, BT)
        by_columns = (order > 0) | FIRST_COLUMNS
        token = visited(VISITS, t, length, by_columns, prefix, height, width, TABLE)[:, None]
        mask = (t[:, None] < length) & in_heads
        raw = tl.load(RAW + tl.cast(token, tl.int64) * RAW_sl + h, mask=mask, other=0.0).to(tl.float32)
        dt = tl.where(mask, softplus(raw + bias, FAST), 0.0)
        growth = dt * rate
        growth = tl.where(growth > MOST_GROWTH, MOST_GROWTH, growth) * LOG2E
        growth *= moving(MOVES, token, t[:, None] < length, prefix, HAS_MOVES)
        s = tl.cumsum(growth, 0) + before[None, :]
        before += tl.sum(growth, 0)
        tl.store(S + h * length + token, s, mask=mask)
        tl.store(DT + h * length + token, dt, mask=mask & (order == 0))


@triton.jit
def load_grad_s(EDGES, ROWS, at, mask, blocks, step):
    """Gradients of s at one order's (H, L) addresses: the edges of a token as j less those as i, summed over blocks."""
    grad = tl.load(EDGES + at, mask=mask, other=0.0)
    for block in range(blocks):
        grad -= tl.load(ROWS + block * step + at, mask=mask, other=0.0)
    return grad


@triton.jit(do_not_specialize=['length', 'heads', 'columns', 'blocks', 'prefix', 'height', 'width'])
def decay_backward(
    RAW, BIAS, A_LOG, VISITS, MOVES, DT, GRAD_DT, EDGES, ROWS, GRAD_RAW, PART_A, PART_BIAS,
    length, heads, columns, blocks, prefix, height, width, RAW_sb, RAW_sl, VISITS_sb, GRAD_sb, GRAD_sl,
    HAS_BIAS: tl.constexpr, TABLE: tl.constexpr, HAS_MOVES: tl.constexpr, FIRST_COLUMNS: tl.constexpr,
    ORDERS: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD_RAW (batch, L, columns) of any row stride, zeros behind its H columns. PART_A (batch, orders, H), PART_BIAS
    (batch, H).

    The second order's share of a step's gradient passes through EDGES, which it overwrites, to the tokens' own order.
    """
    entry, entries = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    h = tl.arange(0, BH)[None, :]
    in_heads = h < heads
    size = heads * length
    RAW += entry * RAW_sb
    GRAD_RAW += entry * GRAD_sb
    VISITS += entry * VISITS_sb
    DT += entry * size
    GRAD_DT += entry * size
    EDGES += entry * ORDERS * size
    ROWS += entry * ORDERS * size
    step = entries.to(tl.int64) * ORDERS * size
    bias = tl.zeros([1, BH], tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + h, mask=in_heads, other=0.0).to(tl.float32)
    spans = tl.cdiv(length, BT)
    grad_bias = tl.zeros([BH], tl.float32)
    for order in tl.static_range(ORDERS - 1, -1, -1):
        rate = load_rate(A_LOG + order * heads, h, in_heads, FAST)
        after = tl.zeros([BH], tl.float32)
        grad_A = tl.zeros([BH], tl.float32)
        for span in range(spans):
            t = (spans - 1 - span) * BT + tl.arange(0, BT)
            by_columns = FIRST_COLUMNS if order == 0 else True
            token = visited(VISITS, t, length, by_columns, prefix, height, width, TABLE)[:, None]
            mask = (t[:, None] < length) & in_heads
            at = h * length + token
            grad_s = load_grad_s(EDGES + order * size, ROWS + order * size, at, mask, blocks, step)
            dt = tl.load(DT + at, mask=mask, other=0.0)
            grad = (tl.cumsum(grad_s, 0, reverse=True) + after[None, :]) * rate
            after += tl.sum(grad_s, 0)
            grad *= moving(MOVES, token, t[:, None] < length, prefix, HAS_MOVES)
            grad = tl.where(dt * rate > MOST_GROWTH, 0.0, grad)
            grad_A += tl.sum(grad * dt, 0)
            if order > 0:
                tl.store(EDGES + order * size + at, grad, mask=mask)
            else:
                grad += tl.load(GRAD_DT + at, mask=mask, other=0.0)
                if ORDERS > 1:
                    grad += tl.load(EDGES + size + at, mask=mask, other=0.0)
                raw = tl.load(RAW + tl.cast(token, tl.int64) * RAW_sl + h, mask=mask, other=0.0).to(tl.float32)
                grad = tl.where(mask, grad * sigmoid(raw + bias, FAST), 0.0)
                grad_bias += tl.sum(grad, 0)
                to = GRAD_RAW + tl.cast(token, tl.int64) * GRAD_sl + h
                tl.store(to, grad.to(GRAD_RAW.dtype.element_ty), mask=(t[:, None] < length) & (h < columns))
        tl.store(PART_A + (entry * ORDERS + order) * heads + tl.arange(0, BH), grad_A, mask=tl.arange(0, BH) < heads)
        tl.debug_barrier()
    tl.store(PART_BIAS + entry * heads + tl.arange(0, BH), grad_bias, mask=tl.arange(0, BH) < heads)


@triton.jit(do_not_specialize=['length', 'heads', 'columns', 'prefix'])
def step_gradients(
    RAW, BIAS, A_LOG, MOVES, DT, GRAD_DT, GRAD_L, GRAD_RAW, PART_A, PART_BIAS,
    length, heads, columns, prefix, RAW_sb, RAW_sl, GRAD_sb, GRAD_sl,
    HAS_BIAS: tl.constexpr, HAS_MOVES: tl.constexpr, ORDERS: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Results as of `decay_backward`, from GRAD_L (batch, orders, H, L), gradients of what tokens add to s: no token
    needs another. PART_A (batch, programs, orders, H), PART_BIAS (batch, programs, H)."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    entry = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    h = tl.arange(0, BH)[None, :]
    in_heads = tl.arange(0, BH) < heads
    mask = (token < length) & (h < heads)
    at = entry * heads * length + h * length + token
    bias = tl.zeros([1, BH], tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + h, mask=h < heads, other=0.0).to(tl.float32)
    grad = tl.load(GRAD_DT + at, mask=mask, other=0.0)
    dt = tl.load(DT + at, mask=mask, other=0.0)
    moves = moving(MOVES, token, token < length, prefix, HAS_MOVES)
    GRAD_L += entry * (ORDERS - 1) * heads * length
    for order in tl.static_range(ORDERS):
        rate = load_rate(A_LOG + order * heads, h, h < heads, FAST)
        of_order = tl.load(GRAD_L + order * heads * length + at, mask=mask, other=0.0) * rate * moves
        of_order = tl.where(dt * rate > MOST_GROWTH, 0.0, of_order)
        part = PART_A + (program * ORDERS + order) * heads + tl.arange(0, BH)
        tl.store(part, tl.sum(of_order * dt, 0), mask=in_heads)
        grad += of_order
    raw = tl.load(RAW + entry * RAW_sb + tl.cast(token, tl.int64) * RAW_sl + h, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(mask, grad * sigmoid(raw + bias, FAST), 0.0)
    tl.store(PART_BIAS + program * heads + tl.arange(0, BH), tl.sum(grad, 0), mask=in_heads)
    to = GRAD_RAW + entry * GRAD_sb + tl.cast(token, tl.int64) * GRAD_sl + h
    tl.store(to, grad.to(GRAD_RAW.dtype.element_ty), mask=(token < length) & (h < columns))
