"""Triton kernels of the bidirectional selective scan, channels-last, both directions in one launch.

Scan order: step s visits token s in the forward direction and token L - 1 - s in the backward direction. A cell is a
(direction, batch entry) pair; a program owns BD channels of one chunk of one cell and keeps their states (N, BD) in
registers. Chunks of a sequence run in parallel: states from zero (`LOCAL`), `carry`, then outputs from the true states.
Everything is computed in float32.

The layout of the state tensor decides the speed: each lane must hold whole channels with all N states in registers, so
that sums over N need no shuffles. Triton lays tensors out for their loads and stores, in vectors as wide as alignment
allows; an offset of which it knows only that VEC divides it (`zero`, not specialized) leaves VEC neighbouring channels
to a lane. Steps are taken four at a time, all loads first, because a load cannot pass an earlier store.
"""

import triton
import triton.language as tl

from .math import LN2, LOG2E, exp2, sigmoid, softplus

RUNTIME = ['length', 'chunk', 'num_chunks', 'zero']


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
    tl.store(DECAY + tl.program_id(1) * (DIM * N) + index, a * LOG2E, mask=mask)


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
    BOUNDS += (cell.to(tl.int64) * tl.cdiv(length, 4) + begin // 4) * N * DIM

    if CARRY and not LOCAL:
        h = tl.load(H + state, mask=mask, other=0.0)
    else:
        h = tl.zeros([NP, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    for s in range(begin, end, 4):
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
    groups = tl.cdiv(end - begin, 4)
    start = begin + 4 * (groups - 1)
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
    BOUNDS += (wide * tl.cdiv(length, 4) + start // 4) * N * DIM

    if CARRY:
        q = tl.load(Q + (wide * num_chunks + j) * N * DIM + state, mask=mask, other=0.0)
    else:
        q = tl.zeros([NP, BD], tl.float32)
    grad_A = tl.zeros([NP, BD], tl.float32)
    grad_bias = tl.zeros([BD], tl.float32)
    grad_skip = tl.zeros([BD], tl.float32)
    for g in range(0, groups):
        s = start - 4 * g
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
            PART_X + N,
            X_part,
            h1 * g0[None, :],
            h2 * g1[None, :],
            h3 * g2[None, :],
            h4 * g3[None, :],
            end - s,
            states,
            in_state,
            N,
            NP,
            BD,
            DOT,
            FAST,
        )
        q, p3, grad_A, grad_bias, grad_skip = step_backward(
            q,
            h3,
            e3,
            d3,
            v3,
            u3,
            b3,
            c3,
            g3,
            skip,
            grad_A,
            grad_bias,
            grad_skip,
            a,
            ok3,
            in_dim & ok3,
            GRAD_U + i3 * D_step + channels,
            GRAD_DELTA + i3 * D_step + channels,
            SOFTPLUS,
            FAST,
        )
        q, p2, grad_A, grad_bias, grad_skip = step_backward(
            q,
            h2,
            e2,
            d2,
            v2,
            u2,
            b2,
            c2,
            g2,
            skip,
            grad_A,
            grad_bias,
            grad_skip,
            a,
            ok2,
            in_dim & ok2,
            GRAD_U + i2 * D_step + channels,
            GRAD_DELTA + i2 * D_step + channels,
            SOFTPLUS,
            FAST,
        )
        q, p1, grad_A, grad_bias, grad_skip = step_backward(
            q,
            h1,
            e1,
            d1,
            v1,
            u1,
            b1,
            c1,
            g1,
            skip,
            grad_A,
            grad_bias,
            grad_skip,
            a,
            ok1,
            in_dim & ok1,
            GRAD_U + i1 * D_step + channels,
            GRAD_DELTA + i1 * D_step + channels,
            SOFTPLUS,
            FAST,
        )
        q, p0, grad_A, grad_bias, grad_skip = step_backward(
            q,
            h0,
            e0,
            d0,
            v0,
            u0,
            b0,
            c0,
            g0,
            skip,
            grad_A,
            grad_bias,
            grad_skip,
            a,
            True,
            in_dim,
            GRAD_U + channels,
            GRAD_DELTA + channels,
            SOFTPLUS,
            FAST,
        )
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
