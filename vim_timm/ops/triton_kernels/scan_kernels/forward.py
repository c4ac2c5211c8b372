"""The scan itself: decays, states and ungated outputs of both directions, and states from chunk to chunk."""

import triton
import triton.language as tl

from ..math import LOG2E, exp2
from .steps import FASTEST, GROUP, RUNTIME, advance, load_row, step_size, within


@triton.jit
def decays(
    A_f, A_b, DECAY,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, A_IS_LOG: tl.constexpr,
):  # fmt: skip
    """DECAY (directions, N, DIM) = A * log2(e) from A (DIM, N), so that a step's decay is exp2(step * DECAY)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reverse = tl.program_id(1) > 0
    A = A_b if reverse else A_f
    mask = index < DIM * N
    a = tl.load(A + index % DIM * N + index // DIM, mask=mask, other=0.0).to(tl.float32)
    if A_IS_LOG:
        a = -tl.exp(a)
    a *= LOG2E
    a = tl.where(a < -FASTEST, -FASTEST, a)
    tl.store(DECAY + tl.program_id(1) * (DIM * N) + index, a, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def scan_forward(
    u_f, u_b, delta_f, delta_b, DECAY, B_f, B_b, C_f, C_b, D_f, D_b, bias_f, bias_b, H, S, Y, BOUNDS, batch, length,
    chunk, num_chunks, u_sb, u_sl, delta_sb, delta_sl, X_sb, X_sl, zero,
    DIM: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
    LOCAL: tl.constexpr, CARRY: tl.constexpr, KEEP: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """LOCAL: the state at the end of each chunk from a zero start (H) and the chunk's sum of steps (S).
    Otherwise y of each direction before the gate (Y), from the states in H when CARRY; with KEEP also the state before
    every fourth step (BOUNDS), from which the backward pass starts again.
    H (cells, chunks, N, DIM), S (cells, chunks, DIM), Y (cells, L, DIM), BOUNDS (cells, ceil(L / 4), N, DIM)."""
    tl.static_assert(GROUP == 4, 'four steps are written out')
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
    sign = tl.where(reverse, -1, 1).to(tl.int64)
    first = tl.where(reverse, length - 1 - begin, begin).to(tl.int64)
    u += entry * u_sb + first * u_sl
    delta += entry * delta_sb + first * delta_sl
    B += entry * X_sb + first * X_sl
    C += entry * X_sb + first * X_sl
    Y += (cell.to(tl.int64) * length + first) * DIM
    u_step = sign * u_sl
    delta_step = sign * delta_sl
    X_step = sign * X_sl
    Y_step = sign * DIM
    H += (cell.to(tl.int64) * num_chunks + j) * N * DIM
    BOUNDS += (cell.to(tl.int64) * tl.cdiv(length, GROUP) + begin // GROUP) * N * DIM

    if CARRY and not LOCAL:
        h = tl.load(H + state, mask=mask, other=0.0)
    else:
        h = tl.zeros([NP, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    for s in range(begin, end, GROUP):
        ok1 = s + 1 < end
        ok2 = s + 2 < end
        ok3 = s + 3 < end
        i1 = ok1.to(tl.int64)
        i2 = tl.where(ok2, 2, 0).to(tl.int64)
        i3 = tl.where(ok3, 3, 0).to(tl.int64)
        u0 = tl.load(u + channels, mask=in_dim, other=0.0)
        u1 = tl.load(u + i1 * u_step + channels, mask=in_dim, other=0.0)
        u2 = tl.load(u + i2 * u_step + channels, mask=in_dim, other=0.0)
        u3 = tl.load(u + i3 * u_step + channels, mask=in_dim, other=0.0)
        d0 = tl.load(delta + channels, mask=in_dim, other=0.0)
        d1 = tl.load(delta + i1 * delta_step + channels, mask=in_dim, other=0.0)
        d2 = tl.load(delta + i2 * delta_step + channels, mask=in_dim, other=0.0)
        d3 = tl.load(delta + i3 * delta_step + channels, mask=in_dim, other=0.0)
        b0 = load_row(B, zero, states, in_state, ALIGN, N, NP)
        b1 = load_row(B, i1 * X_step, states, in_state, ALIGN, N, NP)
        b2 = load_row(B, i2 * X_step, states, in_state, ALIGN, N, NP)
        b3 = load_row(B, i3 * X_step, states, in_state, ALIGN, N, NP)
        if not LOCAL:
            c0 = load_row(C, zero, states, in_state, ALIGN, N, NP)
            c1 = load_row(C, i1 * X_step, states, in_state, ALIGN, N, NP)
            c2 = load_row(C, i2 * X_step, states, in_state, ALIGN, N, NP)
            c3 = load_row(C, i3 * X_step, states, in_state, ALIGN, N, NP)
            if KEEP:
                tl.store(BOUNDS + state, h, mask=mask)
                BOUNDS += N * DIM
        x0 = u0.to(tl.float32)
        x1 = u1.to(tl.float32)
        x2 = u2.to(tl.float32)
        x3 = u3.to(tl.float32)
        s0 = step_size(d0.to(tl.float32), bias, True, SOFTPLUS, FAST)
        s1 = step_size(d1.to(tl.float32), bias, ok1, SOFTPLUS, FAST)
        s2 = step_size(d2.to(tl.float32), bias, ok2, SOFTPLUS, FAST)
        s3 = step_size(d3.to(tl.float32), bias, ok3, SOFTPLUS, FAST)
        h = advance(h, s0, x0, b0, a, FAST)
        if not LOCAL:
            y0 = tl.sum(h * c0[:, None], 0) + skip * x0
        h = advance(h, s1, x1, b1, a, FAST)
        if not LOCAL:
            y1 = tl.sum(h * c1[:, None], 0) + skip * x1
        h = advance(h, s2, x2, b2, a, FAST)
        if not LOCAL:
            y2 = tl.sum(h * c2[:, None], 0) + skip * x2
        h = advance(h, s3, x3, b3, a, FAST)
        if LOCAL:
            total += s0 + s1 + s2 + s3
        else:
            y3 = tl.sum(h * c3[:, None], 0) + skip * x3
            tl.store(Y + channels, y0.to(Y.dtype.element_ty), mask=in_dim)
            tl.store(Y + i1 * Y_step + channels, y1.to(Y.dtype.element_ty), mask=in_dim & ok1)
            tl.store(Y + i2 * Y_step + channels, y2.to(Y.dtype.element_ty), mask=in_dim & ok2)
            tl.store(Y + i3 * Y_step + channels, y3.to(Y.dtype.element_ty), mask=in_dim & ok3)
        u += 4 * u_step
        delta += 4 * delta_step
        B += 4 * X_step
        C += 4 * X_step
        Y += 4 * Y_step
    if LOCAL:
        tl.store(H + state, h, mask=mask)
        tl.store(S + (cell.to(tl.int64) * num_chunks + j) * DIM + channels, total, mask=in_dim)


@triton.jit(do_not_specialize=RUNTIME)
def carry(
    DECAY, H_in, H_out, S, batch, num_chunks, zero,
    DIM: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, REVERSE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """From each chunk's contribution (H_in) to the state that enters each chunk (H_out).

    REVERSE: from the last chunk to the first, for the gradient of the state."""
    channels = tl.program_id(0) * BD + tl.arange(0, BD)
    cell = tl.program_id(1)
    states = tl.arange(0, NP)
    in_dim = within(channels, DIM, BD)
    mask = within(states, N, NP)[:, None] & in_dim[None, :]
    reverse = cell >= batch
    state = zero * VEC + channels[None, :] + states[:, None] * DIM
    a = tl.load(DECAY + reverse.to(tl.int32) * (N * DIM) + state, mask=mask, other=0.0)
    row = cell.to(tl.int64) * num_chunks
    step = 1
    if REVERSE:
        row += num_chunks - 1
        step = -1
    H_in += row * N * DIM
    H_out += row * N * DIM
    S += row * DIM
    h = tl.zeros([NP, BD], tl.float32)
    for _ in range(0, num_chunks):
        local = tl.load(H_in + state, mask=mask, other=0.0)
        total = tl.load(S + channels, mask=in_dim, other=0.0)
        tl.store(H_out + state, h, mask=mask)
        h = exp2(total[None, :] * a, FAST) * h + local
        H_in += step * N * DIM
        H_out += step * N * DIM
        S += step * DIM
