"""The `torch` backend: the scan in plain aten, with chunks of the sequence advancing together.

Works wherever torch does (CPU without the native kernel, MPS, XPU, CUDA without Triton) in float32 or float64.
A sequence of L tokens becomes K chunks of T tokens, K and T about sqrt(L), so that 2 T + K vectorised steps replace L:
all chunks find the state they end in from a zero start, K steps carry the true states across chunks, and all chunks run
again from there. States are never kept for the backward pass: it computes them anew, a slice of batch and channels at
a time, so that training costs a few activations and a workspace of fixed size.

Shapes: B batch, L tokens, K chunks, T tokens a chunk, D channels, N state.
"""

import functools
import math
from typing import Any, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops.operands import Direction
from vim_timm.ops.plain import reference
from vim_timm.ops.plain.reference import compute_dtype, no_tokens, state_matrix, step_size
from vim_timm.ops.registration import Kernel, register, uncounted

# elements of one (B, L, D, N) workspace: about the last-level cache on a CPU, 256 MiB of float32 on an accelerator
_WORKSPACE_CPU = 2**21
_WORKSPACE_DEVICE = 2**26


def _slices(u: Tensor, A: Tensor) -> Iterator[Tuple[slice, slice]]:
    """Slices of batch and channels whose states fit the workspace."""
    batch, length, channels = u.shape
    state, device = A.shape[1], u.device
    budget = _WORKSPACE_CPU if device.type == 'cpu' else _WORKSPACE_DEVICE
    batch_step = max(1, min(batch, budget // (length * channels * state)))
    channel_step = channels if batch_step > 1 else max(1, min(channels, budget // (length * state)))
    for b in range(0, batch, batch_step):
        for d in range(0, channels, channel_step):
            yield slice(b, b + batch_step), slice(d, d + channel_step)


def _chunk(x: Tensor, chunks: int, size: int) -> Tensor:
    """(B, L, ...) -> (B, K, T, ...); the zeros after the last token (dt = 0) leave every state as it is."""
    pad = chunks * size - x.shape[1]
    if pad:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, pad])
    return x.reshape(x.shape[0], chunks, size, *x.shape[2:])


def _chunk_counts(length: int) -> Tuple[int, int]:
    size = max(1, math.isqrt(length))
    return -(-length // size), size


def _recur(decay: Tensor, x: Tensor, chunk_decay: Tensor, reverse: bool) -> None:
    """h_t = decay_t h_{t-1} + x_t along (K, T) of (B, K, T, D, N), written into x; `reverse` starts at the end."""
    chunks, size = x.shape[1:3]
    steps = range(size - 1, -1, -1) if reverse else range(size)
    end = torch.zeros_like(chunk_decay)
    for t in steps:
        end = torch.addcmul(x[:, :, t], decay[:, :, t], end)
    start = torch.zeros_like(end)
    order = range(chunks - 1, 0, -1) if reverse else range(chunks - 1)
    for k in order:
        start[:, k - 1 if reverse else k + 1] = torch.addcmul(end[:, k], chunk_decay[:, k], start[:, k])
    h = start
    for t in steps:
        h = x[:, :, t].addcmul_(decay[:, :, t], h)


def _recur_adjoint(decay: Tensor, g: Tensor, chunk_decay: Tensor, reverse: bool) -> None:
    """g_t += decay_{t+1} g_{t+1}: the gradient of every state of `_recur`, written into g."""
    chunks, size = g.shape[1:3]
    steps = range(size) if reverse else range(size - 1, -1, -1)
    end = torch.zeros_like(chunk_decay)
    for t in steps:
        end = (end + g[:, :, t]).mul_(decay[:, :, t])
    q = torch.zeros_like(end)
    order = range(chunks - 1) if reverse else range(chunks - 1, 0, -1)
    for k in order:
        q[:, k + 1 if reverse else k - 1] = torch.addcmul(end[:, k], chunk_decay[:, k], q[:, k])
    for t in steps:
        g[:, :, t] += q
        q = decay[:, :, t] * g[:, :, t]


def _states(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    reverse: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Chunked tokens -> decay, states, chunk decay: (B, K, T, D, N) twice and (B, K, D, N)."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    chunk_decay = torch.exp(dt.sum(2).unsqueeze(-1) * A)
    h = (dt * u).unsqueeze(-1) * B.unsqueeze(-2)
    _recur(decay, h, chunk_decay, reverse)
    return decay, h, chunk_decay


def _run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """y_t = C_t h_t, h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t for u, dt (B, L, D), A (D, N), B, C (B, L, N)."""
    length = u.shape[1]
    chunks, size = _chunk_counts(length)
    y = torch.empty_like(u)
    for b, d in _slices(u, A):
        u_, dt_, B_, C_ = (_chunk(x, chunks, size) for x in (u[b, :, d], dt[b, :, d], B[b], C[b]))
        _, h, _ = _states(u_, dt_, A[d], B_, reverse)
        y[b, :, d] = torch.matmul(h, C_.unsqueeze(-1)).squeeze(-1).flatten(1, 2)[:, :length]
    return y


def _run_backward(
    grad_y: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> Tuple[Tensor, ...]:
    """Gradients of u, dt, A, B and C."""
    length = u.shape[1]
    chunks, size = _chunk_counts(length)
    grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
    grad_A, grad_B, grad_C = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    for b, d in _slices(u, A):
        u_, dt_, B_, C_, gy = (_chunk(x, chunks, size) for x in (u[b, :, d], dt[b, :, d], B[b], C[b], grad_y[b, :, d]))
        decay, h, chunk_decay = _states(u_, dt_, A[d], B_, reverse)
        grad_C[b] += torch.matmul(gy.unsqueeze(-2), h).squeeze(-2).flatten(1, 2)[:, :length]
        # contiguous for the flattened view below: it would be a copy, and what is written into it lost
        gh = (gy.unsqueeze(-1) * C_.unsqueeze(-2)).contiguous()
        _recur_adjoint(decay, gh, chunk_decay, reverse)
        grad_B[b] += torch.matmul((dt_ * u_).unsqueeze(-2), gh).squeeze(-2).flatten(1, 2)[:, :length]
        grad_x = torch.matmul(gh, B_.unsqueeze(-1)).squeeze(-1)
        grad_u[b, :, d] = (grad_x * dt_).flatten(1, 2)[:, :length]
        # from here on gh holds the gradient of dt_t A: gh_t decay_t h_{t-1}
        gh.mul_(decay)
        gh_flat, h_flat = gh.flatten(1, 2), h.flatten(1, 2)
        if reverse:
            gh_flat[:, :-1].mul_(h_flat[:, 1:])
            gh_flat[:, -1].zero_()
        else:
            gh_flat[:, 1:].mul_(h_flat[:, :-1])
            gh_flat[:, 0].zero_()
        grad_dt[b, :, d] = (grad_x * u_ + (gh * A[d]).sum(-1)).flatten(1, 2)[:, :length]
        grad_A[d] += (gh * dt_.unsqueeze(-1)).sum((0, 1, 2))
    return grad_u, grad_dt, grad_A, grad_B, grad_C


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    return *torch.ops.vim_timm.torch_scan_backward.default(grad, *ctx.saved_tensors, ctx.reverse), None


_OPERANDS = 'Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, bool reverse'
register(
    'torch_scan',
    f'({_OPERANDS}) -> Tensor',
    f'(Tensor grad, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    Kernel(
        _run,
        lambda u, *_: torch.empty_like(u),
        _save,
        _differentiate,
        _run_backward,
        lambda grad, *inputs: tuple(torch.empty_like(x) for x in inputs[:-1]),
    ),
    uncounted,  # `reference.scan` counts what it makes of this
)


def _one_direction(direction: Direction, delta_softplus: bool, A_is_log: bool, reverse: bool) -> Tensor:
    u, delta, A, B, C, D, delta_bias = direction
    if not u.numel():
        return no_tokens(direction)
    dtype = compute_dtype(u)
    u, dt, B, C = u.to(dtype), step_size(delta.to(dtype), delta_bias, delta_softplus), B.to(dtype), C.to(dtype)
    y = torch.ops.vim_timm.torch_scan.default(u, dt, state_matrix(A, A_is_log, dtype), B, C, reverse)
    return y if D is None else torch.addcmul(y, D.to(dtype), u)


scan = functools.partial(reference.scan, one_direction=_one_direction)
conv = reference.conv
