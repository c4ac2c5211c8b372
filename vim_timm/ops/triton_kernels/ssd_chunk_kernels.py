"""Triton kernels of the symmetric state space dual for long sequences, of one order of tokens at a time.

The order cuts the sequence into chunks of one or two tiles of BT tokens. `chunk_sums` sums within each chunk;
`chunk_states` makes of these, in place, the states with which chunks are entered: sums over the tokens before them, and
over those behind them. All else is done by programs that own one tile of one image. `chunk_forward` takes chunks of
TILES tiles: products of a tile with itself and with the other one of its chunk, whose scores all heads share, and
products with both states. The gradients (`ssd_chunk_gradient_kernels`) take chunks of one tile. Of two orders the
second runs first and leaves its sums in PART, to which the first adds. No sum depends on timing.

s counts from the start of a tile, times log2(e). A decay over more than a tile is the product of what is left at each
end and of whole tiles, so every exponent is small and, but for rounding, at most 0. Steps are halved where two orders
are averaged.
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


@triton.jit
def load_scalars(
    S, DT, VISITS, first, second, length, prefix, height, width,
    ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """s and steps of BT tokens from `first` on, and of BT from `second` on.

    One load for all: smaller ones the compiler repeats for each use, with addresses for every element in registers.
    """
    at = tl.arange(0, 4 * BT)
    t = tl.where(at < 2 * BT, first, second) + at % BT
    tokens = visited(VISITS, t, length, BY_COLUMNS, prefix, height, width, TABLE)
    four = tl.load(tl.where(at // BT % 2 == 0, S, DT) + tokens, mask=t < length, other=0.0)
    of_first, of_second = tl.split(tl.permute(tl.reshape(four, [2, 2, BT]), (2, 1, 0)))
    s, dt = tl.split(of_first)
    s_2, dt_2 = tl.split(of_second)
    return s, dt / ORDERS, s_2, dt_2 / ORDERS


@triton.jit
def last_tokens(
    VISITS, chunk, length, prefix, height, width,
    BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The last tokens of a chunk's tiles, where s is what a tile adds to it, and whether there is such a tile."""
    first = (chunk * TILES + tl.arange(0, TILES)) * BT
    last = tl.minimum(first + BT, length) - 1
    return visited(VISITS, last, length, BY_COLUMNS, prefix, height, width, TABLE), first < length


@triton.jit
def of_tile(totals, tile, TILES: tl.constexpr):
    """What a tile adds to s; 0 where the chunk has no such tile."""
    return tl.sum(tl.where(tl.arange(0, TILES) == tile, totals, 0.0), 0)


@triton.jit
def load_tile(
    MATRIX, VISITS, first, length, stride, prefix, height, width,
    COLUMNS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A matrix's rows of BT tokens from `first` on."""
    t = first + tl.arange(0, BT)
    tokens = visited(VISITS, t, length, BY_COLUMNS, prefix, height, width, TABLE)
    return load_rows(MATRIX, tokens, t < length, stride, COLUMNS)


@triton.jit(do_not_specialize=['length', 'heads', 'group', 'prefix', 'height', 'width', 'order'])
def chunk_sums(
    ROWS, VALUES, DT, S, VISITS, STATES, length, heads, group, prefix, height, width, order,
    ROWS_sb, ROWS_sl, VALUES_sb, VALUES_sl, VISITS_sb,
    WEIGHTED: tl.constexpr, ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """STATES (batch, H, chunks, 2, N, P): a chunk's sums of rows_j values_j^T, decayed to its end and to its start.

    ROWS (batch, L, N), VALUES (batch, L, H, P), times steps if WEIGHTED.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    first_head = tl.program_id(1) * group
    entry = tl.program_id(2).to(tl.int64)
    VISITS += entry * VISITS_sb
    ROWS += entry * ROWS_sb
    VALUES += entry * VALUES_sb
    DT += entry * heads * length
    S += (entry * ORDERS + order) * heads * length
    STATES += (entry * heads * chunks + chunk) * (2 * N * P)
    first = chunk * TILES * BT
    second = first + (TILES - 1) * BT
    last, there = last_tokens(VISITS, chunk, length, prefix, height, width, BY_COLUMNS, TABLE, BT, TILES)
    rows = load_tile(ROWS, VISITS, first, length, ROWS_sl, prefix, height, width, N, BY_COLUMNS, TABLE, BT)
    rows_2 = load_tile(ROWS, VISITS, second, length, ROWS_sl, prefix, height, width, N, BY_COLUMNS, TABLE, BT)
    at = tl.arange(0, N)[:, None] * P + tl.arange(0, P)[None, :]
    for head in range(first_head, tl.minimum(first_head + group, heads)):
        S_h, DT_h, V = S + head * length, DT + head * length, VALUES + head * P
        totals = tl.load(S_h + last, mask=there, other=0.0)
        s, dt, s_2, dt_2 = load_scalars(
            S_h, DT_h, VISITS, first, second, length, prefix, height, width, ORDERS, BY_COLUMNS, TABLE, BT
        )
        end, start = exp2(s - of_tile(totals, 0, TILES) - of_tile(totals, 1, TILES), FAST), exp2(-s, FAST)
        if WEIGHTED:
            end *= dt
            start *= dt
        values = load_tile(V, VISITS, first, length, VALUES_sl, prefix, height, width, P, BY_COLUMNS, TABLE, BT)
        values = values.to(tl.float32)
        to_end = product(tl.trans(rows), values * end[:, None], PRECISION)
        to_start = product(tl.trans(rows), values * start[:, None], PRECISION)
        if TILES == 2:
            end, start = exp2(s_2 - of_tile(totals, 1, TILES), FAST), exp2(-s_2 - of_tile(totals, 0, TILES), FAST)
            if WEIGHTED:
                end *= dt_2
                start *= dt_2
            values = load_tile(V, VISITS, second, length, VALUES_sl, prefix, height, width, P, BY_COLUMNS, TABLE, BT)
            values = values.to(tl.float32)
            to_end += product(tl.trans(rows_2), values * end[:, None], PRECISION)
            to_start += product(tl.trans(rows_2), values * start[:, None], PRECISION)
        to = STATES + tl.cast(head, tl.int64) * chunks * (2 * N * P) + at
        tl.store(to, to_end.to(STATES.dtype.element_ty))
        tl.store(to + N * P, to_start.to(STATES.dtype.element_ty))


@triton.jit
def load_sum(
    STATES, S, VISITS, step, chunks, backward, length, prefix, height, width,
    BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Sum of the chunk that a direction meets after `step` others, that of its decays, its place, if there is one."""
    inside = step < chunks
    chunk = tl.where(backward == 1, tl.maximum(chunks - 1 - step, 0), step)
    last, there = last_tokens(VISITS, chunk, length, prefix, height, width, BY_COLUMNS, TABLE, BT, TILES)
    totals = tl.load(S + last, mask=there & inside, other=0.0)
    at = STATES + tl.cast(chunk, tl.int64) * STRIDE
    return tl.load(at, mask=inside, other=0.0), tl.sum(totals, 0), at, inside


@triton.jit
def pass_chunk(state, added, decay, at, inside, FAST: tl.constexpr):
    """Stores the state with which a chunk is entered; returns the one with which it is left."""
    tl.store(at, state.to(at.dtype.element_ty), mask=inside)
    return state * exp2(-decay, FAST) + added.to(tl.float32)


@triton.jit(do_not_specialize=['length', 'heads', 'chunks', 'prefix', 'height', 'width', 'order'])
def chunk_states(
    S, VISITS, STATES, length, heads, chunks, prefix, height, width, order, VISITS_sb,
    ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
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
            at, S, VISITS, step, chunks, backward, length, prefix, height, width,
            BY_COLUMNS, TABLE, BT, TILES, STRIDE,
        )  # fmt: skip
        sum_1, decay_1, at_1, inside_1 = load_sum(
            at, S, VISITS, step + 1, chunks, backward, length, prefix, height, width,
            BY_COLUMNS, TABLE, BT, TILES, STRIDE,
        )  # fmt: skip
        sum_2, decay_2, at_2, inside_2 = load_sum(
            at, S, VISITS, step + 2, chunks, backward, length, prefix, height, width,
            BY_COLUMNS, TABLE, BT, TILES, STRIDE,
        )  # fmt: skip
        sum_3, decay_3, at_3, inside_3 = load_sum(
            at, S, VISITS, step + 3, chunks, backward, length, prefix, height, width,
            BY_COLUMNS, TABLE, BT, TILES, STRIDE,
        )  # fmt: skip
        state = pass_chunk(state, sum_0, decay_0, at_0, inside_0, FAST)
        state = pass_chunk(state, sum_1, decay_1, at_1, inside_1, FAST)
        state = pass_chunk(state, sum_2, decay_2, at_2, inside_2, FAST)
        state = pass_chunk(state, sum_3, decay_3, at_3, inside_3, FAST)


@triton.jit
def scores_of(
    c, B, VISITS, first, length, stride, prefix, height, width,
    N: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows c (BT, N) with those of BT tokens from `first` on, in the precision of operands."""
    b = load_tile(B, VISITS, first, length, stride, prefix, height, width, N, BY_COLUMNS, TABLE, BT)
    return as_operand(product(c, tl.trans(b), PRECISION), PRECISION)


@triton.jit(do_not_specialize=['length', 'heads', 'group', 'prefix', 'height', 'width', 'order'])
def chunk_forward(
    X, B, C, DT, S, D, VISITS, STATES, PART, Y, length, heads, group, prefix, height, width, order,
    X_sb, X_sl, B_sb, B_sl, Y_sb, Y_sl, VISITS_sb,
    HAS_D: tl.constexpr, HAS_PART: tl.constexpr, ORDERS: tl.constexpr, BY_COLUMNS: tl.constexpr, TABLE: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Y (batch, L, H, P) of any row stride: one order's sums, with PART and D x. DT and S as in `ssd_forward`.

    The mask between two tiles is a factor of each side, so it needs no exponential for each pair of tokens.
    """
    chunk, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    chunks = tl.cdiv(length, BT * TILES)
    first_head = tl.program_id(1) * group
    entry = tl.program_id(2).to(tl.int64)
    VISITS += entry * VISITS_sb
    X += entry * X_sb
    B += entry * B_sb
    Y += entry * Y_sb
    PART += entry * length * heads * P
    DT += entry * heads * length
    S += (entry * ORDERS + order) * heads * length
    STATES += (entry * heads * chunks + chunk) * (2 * N * P)
    other = TILES - 1 - tile
    first, first_other = (chunk * TILES + tile) * BT, (chunk * TILES + other) * BT
    own = tl.arange(0, BT)
    inside = first + own < length
    tokens = visited(VISITS, first + own, length, BY_COLUMNS, prefix, height, width, TABLE)
    last, there = last_tokens(VISITS, chunk, length, prefix, height, width, BY_COLUMNS, TABLE, BT, TILES)
    c = load_rows(C + entry * B_sb, tokens, inside, B_sl, N)
    scores = scores_of(c, B, VISITS, first, length, B_sl, prefix, height, width, N, BY_COLUMNS, TABLE, BT, PRECISION)
    scores_other = scores
    if TILES == 2:
        scores_other = scores_of(
            c, B, VISITS, first_other, length, B_sl, prefix, height, width, N, BY_COLUMNS, TABLE, BT, PRECISION
        )
    for head in range(first_head, tl.minimum(first_head + group, heads)):
        S_h, DT_h, X_h = S + head * length, DT + head * length, X + head * P
        x = load_rows(X_h, tokens, inside, X_sl, P)
        x_other = x
        if TILES == 2:
            x_other = load_tile(X_h, VISITS, first_other, length, X_sl, prefix, height, width, P, BY_COLUMNS, TABLE, BT)
        s, dt, s_other, dt_other = load_scalars(
            S_h, DT_h, VISITS, first, first_other, length, prefix, height, width, ORDERS, BY_COLUMNS, TABLE, BT
        )
        ahead, back = load_states(STATES, head, chunks, N, P)
        totals = tl.load(S_h + last, mask=there, other=0.0)
        total, total_other = of_tile(totals, tile, TILES), of_tile(totals, 1 - tile, TILES)
        from_start, to_end = exp2(-s, FAST), exp2(s - total, FAST)
        masked = unpacked(scores, PRECISION, FAST) * (distance(s, s, FAST) * dt[None, :])
        if HAS_D:
            skip = tl.load(D + head).to(tl.float32)
            masked += tl.where(own[:, None] == own[None, :], skip, 0.0)
        y = product(masked, x, PRECISION)
        if TILES == 2:
            before = tile == 1  # the other tile is
            weight = exp2(tl.where(before, s_other - total_other, -s_other), FAST) * dt_other
            part = product(scores_other, x_other.to(tl.float32) * weight[:, None], PRECISION)
            y += part * tl.where(before, from_start, to_end)[:, None]
        from_start *= exp2(tl.where(tile == 1, -total_other, 0.0), FAST)
        to_end *= exp2(tl.where(tile == 0, -total_other, 0.0), FAST)
        y += product(c, ahead, PRECISION) * from_start[:, None]
        y += product(c, back, PRECISION) * to_end[:, None]
        if HAS_PART:
            y += load_rows(PART + head * P, tokens, inside, heads * P, P).to(tl.float32)
        store_rows(Y + head * P, tokens, inside, Y_sl, y, P)
