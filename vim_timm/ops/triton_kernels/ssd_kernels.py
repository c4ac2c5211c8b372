"""Triton kernels of the symmetric state space dual for sequences whose row of scores fits into registers.

A program owns BM tokens. It computes their scores C_i . B_j with all tokens once, in up to four pieces of 16 to 64
tokens, and then goes through its heads: mask, step sizes, and a product with the values. In the backward pass it owns
tokens j, so that the gradients of values, steps and B are complete in it; C's and those of s by rows are written once
for each program and added afterwards. It is two kernels: one of a head, which computes scores again step by step, and
one with the gradients of a row of scores in registers. No sum depends on timing.

s comes scaled by log2(e). Masks of two orders are added; the half is in HALF.
"""

import triton
import triton.language as tl

from .math import exp2


@triton.jit
def as_operand(a, PRECISION: tl.constexpr):
    """a as products take it: in bfloat16 if PRECISION is 'bf16', else in float32."""
    if PRECISION == 'bf16':
        return a.to(tl.bfloat16)
    else:
        return a.to(tl.float32)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32; PRECISION is 'bf16' or that of float32 operands."""
    if PRECISION == 'bf16':
        return tl.dot(as_operand(a, PRECISION), as_operand(b, PRECISION))
    else:
        return tl.dot(as_operand(a, PRECISION), as_operand(b, PRECISION), input_precision=PRECISION)


@triton.jit
def unpacked(scores, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """Scores in float32. The compiler would do it before the loop over heads, and hold twice the registers."""
    if PRECISION == 'bf16' and FAST:
        return tl.inline_asm_elementwise(
            'shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;', '=r,=r,r', [scores], dtype=tl.float32, is_pure=False,
            pack=2,
        )  # fmt: skip
    else:
        return scores.to(tl.float32)


@triton.jit
def load_tokens(pointer, tokens, length, stride, COLUMNS: tl.constexpr):
    """Rows of a matrix, zeros beyond its end."""
    at = pointer + tokens[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    return tl.load(at, mask=tokens[:, None] < length, other=0.0)


@triton.jit
def load_scalars(pointer, tokens, length):
    return tl.load(pointer + tokens, mask=tokens < length, other=0.0)


@triton.jit
def distance(own, other, FAST: tl.constexpr):
    """exp(-|s - s'|) of a program's tokens (rows) and others (columns)."""
    return exp2(-tl.abs(own[:, None] - other[None, :]), FAST)


@triton.jit
def scores_with(
    rows, OTHERS, first, length, stride,
    N: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of a program's rows (BM, N) with tokens from `first` on: (BM, SIZE), in the precision of operands."""
    others = load_tokens(OTHERS, first + tl.arange(0, SIZE), length, stride, N)
    return as_operand(product(rows, tl.trans(others), PRECISION) * SCALE, PRECISION)


@triton.jit
def add_values(
    y, scores, own, own_2, X, DT, S, S_2, first, length, stride,
    P: tl.constexpr, SIZE: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y plus the products of one piece of scores, masked, with the values of one head."""
    tokens = first + tl.arange(0, SIZE)
    mask = distance(own, load_scalars(S, tokens, length), FAST)
    if TWO:
        mask += distance(own_2, load_scalars(S_2, tokens, length), FAST)
    mask *= load_scalars(DT, tokens, length)[None, :]
    scores = unpacked(scores, PRECISION, FAST)
    return y + product(scores * mask, load_tokens(X, tokens, length, stride, P), PRECISION)


@triton.jit(do_not_specialize=['length', 'heads', 'group'])
def ssd_forward(
    X, B, C, DT, S, D, Y, length, heads, group, X_sb, X_sl, B_sb, B_sl, Y_sb, Y_sl,
    HAS_D: tl.constexpr, TWO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Y (batch, L, H, P) of any row stride. DT (batch, H, L) and S (batch, orders, H, L) float32 and contiguous."""
    HALF: tl.constexpr = 0.5 if TWO else 1.0
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    first_head = tl.program_id(1) * group
    entry = tl.program_id(2).to(tl.int64)
    X += entry * X_sb
    Y += entry * Y_sb
    B += entry * B_sb
    DT += entry * heads * length
    S += entry * (2 if TWO else 1) * heads * length
    c = load_tokens(C + entry * B_sb, tokens, length, B_sl, N)
    scores_0 = scores_with(c, B, 0, length, B_sl, N, N0, HALF, PRECISION)
    scores_1, scores_2, scores_3 = scores_0, scores_0, scores_0
    if N1 > 0:
        scores_1 = scores_with(c, B, N0, length, B_sl, N, N1, HALF, PRECISION)
    if N2 > 0:
        scores_2 = scores_with(c, B, N0 + N1, length, B_sl, N, N2, HALF, PRECISION)
    if N3 > 0:
        scores_3 = scores_with(c, B, N0 + N1 + N2, length, B_sl, N, N3, HALF, PRECISION)
    for head in range(first_head, tl.minimum(first_head + group, heads)):
        S_h, S_2h, DT_h = S + head * length, S + (heads + head) * length, DT + head * length
        X_h = X + head * P
        own = load_scalars(S_h, tokens, length)
        own_2 = own
        if TWO:
            own_2 = load_scalars(S_2h, tokens, length)
        y = tl.zeros([BM, P], tl.float32)
        if HAS_D:
            y += tl.load(D + head).to(tl.float32) * load_tokens(X_h, tokens, length, X_sl, P).to(tl.float32)
        y = add_values(y, scores_0, own, own_2, X_h, DT_h, S_h, S_2h, 0, length, X_sl, P, N0, TWO, PRECISION, FAST)
        if N1 > 0:
            y = add_values(y, scores_1, own, own_2, X_h, DT_h, S_h, S_2h, N0, length, X_sl, P, N1, TWO, PRECISION, FAST)
        if N2 > 0:
            y = add_values(
                y, scores_2, own, own_2, X_h, DT_h, S_h, S_2h, N0 + N1, length, X_sl, P, N2, TWO, PRECISION, FAST
            )
        if N3 > 0:
            y = add_values(
                y, scores_3, own, own_2, X_h, DT_h, S_h, S_2h, N0 + N1 + N2, length, X_sl, P, N3, TWO, PRECISION, FAST
            )
        at = Y + head * P + tokens[:, None] * Y_sl + tl.arange(0, P)[None, :]
        tl.store(at, y.to(Y.dtype.element_ty), mask=tokens[:, None] < length)


@triton.jit
def with_sign_of(edges, apart):
    """Edges, negative where `apart` is.

    Where s is too coarse to tell, both signs are right to its precision: a step that s does not show has no gradient.
    """
    sign = apart.to(tl.int32, bitcast=True) & -0x80000000
    return (edges.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=['length', 'heads'])
def ssd_backward_values(
    X, B, C, DT, S, D, GRAD_Y, GRAD_X, GRAD_DT, EDGES, ROWS, GRAD_D,
    length, heads, X_sb, X_sl, B_sb, B_sl, Y_sb, Y_sl, G_sb, G_sl,
    HAS_D: tl.constexpr, TWO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """GRAD_X as Y. Float32: GRAD_DT as DT, EDGES as S, ROWS (blocks, batch, orders, H, L), GRAD_D (batch, blocks, H).

    With E_ij = grad_y_i . x_j dt_j (C_i . B_j) M_ij of one order: EDGES_j = sum_i sign(i - j) E_ij and
    ROWS_i = sum_j sign(i - j) E_ij over the program's j, so that grad s = EDGES - sum ROWS.

    Tokens i are the rows of tiles: their sums stay in a warp, and those over i are added once, at the end.
    """
    HALF: tl.constexpr = 0.5 if TWO else 1.0
    ORDERS: tl.constexpr = 2 if TWO else 1
    block, blocks = tl.program_id(0), tl.num_programs(0)
    tokens = block * BM + tl.arange(0, BM)
    inside = tokens < length
    head = tl.program_id(1)
    entry, entries = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    X += entry * X_sb + head * P
    C += entry * B_sb
    GRAD_Y += entry * Y_sb + head * P
    DT += (entry * heads + head) * length
    S += (entry * ORDERS * heads + head) * length
    S_2 = S + heads * length
    ROWS += ((block * entries + entry) * ORDERS * heads + head) * length
    ROWS_2 = ROWS + heads * length
    b = load_tokens(B + entry * B_sb, tokens, length, B_sl, N)
    x = load_tokens(X, tokens, length, X_sl, P)
    dt = load_scalars(DT, tokens, length)
    own = load_scalars(S, tokens, length)
    own_2 = own
    if TWO:
        own_2 = load_scalars(S_2, tokens, length)
    grad_v = tl.zeros([P, BM], tl.float32)  # of what lacks dt_j
    edges = tl.zeros([SIZE, BM], tl.float32)  # which lack it too
    edges_2 = edges
    for first in range(0, length, SIZE):
        others = first + tl.arange(0, SIZE)
        scores = product(load_tokens(C, others, length, B_sl, N), tl.trans(b), PRECISION) * HALF
        grad_y = load_tokens(GRAD_Y, others, length, Y_sl, P)
        grad = product(grad_y, tl.trans(x), PRECISION)
        apart = load_scalars(S, others, length)[:, None] - own[None, :]
        weights = scores * exp2(-tl.abs(apart), FAST)
        edge = with_sign_of(grad * weights, apart)
        edges += edge
        tl.store(ROWS + others, tl.sum(edge * dt[None, :], 1), mask=others < length)
        if TWO:
            apart = load_scalars(S_2, others, length)[:, None] - own_2[None, :]
            weights_2 = scores * exp2(-tl.abs(apart), FAST)
            edge = with_sign_of(grad * weights_2, apart)
            edges_2 += edge
            tl.store(ROWS_2 + others, tl.sum(edge * dt[None, :], 1), mask=others < length)
            weights += weights_2
        grad_v += product(tl.trans(grad_y), weights, PRECISION)
    grad_v = tl.trans(grad_v)
    grad_x = grad_v * dt[:, None]
    if HAS_D:
        own_dy = load_tokens(GRAD_Y, tokens, length, Y_sl, P).to(tl.float32)
        grad_x += tl.load(D + head).to(tl.float32) * own_dy
        skipped = tl.sum(tl.sum(own_dy * x.to(tl.float32), 1), 0)
        tl.store(GRAD_D + (entry * blocks + block) * heads + head, skipped)
    to = GRAD_X + entry * G_sb + head * P + tokens[:, None] * G_sl + tl.arange(0, P)[None, :]
    tl.store(to, grad_x.to(GRAD_X.dtype.element_ty), mask=inside[:, None])
    GRAD_DT += (entry * heads + head) * length
    EDGES += (entry * ORDERS * heads + head) * length
    tl.store(GRAD_DT + tokens, tl.sum(grad_v * x.to(tl.float32), 1), mask=inside)
    tl.store(EDGES + tokens, tl.sum(edges, 0) * dt, mask=inside)
    if TWO:
        tl.store(EDGES + heads * length + tokens, tl.sum(edges_2, 0) * dt, mask=inside)


@triton.jit
def score_gradients(
    grad_scores, x, dt, own, own_2, GRAD_Y, S, S_2, first, length, stride,
    P: tl.constexpr, SIZE: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Adds one head's gradients of the scores of one piece."""
    others = first + tl.arange(0, SIZE)
    mask = distance(own, load_scalars(S, others, length), FAST)
    if TWO:
        mask += distance(own_2, load_scalars(S_2, others, length), FAST)
    grad_y = load_tokens(GRAD_Y, others, length, stride, P)
    return grad_scores + product(x, tl.trans(grad_y), PRECISION) * (mask * dt[:, None])


@triton.jit
def store_matrix_gradients(
    grad_scores, b, grad_b, C, GRAD_C, first, length, stride, grad_stride, N: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of B, and writes that of C at one piece's tokens."""
    others = first + tl.arange(0, SIZE)
    grad_b += product(grad_scores, load_tokens(C, others, length, stride, N), PRECISION)
    grad_c = product(tl.trans(grad_scores), b, PRECISION)
    at = GRAD_C + others[:, None] * grad_stride + tl.arange(0, N)[None, :]
    tl.store(at, grad_c.to(GRAD_C.dtype.element_ty), mask=others[:, None] < length)
    return grad_b


@triton.jit(do_not_specialize=['length', 'heads', 'group'])
def ssd_backward_scores(
    X, B, C, DT, S, GRAD_Y, GRAD_B, GRAD_C, length, heads, group, X_sb, X_sl, B_sb, B_sl, Y_sb, Y_sl,
    GB_sb, GB_sl, GC_sb, GC_sl, TWO: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Parts GRAD_B (groups, batch, L, N) and GRAD_C (groups, blocks, batch, L, N), of any row stride if one."""
    HALF: tl.constexpr = 0.5 if TWO else 1.0
    block, blocks = tl.program_id(0), tl.num_programs(0)
    tokens = block * BM + tl.arange(0, BM)
    inside = tokens < length
    first_head = tl.program_id(1) * group
    entry, entries = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    X += entry * X_sb
    C += entry * B_sb
    GRAD_Y += entry * Y_sb
    DT += entry * heads * length
    S += entry * (2 if TWO else 1) * heads * length
    part = tl.cast(entries, tl.int64) * length * N
    GRAD_B += tl.program_id(1) * part + entry * GB_sb
    GRAD_C += (tl.program_id(1) * blocks + block) * part + entry * GC_sb
    grad_0 = tl.zeros([BM, N0], tl.float32)
    grad_1, grad_2, grad_3 = grad_0, grad_0, grad_0
    if N1 > 0:
        grad_1 = tl.zeros([BM, N1], tl.float32)
    if N2 > 0:
        grad_2 = tl.zeros([BM, N2], tl.float32)
    if N3 > 0:
        grad_3 = tl.zeros([BM, N3], tl.float32)
    for head in range(first_head, tl.minimum(first_head + group, heads)):
        at, at_2 = head * length, (heads + head) * length
        x = load_tokens(X + head * P, tokens, length, X_sl, P)
        dt = load_scalars(DT + at, tokens, length)
        own = load_scalars(S + at, tokens, length)
        own_2 = own
        if TWO:
            own_2 = load_scalars(S + at_2, tokens, length)
        dy = GRAD_Y + head * P
        grad_0 = score_gradients(
            grad_0, x, dt, own, own_2, dy, S + at, S + at_2, 0, length, Y_sl, P, N0, TWO, PRECISION, FAST
        )
        if N1 > 0:
            grad_1 = score_gradients(
                grad_1, x, dt, own, own_2, dy, S + at, S + at_2, N0, length, Y_sl, P, N1, TWO, PRECISION, FAST
            )
        if N2 > 0:
            grad_2 = score_gradients(
                grad_2, x, dt, own, own_2, dy, S + at, S + at_2, N0 + N1, length, Y_sl, P, N2, TWO, PRECISION, FAST
            )
        if N3 > 0:
            grad_3 = score_gradients(
                grad_3, x, dt, own, own_2, dy, S + at, S + at_2, N0 + N1 + N2, length, Y_sl, P, N3, TWO, PRECISION, FAST
            )
    b = load_tokens(B + entry * B_sb, tokens, length, B_sl, N)
    grad_b = tl.zeros([BM, N], tl.float32)
    grad_b = store_matrix_gradients(grad_0 * HALF, b, grad_b, C, GRAD_C, 0, length, B_sl, GC_sl, N, N0, PRECISION)
    if N1 > 0:
        grad_b = store_matrix_gradients(grad_1 * HALF, b, grad_b, C, GRAD_C, N0, length, B_sl, GC_sl, N, N1, PRECISION)
    if N2 > 0:
        grad_b = store_matrix_gradients(
            grad_2 * HALF, b, grad_b, C, GRAD_C, N0 + N1, length, B_sl, GC_sl, N, N2, PRECISION
        )
    if N3 > 0:
        grad_b = store_matrix_gradients(
            grad_3 * HALF, b, grad_b, C, GRAD_C, N0 + N1 + N2, length, B_sl, GC_sl, N, N3, PRECISION
        )
    to = GRAD_B + tokens[:, None] * GB_sl + tl.arange(0, N)[None, :]
    tl.store(to, grad_b.to(GRAD_B.dtype.element_ty), mask=inside[:, None])
