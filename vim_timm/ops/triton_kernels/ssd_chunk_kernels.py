"""Triton kernels of the symmetric state space dual for long sequences, of one order of tokens at a time.

The order cuts the sequence into chunks of BT tokens. `chunk_sums` sums within each; `chunk_states` makes of these, in
place, the states with which chunks are entered: sums over the tokens before them, and over those behind them. All else
is done by programs that own one chunk of one image: products inside the chunk, whose scores all heads share, and
products with both states. As they own their tokens in both roles, i and j, every gradient is complete in them. Of two
orders the second runs first and leaves its sums in PART, to which the first adds. No sum depends on timing.

s counts from the start of a chunk, times log2(e), so every exponent is small and at most 0. Steps are halved where two
orders are averaged.
"""

import triton
import triton.language as tl

from .decay_kernels import visited
from .math import exp2
from .ssd_kernels import as_operand, distance, product, unpacked


@triton.jit
def load_rows(pointer, tokens, inside, stride, COLUMNS: tl.constexpr):
    """Rows of a matrix at any tokens, zeros where there is none."""
    at = pointer + tl.cast(tokens, tl.int64)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(pointer, tokens, inside, stride, value, COLUMNS: tl.constexpr):
    at = pointer + tl.cast(tokens, tl.int64)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=inside[:, None])


@triton.jit
def load_states(STATES, head, chunks, N: tl.constexpr, P: tl.constexpr):
    """A head's states (N, P) with which a chunk is entered from the first token and from the last."""
    STATES += tl.cast(head, tl.int64) * chunks * (2 * N * P)
    at = STATES + tl.arange(0, N)[:, None] * P + tl.arange(0, P)[None, :]
    return tl.load(at), tl.load(at + N * P)


@triton.jit(do_not_specialize=['length', 'heads', 'prefix', 'height', 'width', 'order'])
def chunk_sums(
    ROWS, VALUES, DT, S, VISITS, STATES, length, heads, prefix, height, width, order,
    ROWS_sb, ROWS_sl, VALUES_sb, VALUES_sl, VISITS_sb,
    WEIGHTED: tl.constexpr, ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """STATES (batch, H, chunks, 2, N, P): a chunk's sums of rows_j values_j^T, decayed to its end and to its start.

    ROWS (batch, L, N), VALUES (batch, L, H, P), times steps if WEIGHTED.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1)
    entry = tl.program_id(2).to(tl.int64)
    t = chunk * BT + tl.arange(0, BT)
    inside = t < length
    tokens = visited(VISITS + entry * VISITS_sb, t, length, BY_COLUMNS, prefix, height, width, TABLE)
    s = tl.load(S + ((entry * ORDERS + order) * heads + head) * length + tokens, mask=inside, other=0.0)
    rows = tl.trans(load_rows(ROWS + entry * ROWS_sb, tokens, inside, ROWS_sl, N))
    values = load_rows(VALUES + entry * VALUES_sb + head * P, tokens, inside, VALUES_sl, P).to(tl.float32)
    if WEIGHTED:
        dt = tl.load(DT + (entry * heads + head) * length + tokens, mask=inside, other=0.0) / ORDERS
        values *= dt[:, None]
    STATES += ((entry * heads + head) * chunks + chunk) * (2 * N * P)
    at = tl.arange(0, N)[:, None] * P + tl.arange(0, P)[None, :]
    to_end = product(rows, values * exp2(s - tl.max(s, 0), FAST)[:, None], PRECISION)
    tl.store(STATES + at, to_end.to(STATES.dtype.element_ty))
    to_start = product(rows, values * exp2(-s, FAST)[:, None], PRECISION)
    tl.store(STATES + N * P + at, to_start.to(STATES.dtype.element_ty))


@triton.jit
def load_sum(
    STATES, S, VISITS, step, chunks, backward, length, prefix, height, width,
    BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, BT: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Sum of the chunk that a direction meets after `step` others, that of its decays, its place, if there is one."""
    inside = step < chunks
    chunk = tl.where(backward == 1, tl.maximum(chunks - 1 - step, 0), step)
    last = visited(VISITS, tl.minimum(chunk * BT + BT, length) - 1, length, BY_COLUMNS, prefix, height, width, TABLE)
    at = STATES + tl.cast(chunk, tl.int64) * STRIDE
    return tl.load(at, mask=inside, other=0.0), tl.load(S + last, mask=inside, other=0.0), at, inside


@triton.jit
def pass_chunk(state, added, decay, at, inside, FAST: tl.constexpr):
    """Stores the state with which a chunk is entered; returns the one with which it is left."""
    tl.store(at, state.to(at.dtype.element_ty), mask=inside)
    return state * exp2(-decay, FAST) + added.to(tl.float32)


@triton.jit(do_not_specialize=['length', 'heads', 'chunks', 'prefix', 'height', 'width', 'order'])
def chunk_states(
    S, VISITS, STATES, length, heads, chunks, prefix, height, width, order, VISITS_sb,
    ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    BT: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """From sums of chunks to the states with which they are entered from both ends, in place.

    A program takes SIZE elements of a head's states in one direction. Four chunks are loaded before the first is left.
    """
    STRIDE: tl.constexpr = 2 * N * P
    head, backward = tl.program_id(1) // 2, tl.program_id(1) % 2
    entry = tl.program_id(2).to(tl.int64)
    S += ((entry * ORDERS + order) * heads + head) * length
    VISITS += entry * VISITS_sb
    STATES += (entry * heads + head) * chunks * STRIDE + backward * (N * P) + tl.program_id(0) * SIZE
    at = STATES + tl.arange(0, SIZE)
    state = tl.zeros([SIZE], tl.float32)
    for step in range(0, chunks, 4):
        sum_0, decay_0, at_0, inside_0 = load_sum(
            at, S, VISITS, step, chunks, backward, length, prefix, height, width, BY_COLUMNS, TABLE, BT, STRIDE
        )
        sum_1, decay_1, at_1, inside_1 = load_sum(
            at, S, VISITS, step + 1, chunks, backward, length, prefix, height, width, BY_COLUMNS, TABLE, BT, STRIDE
        )
        sum_2, decay_2, at_2, inside_2 = load_sum(
            at, S, VISITS, step + 2, chunks, backward, length, prefix, height, width, BY_COLUMNS, TABLE, BT, STRIDE
        )
        sum_3, decay_3, at_3, inside_3 = load_sum(
            at, S, VISITS, step + 3, chunks, backward, length, prefix, height, width, BY_COLUMNS, TABLE, BT, STRIDE
        )
        state = pass_chunk(state, sum_0, decay_0, at_0, inside_0, FAST)
        state = pass_chunk(state, sum_1, decay_1, at_1, inside_1, FAST)
        state = pass_chunk(state, sum_2, decay_2, at_2, inside_2, FAST)
        state = pass_chunk(state, sum_3, decay_3, at_3, inside_3, FAST)


@triton.jit(do_not_specialize=['length', 'heads', 'group', 'prefix', 'height', 'width', 'order'])
def chunk_forward(
    X, B, C, DT, S, D, VISITS, STATES, PART, Y, length, heads, group, prefix, height, width, order,
    X_sb, X_sl, B_sb, B_sl, Y_sb, Y_sl, VISITS_sb,
    HAS_D: tl.constexpr, HAS_PART: tl.constexpr, ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Y (batch, L, H, P) of any row stride: one order's sums, with PART and D x. DT and S as in `ssd_forward`."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    first_head = tl.program_id(1) * group
    entry = tl.program_id(2).to(tl.int64)
    t = chunk * BT + tl.arange(0, BT)
    inside = t < length
    tokens = visited(VISITS + entry * VISITS_sb, t, length, BY_COLUMNS, prefix, height, width, TABLE)
    X += entry * X_sb
    Y += entry * Y_sb
    PART += entry * length * heads * P
    DT += entry * heads * length
    S += (entry * ORDERS + order) * heads * length
    STATES += (entry * heads * chunks + chunk) * (2 * N * P)
    b = load_rows(B + entry * B_sb, tokens, inside, B_sl, N)
    c = load_rows(C + entry * B_sb, tokens, inside, B_sl, N)
    scores = as_operand(product(c, tl.trans(b), PRECISION), PRECISION)
    for head in range(first_head, tl.minimum(first_head + group, heads)):
        s = tl.load(S + head * length + tokens, mask=inside, other=0.0)
        dt = tl.load(DT + head * length + tokens, mask=inside, other=0.0) / ORDERS
        x = load_rows(X + head * P, tokens, inside, X_sl, P)
        mask = distance(s, s, FAST) * dt[None, :]
        y = product(unpacked(scores, PRECISION, FAST) * mask, x, PRECISION)
        ahead, back = load_states(STATES, head, chunks, N, P)
        y += product(c, ahead, PRECISION) * exp2(-s, FAST)[:, None]
        y += product(c, back, PRECISION) * exp2(s - tl.max(s, 0), FAST)[:, None]
        if HAS_D:
            y += tl.load(D + head).to(tl.float32) * x.to(tl.float32)
        if HAS_PART:
            y += load_rows(PART + head * P, tokens, inside, heads * P, P).to(tl.float32)
        store_rows(Y + head * P, tokens, inside, Y_sl, y, P)


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
