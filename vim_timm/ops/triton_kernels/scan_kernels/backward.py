"""Gradients of the scan, against time."""

import triton
import triton.language as tl

from ..math import LN2, exp2, sigmoid
from .steps import GROUP, RUNTIME, load_row, step_size, within


@triton.jit(do_not_specialize=RUNTIME)
def grad_states(
    delta_f, delta_b, DECAY, C_f, C_b, bias_f, bias_b, GRAD_Y, Q, batch, length, chunk, num_chunks, scale, delta_sb,
    delta_sl, X_sb, X_sl, zero,
    DIM: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Q (cells, chunks, N, DIM): the gradient of the state that enters each chunk, from zero at the chunk's end."""
    channels = tl.program_id(0) * BD + tl.arange(0, BD)
    j = tl.program_id(1)
    cell = tl.program_id(2)
    states = tl.arange(0, NP)
    in_dim = within(channels, DIM, BD)
    in_state = within(states, N, NP)
    mask = in_state[:, None] & in_dim[None, :]
    reverse = cell >= batch
    entry = (cell % batch).to(tl.int64)
    if reverse:
        delta, C, bias_p = delta_b, C_b, bias_b
    else:
        delta, C, bias_p = delta_f, C_f, bias_f
    state = zero * VEC + channels[None, :] + states[:, None] * DIM
    a = tl.load(DECAY + reverse.to(tl.int32) * (N * DIM) + state, mask=mask, other=0.0)
    bias = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_p + channels, mask=in_dim, other=0.0).to(tl.float32)
    begin = j * chunk
    end = tl.minimum(begin + chunk, length)
    sign = tl.where(reverse, -1, 1).to(tl.int64)
    last = tl.where(reverse, length - end, end - 1).to(tl.int64)
    delta += entry * delta_sb + last * delta_sl
    C += entry * X_sb + last * X_sl
    GRAD_Y += (entry * length + last) * DIM
    q = tl.zeros([NP, BD], tl.float32)
    for _ in range(begin, end):
        grad = tl.load(GRAD_Y + channels, mask=in_dim, other=0.0).to(tl.float32) * scale
        d = step_size(tl.load(delta + channels, mask=in_dim, other=0.0).to(tl.float32), bias, True, SOFTPLUS, FAST)
        c = load_row(C, zero, states, in_state, ALIGN, N, NP)
        q = exp2(d[None, :] * a, FAST) * (grad[None, :] * c[:, None] + q)
        delta -= sign * delta_sl
        C -= sign * X_sl
        GRAD_Y -= sign * DIM
    tl.store(Q + (cell.to(tl.int64) * num_chunks + j) * N * DIM + state, q, mask=mask)


@triton.jit
def store_sums(
    P, step, p0, p1, p2, p3, left, states, in_state,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums over channels of four steps' (NP, BD) products to P[step * i + state]; with DOT as products with ones on the
    matrix unit, else by shuffles."""
    if DOT:
        # Triton's interpreter multiplies the bits of bfloat16 numbers, not their values.
        kind: tl.constexpr = tl.bfloat16 if FAST else tl.float32
        stack = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # (NP, BD, i // 2, i % 2)
        stack = tl.reshape(tl.permute(stack, (2, 3, 0, 1)), (4 * NP, BD))
        ones = tl.full([BD, 8], 1.0, tl.float32).to(kind)
        high = stack.to(kind)  # eight bits; with the next eight the sums are no less accurate than mamba-ssm's
        low = (stack - high.to(tl.float32)).to(kind)
        sums = tl.max(tl.dot(low, ones, tl.dot(high, ones)), 1)
        row = tl.arange(0, 4 * NP)
        i = row // NP
        state = row % NP
        tl.store(P + i * step + state, sums, mask=(state < N) & (i < left))
    else:
        tl.store(P + states, tl.sum(p0, 1), mask=in_state)
        tl.store(P + step + states, tl.sum(p1, 1), mask=in_state & (1 < left))
        tl.store(P + 2 * step + states, tl.sum(p2, 1), mask=in_state & (2 < left))
        tl.store(P + 3 * step + states, tl.sum(p3, 1), mask=in_state & (3 < left))


@triton.jit
def step_backward(
    q, h, e, d, v, u, b, c, grad, skip, grad_A, grad_bias, grad_skip, a, ok, mask, GRAD_U, GRAD_DELTA,
    SOFTPLUS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One step against time. h: the state before it; q: the gradient of the state after it from later steps. Returns q
    for the step before, the product whose sum over channels is B's gradient, and the running sums."""
    grad_h = grad[None, :] * c[:, None] + q
    grad_x = tl.sum(grad_h * b[:, None], 0)
    q = e * grad_h
    w = q * h
    grad_d = u * grad_x + tl.sum(w * a, 0) * LN2
    grad_A += w * d[None, :]
    if SOFTPLUS:
        grad_d *= sigmoid(v, FAST)
    grad_d = tl.where(ok, grad_d, 0.0)
    grad_bias += grad_d
    grad_skip += grad * u
    tl.store(GRAD_U, (d * grad_x + grad * skip).to(GRAD_U.dtype.element_ty), mask=mask)
    tl.store(GRAD_DELTA, grad_d.to(GRAD_DELTA.dtype.element_ty), mask=mask)
    return q, grad_h * (d * u)[None, :], grad_A, grad_bias, grad_skip


@triton.jit(do_not_specialize=RUNTIME)
def scan_backward(
    u_f, u_b, delta_f, delta_b, DECAY, B_f, B_b, C_f, C_b, D_f, D_b, bias_f, bias_b, GRAD_Y, BOUNDS, Q, GRAD_U,
    GRAD_DELTA, PART_X, PART_A, PART_V, batch, cells, length, chunk, num_chunks, scale, u_sb, u_sl, delta_sb, delta_sl,
    X_sb, X_sl, zero,
    DIM: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
    CARRY: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, A_IS_LOG: tl.constexpr,
    DOT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients from GRAD_Y (batch, L, DIM) times scale, four steps at a time against time: the states of a group are
    computed again from BOUNDS, and their decays serve both recurrences.
    GRAD_U, GRAD_DELTA (cells, L, DIM); partial sums, added outside in a fixed order: PART_X (channel blocks, cells,
    L, 2, N) for B and C, PART_A (cells, chunks, DIM, N), PART_V (cells, chunks, 2, DIM) for D and the bias."""
    tl.static_assert(GROUP == 4, 'four steps are written out')
    block = tl.program_id(0)
    channels = block * BD + tl.arange(0, BD)
    j = tl.program_id(1)
    cell = tl.program_id(2)
    states = tl.arange(0, NP)
    in_dim = within(channels, DIM, BD)
    in_state = within(states, N, NP)
    mask = in_state[:, None] & in_dim[None, :]
    reverse = cell >= batch
    entry = (cell % batch).to(tl.int64)
    if reverse:
        u, delta, B, C, D, bias_p = u_b, delta_b, B_b, C_b, D_b, bias_b
    else:
        u, delta, B, C, D, bias_p = u_f, delta_f, B_f, C_f, D_f, bias_f
    state = zero * VEC + channels[None, :] + states[:, None] * DIM
    a = tl.load(DECAY + reverse.to(tl.int32) * (N * DIM) + state, mask=mask, other=0.0)
    bias = tl.zeros([BD], tl.float32)
    skip = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_p + channels, mask=in_dim, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + channels, mask=in_dim, other=0.0).to(tl.float32)

    begin = j * chunk
    end = tl.minimum(begin + chunk, length)
    groups = tl.cdiv(end - begin, GROUP)
    start = begin + GROUP * (groups - 1)
    sign = tl.where(reverse, -1, 1).to(tl.int64)
    first = tl.where(reverse, length - 1 - start, start).to(tl.int64)
    wide = cell.to(tl.int64)
    u += entry * u_sb + first * u_sl
    delta += entry * delta_sb + first * delta_sl
    B += entry * X_sb + first * X_sl
    C += entry * X_sb + first * X_sl
    GRAD_Y += (entry * length + first) * DIM
    GRAD_U += (wide * length + first) * DIM
    GRAD_DELTA += (wide * length + first) * DIM
    PART_X += ((block.to(tl.int64) * cells + cell) * length + first) * 2 * N
    u_step = sign * u_sl
    delta_step = sign * delta_sl
    X_step = sign * X_sl
    D_step = sign * DIM
    X_part = sign * 2 * N
    BOUNDS += (wide * tl.cdiv(length, GROUP) + start // GROUP) * N * DIM

    if CARRY:
        q = tl.load(Q + (wide * num_chunks + j) * N * DIM + state, mask=mask, other=0.0)
    else:
        q = tl.zeros([NP, BD], tl.float32)
    grad_A = tl.zeros([NP, BD], tl.float32)
    grad_bias = tl.zeros([BD], tl.float32)
    grad_skip = tl.zeros([BD], tl.float32)
    for g in range(0, groups):
        s = start - GROUP * g
        ok1 = s + 1 < end
        ok2 = s + 2 < end
        ok3 = s + 3 < end
        i1 = ok1.to(tl.int64)
        i2 = tl.where(ok2, 2, 0).to(tl.int64)
        i3 = tl.where(ok3, 3, 0).to(tl.int64)
        h0 = tl.load(BOUNDS + state, mask=mask, other=0.0)
        u0 = tl.load(u + channels, mask=in_dim, other=0.0).to(tl.float32)
        u1 = tl.load(u + i1 * u_step + channels, mask=in_dim, other=0.0).to(tl.float32)
        u2 = tl.load(u + i2 * u_step + channels, mask=in_dim, other=0.0).to(tl.float32)
        u3 = tl.load(u + i3 * u_step + channels, mask=in_dim, other=0.0).to(tl.float32)
        v0 = tl.load(delta + channels, mask=in_dim, other=0.0).to(tl.float32) + bias
        v1 = tl.load(delta + i1 * delta_step + channels, mask=in_dim, other=0.0).to(tl.float32) + bias
        v2 = tl.load(delta + i2 * delta_step + channels, mask=in_dim, other=0.0).to(tl.float32) + bias
        v3 = tl.load(delta + i3 * delta_step + channels, mask=in_dim, other=0.0).to(tl.float32) + bias
        g0 = tl.load(GRAD_Y + channels, mask=in_dim, other=0.0).to(tl.float32) * scale
        g1 = tl.load(GRAD_Y + i1 * D_step + channels, mask=in_dim & ok1, other=0.0).to(tl.float32) * scale
        g2 = tl.load(GRAD_Y + i2 * D_step + channels, mask=in_dim & ok2, other=0.0).to(tl.float32) * scale
        g3 = tl.load(GRAD_Y + i3 * D_step + channels, mask=in_dim & ok3, other=0.0).to(tl.float32) * scale
        b0 = load_row(B, zero, states, in_state, ALIGN, N, NP)
        b1 = load_row(B, i1 * X_step, states, in_state, ALIGN, N, NP)
        b2 = load_row(B, i2 * X_step, states, in_state, ALIGN, N, NP)
        b3 = load_row(B, i3 * X_step, states, in_state, ALIGN, N, NP)
        c0 = load_row(C, zero, states, in_state, ALIGN, N, NP)
        c1 = load_row(C, i1 * X_step, states, in_state, ALIGN, N, NP)
        c2 = load_row(C, i2 * X_step, states, in_state, ALIGN, N, NP)
        c3 = load_row(C, i3 * X_step, states, in_state, ALIGN, N, NP)
        d0 = step_size(v0, 0.0, True, SOFTPLUS, FAST)
        d1 = step_size(v1, 0.0, ok1, SOFTPLUS, FAST)
        d2 = step_size(v2, 0.0, ok2, SOFTPLUS, FAST)
        d3 = step_size(v3, 0.0, ok3, SOFTPLUS, FAST)
        e0 = exp2(d0[None, :] * a, FAST)
        e1 = exp2(d1[None, :] * a, FAST)
        e2 = exp2(d2[None, :] * a, FAST)
        e3 = exp2(d3[None, :] * a, FAST)
        h1 = e0 * h0 + (d0 * u0)[None, :] * b0[:, None]
        h2 = e1 * h1 + (d1 * u1)[None, :] * b1[:, None]
        h3 = e2 * h2 + (d2 * u2)[None, :] * b2[:, None]
        h4 = e3 * h3 + (d3 * u3)[None, :] * b3[:, None]
        store_sums(
            PART_X + N, X_part, h1 * g0[None, :], h2 * g1[None, :], h3 * g2[None, :], h4 * g3[None, :], end - s,
            states, in_state, N, NP, BD, DOT, FAST,
        )  # fmt: skip
        q, p3, grad_A, grad_bias, grad_skip = step_backward(
            q, h3, e3, d3, v3, u3, b3, c3, g3, skip, grad_A, grad_bias, grad_skip, a, ok3, in_dim & ok3,
            GRAD_U + i3 * D_step + channels, GRAD_DELTA + i3 * D_step + channels, SOFTPLUS, FAST,
        )  # fmt: skip
        q, p2, grad_A, grad_bias, grad_skip = step_backward(
            q, h2, e2, d2, v2, u2, b2, c2, g2, skip, grad_A, grad_bias, grad_skip, a, ok2, in_dim & ok2,
            GRAD_U + i2 * D_step + channels, GRAD_DELTA + i2 * D_step + channels, SOFTPLUS, FAST,
        )  # fmt: skip
        q, p1, grad_A, grad_bias, grad_skip = step_backward(
            q, h1, e1, d1, v1, u1, b1, c1, g1, skip, grad_A, grad_bias, grad_skip, a, ok1, in_dim & ok1,
            GRAD_U + i1 * D_step + channels, GRAD_DELTA + i1 * D_step + channels, SOFTPLUS, FAST,
        )  # fmt: skip
        q, p0, grad_A, grad_bias, grad_skip = step_backward(
            q, h0, e0, d0, v0, u0, b0, c0, g0, skip, grad_A, grad_bias, grad_skip, a, True, in_dim,
            GRAD_U + channels, GRAD_DELTA + channels, SOFTPLUS, FAST,
        )  # fmt: skip
        store_sums(PART_X, X_part, p0, p1, p2, p3, end - s, states, in_state, N, NP, BD, DOT, FAST)
        u -= 4 * u_step
        delta -= 4 * delta_step
        B -= 4 * X_step
        C -= 4 * X_step
        GRAD_Y -= 4 * D_step
        GRAD_U -= 4 * D_step
        GRAD_DELTA -= 4 * D_step
        PART_X -= 4 * X_part
        BOUNDS -= N * DIM
    if A_IS_LOG:
        grad_A *= a * LN2
    row = wide * num_chunks + j
    tl.store(PART_A + row * N * DIM + channels[None, :] * N + states[:, None], grad_A, mask=mask)
    tl.store(PART_V + row * 2 * DIM + channels, grad_skip, mask=in_dim)
    tl.store(PART_V + row * 2 * DIM + DIM + channels, grad_bias, mask=in_dim)


@triton.jit(do_not_specialize=['size'])
def sum_parts(PARTS, OUT, size, PARTS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (size) = PARTS (PARTS_COUNT, size) added in order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(PARTS_COUNT):
        total += tl.load(PARTS + i * size.to(tl.int64) + index, mask=mask, other=0.0)
    tl.store(OUT + index, total.to(OUT.dtype.element_ty), mask=mask)
