"""Triton kernels of the gradients of the symmetric state space dual for long sequences, of one order at a time.

A program owns one chunk of one image, in both roles, i and j, so every gradient is complete in it. Chunks and states
are those of `ssd_chunk_kernels`, from tile to tile.
"""

import triton
import triton.language as tl

from .decay_kernels import visited
from .math import exp2
from .ssd_chunk_kernels import load_rows, load_states, store_rows
from .ssd_kernels import as_operand, distance, product, unpacked


@triton.jit(do_not_specialize=['length', 'heads', 'prefix', 'height', 'width', 'order'])
def chunk_backward_values(
    X, B, C, DT, S, D, VISITS, STATES, GRAD_STATES, GRAD_Y, PART, GRAD_X, GRAD_DT, GRAD_L, GRAD_D,
    length, heads, prefix, height, width, order, X_sb, X_sl, B_sb, B_sl, Y_sb, Y_sl, G_sb, G_sl, VISITS_sb,
    HAS_D: tl.constexpr, HAS_PART: tl.constexpr, ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD_X as Y of `chunk_forward`. Float32: GRAD_DT as DT, to which the first order adds, GRAD_L as S, gradients of
    what tokens add to s, and GRAD_D (batch, chunks, H).

    GRAD_STATES are states of C and GRAD_Y: a mask is its own transpose, so values' gradients are this operator with B
    and C in each other's place. With E_ij = grad_y_i . x_j dt_j (C_i . B_j) M_ij, the gradient of l_k is minus the sum
    of E over pairs with k between them, k being the later one or not. Inside the chunk they are the tails of sums in
    which all other pairs cancel exactly; with one of both outside it, heads or tails of products with states; with both
    outside, a product of states. Cancelling over the whole sequence instead would sum the errors of all chunks.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    entry = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, BT)
    t = chunk * BT + own
    inside = t < length
    tokens = visited(VISITS + entry * VISITS_sb, t, length, BY_COLUMNS, prefix, height, width, TABLE)
    X += entry * X_sb
    GRAD_Y += entry * Y_sb
    GRAD_X += entry * G_sb
    PART += entry * length * heads * P
    DT += entry * heads * length
    GRAD_DT += entry * heads * length
    S += (entry * ORDERS + order) * heads * length
    GRAD_L += (entry * ORDERS + order) * heads * length
    STATES += (entry * heads * chunks + chunk) * (2 * N * P)
    GRAD_STATES += (entry * heads * chunks + chunk) * (2 * N * P)
    b = load_rows(B + entry * B_sb, tokens, inside, B_sl, N)
    c = load_rows(C + entry * B_sb, tokens, inside, B_sl, N)
    scores = as_operand(product(b, tl.trans(c), PRECISION), PRECISION)  # of j (rows) with i (columns)
    for head in range(heads):
        at = head * length + tokens
        s = tl.load(S + at, mask=inside, other=0.0)
        dt = tl.load(DT + at, mask=inside, other=0.0) / ORDERS
        whole = tl.max(s, 0)
        from_start, to_end = exp2(-s, FAST), exp2(s - whole, FAST)
        x = load_rows(X + head * P, tokens, inside, X_sl, P)
        grad_y = load_rows(GRAD_Y + head * P, tokens, inside, Y_sl, P)
        masked = unpacked(scores, PRECISION, FAST) * distance(s, s, FAST)
        grad_v = product(masked, grad_y, PRECISION)
        edge = product(x, tl.trans(grad_y), PRECISION) * masked * dt[:, None]
        edge = tl.where(own[:, None] < own[None, :], edge, tl.where(own[:, None] > own[None, :], -edge, 0.0))
        tails = tl.sum(edge, 1) - tl.sum(edge, 0)
        grad_ahead, grad_back = load_states(GRAD_STATES, head, chunks, N, P)
        before = product(b, grad_ahead, PRECISION) * from_start[:, None]
        behind = product(b, grad_back, PRECISION) * to_end[:, None]
        grad_v += before + behind
        tails -= tl.sum(before * x.to(tl.float32), 1) * dt
        starts = tl.sum(behind * x.to(tl.float32), 1) * dt
        ahead, back = load_states(STATES, head, chunks, N, P)
        tails -= tl.sum(product(c, ahead, PRECISION) * grad_y.to(tl.float32), 1) * from_start
        starts += tl.sum(product(c, back, PRECISION) * grad_y.to(tl.float32), 1) * to_end
        over = ahead.to(tl.float32) * grad_back.to(tl.float32) + back.to(tl.float32) * grad_ahead.to(tl.float32)
        over = tl.sum(tl.sum(over, 1), 0) * exp2(-whole, FAST)
        grad_l = tl.cumsum(tails, 0, reverse=True) - (tl.cumsum(starts, 0) - starts) - over
        tl.store(GRAD_L + at, grad_l, mask=inside)
        grad_dt = tl.sum(grad_v * x.to(tl.float32), 1) / ORDERS
        grad_x = grad_v * dt[:, None]
        if HAS_D:
            grad_x += tl.load(D + head).to(tl.float32) * grad_y.to(tl.float32)
            skipped = tl.sum(tl.sum(grad_y.to(tl.float32) * x.to(tl.float32), 1), 0)
            tl.store(GRAD_D + (entry * chunks + chunk) * heads + head, skipped)
        if HAS_PART:
            grad_dt += tl.load(GRAD_DT + at, mask=inside, other=0.0)
            grad_x += load_rows(PART + head * P, tokens, inside, heads * P, P).to(tl.float32)
        tl.store(GRAD_DT + at, grad_dt, mask=inside)
        store_rows(GRAD_X + head * P, tokens, inside, G_sl, grad_x, P)


@triton.jit(do_not_specialize=['length', 'heads', 'prefix', 'height', 'width', 'order'])
def chunk_backward_matrices(
    X, B, C, DT, S, VISITS, STATES, GRAD_STATES, GRAD_Y, GRAD_B, GRAD_C,
    length, heads, prefix, height, width, order, X_sb, X_sl, B_sb, B_sl, Y_sb, Y_sl, VISITS_sb,
    ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD_B and GRAD_C (orders, batch, L, N), float32: one order's part."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    entry, entries = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    t = chunk * BT + tl.arange(0, BT)
    inside = t < length
    tokens = visited(VISITS + entry * VISITS_sb, t, length, BY_COLUMNS, prefix, height, width, TABLE)
    X += entry * X_sb
    GRAD_Y += entry * Y_sb
    DT += entry * heads * length
    S += (entry * ORDERS + order) * heads * length
    STATES += (entry * heads * chunks + chunk) * (2 * N * P)
    GRAD_STATES += (entry * heads * chunks + chunk) * (2 * N * P)
    grad_scores = tl.zeros([BT, BT], tl.float32)  # of j (rows) with i (columns)
    grad_b = tl.zeros([BT, N], tl.float32)
    grad_c = tl.zeros([BT, N], tl.float32)
    for head in range(heads):
        at = head * length + tokens
        s = tl.load(S + at, mask=inside, other=0.0)
        dt = tl.load(DT + at, mask=inside, other=0.0) / ORDERS
        from_start, to_end = exp2(-s, FAST)[:, None], exp2(s - tl.max(s, 0), FAST)[:, None]
        v = load_rows(X + head * P, tokens, inside, X_sl, P).to(tl.float32) * dt[:, None]
        grad_y = load_rows(GRAD_Y + head * P, tokens, inside, Y_sl, P).to(tl.float32)
        grad_scores += product(v, tl.trans(grad_y), PRECISION) * distance(s, s, FAST)
        ahead, back = load_states(GRAD_STATES, head, chunks, N, P)
        grad_b += product(v * from_start, tl.trans(ahead), PRECISION)
        grad_b += product(v * to_end, tl.trans(back), PRECISION)
        ahead, back = load_states(STATES, head, chunks, N, P)
        grad_c += product(grad_y * from_start, tl.trans(ahead), PRECISION)
        grad_c += product(grad_y * to_end, tl.trans(back), PRECISION)
    b = load_rows(B + entry * B_sb, tokens, inside, B_sl, N)
    c = load_rows(C + entry * B_sb, tokens, inside, B_sl, N)
    grad_b += product(grad_scores, c, PRECISION)
    grad_c += product(tl.trans(grad_scores), b, PRECISION)
    to = (order * entries + entry) * length * N
    store_rows(GRAD_B + to, tokens, inside, N, grad_b, N)
    store_rows(GRAD_C + to, tokens, inside, N, grad_c, N)
