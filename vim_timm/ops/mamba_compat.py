"""Drop-ins for mamba-ssm's `selective_scan_fn` and causal-conv1d's `causal_conv1d_fn`, (B, D, L), on any backend.

Shapes: see `ops.operands`, and G groups of B and C.
"""

from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F

from vim_timm.ops import conv, scan
from vim_timm.ops.operands import Conv, Direction, Scan, Taps
from vim_timm.ops.plain.reference import compute_dtype, state_matrix, step_size


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor] = None,
    z: Optional[torch.Tensor] = None,
    delta_bias: Optional[torch.Tensor] = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """Drop-in for mamba-ssm's `selective_scan_fn` with real A (Mamba, arXiv 2312.00752, algorithm 2), on any backend.

    Args:
        u: (B, D, L).
        delta: (B, D, L).
        A: (D, N).
        B: (B, N, L), grouped (B, G, N, L), or constant (D, N).
        C: As B, independently.
        D: Skip weight (D).
        z: Gate (B, D, L).
        delta_bias: Added to delta (D).
        delta_softplus: Apply softplus to delta after the bias.
        return_last_state: Also return the state after the last token.

    Returns:
        out (B, D, L) in u's dtype, and with `return_last_state` the pair of it and the state (B, D, N) in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit together, or A is complex.
    """
    _check_scan_shapes(u, delta, A, B, C, D, z, delta_bias)
    u_BLD, delta_BLD = u.transpose(1, 2), delta.transpose(1, 2)
    B, C = (x.squeeze(1) if x.ndim == 4 and x.shape[1] == 1 else x for x in (B, C))
    if B.ndim == 3 and C.ndim == 3:
        B_BLN, C_BLN = (_channels_last(x.transpose(1, 2)) for x in (B, C))
        forward = Direction(_channels_last(u_BLD), _channels_last(delta_BLD), A, B_BLN, C_BLN, D, delta_bias)
        z_BLD = None if z is None else _channels_last(z.transpose(1, 2))
        y_BLD = scan.run(Scan(forward, None, z_BLD, delta_softplus=delta_softplus, A_is_log=False))
    else:
        y_BLD = _scan_channel_per_state(Direction(u_BLD, delta_BLD, A, B, C, D, delta_bias), z, delta_softplus)
    out = y_BLD.transpose(1, 2).contiguous()
    if not return_last_state:
        return out
    return out, _last_state(u_BLD, delta_BLD, A, B, delta_bias, delta_softplus)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    activation: Optional[str] = None,
) -> torch.Tensor:
    """Drop-in for causal-conv1d's `causal_conv1d_fn` without its sequence arguments, on any backend.

    Args:
        x: (B, D, L).
        weight: (D, W), any width.
        bias: (D).
        activation: None, or 'silu' (also called 'swish').

    Returns:
        (B, D, L) in x's dtype: out[..., t] = sum_k weight[:, W - 1 - k] x[..., t - k] + bias.

    Raises:
        ValueError: another activation, or shapes that do not fit together.
    """
    if activation not in (None, 'silu', 'swish'):
        raise ValueError(f"activation must be None, 'silu' or 'swish', not {activation!r}")
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f'x (B, D, L) and weight (D, W) do not fit: {tuple(x.shape)} and {tuple(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'bias must be ({weight.shape[0]},), not {tuple(bias.shape)}')
    y, _ = conv.run(Conv(_channels_last(x.transpose(1, 2)), Taps(weight, bias), silu=activation is not None))
    return y.transpose(1, 2).contiguous()


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_scan_shapes(u, delta, A, B, C, D, z, delta_bias) -> None:
    if u.ndim != 3:
        raise ValueError(f'u must be (B, D, L), not {tuple(u.shape)}')
    batch, channels, length = u.shape
    if A.is_complex():
        raise ValueError('complex A is not supported: use a real one')
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f'A must be (D, N) with D = {channels}, not {tuple(A.shape)}')
    state = A.shape[1]
    for name, x in (('delta', delta), ('z', z)):
        if x is not None and x.shape != u.shape:
            raise ValueError(f'{name} must have the shape of u, {tuple(u.shape)}, not {tuple(x.shape)}')
    for name, x in (('D', D), ('delta_bias', delta_bias)):
        if x is not None and x.shape != (channels,):
            raise ValueError(f'{name} must be ({channels},), not {tuple(x.shape)}')
    for name, x in (('B', B), ('C', C)):
        fits = (
            x.shape == (channels, state)
            or x.shape == (batch, state, length)
            or x.ndim == 4
            and x.shape[0] == batch
            and x.shape[2:] == (state, length)
            and channels % x.shape[1] == 0
        )
        if not fits:
            raise ValueError(
                f'{name} must be (B, N, L) = {(batch, state, length)}, (B, G, N, L) with G dividing {channels}, '
                f'or (D, N) = {(channels, state)}, not {tuple(x.shape)}'
            )


def _per_channel(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Any layout of B or C -> (B, L, D, N), or (1, 1, D, N) when constant."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        return x.permute(0, 2, 1).unsqueeze(2)
    return x.permute(0, 3, 1, 2).repeat_interleave(channels // x.shape[1], dim=2)


def _scan_channel_per_state(direction: Direction, z: Optional[torch.Tensor], delta_softplus: bool) -> torch.Tensor:
    """Grouped or constant B and C: every (channel, state) pair becomes a channel of its own with one state."""
    u, delta, A, B, C, D, delta_bias = direction
    dtype = compute_dtype(u)
    batch, length, channels = u.shape
    state = A.shape[1]
    dt = step_size(delta.to(dtype), delta_bias, delta_softplus)
    x = u.to(dtype).unsqueeze(-1) * _per_channel(B, channels).to(dtype)
    every = (batch, length, channels, state)
    ones = torch.ones(batch, length, 1, dtype=dtype, device=u.device)
    x, dt = (_channels_last(t.expand(every).flatten(2)) for t in (x, dt.unsqueeze(-1)))
    states = Direction(x, dt, A.reshape(channels * state, 1), ones, ones, None, None)
    h = scan.run(Scan(states, delta_softplus=False, A_is_log=False))
    y = (h.view(every) * _per_channel(C, channels).to(dtype)).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.transpose(1, 2).to(dtype))
    return y.to(u.dtype)


def _last_state(u, delta, A, B, delta_bias, delta_softplus) -> torch.Tensor:
    """h_L = sum_t exp(A sum_{s > t} dt_s) dt_t B_t u_t, (B, D, N)."""
    dtype = compute_dtype(u)
    dt = step_size(delta.to(dtype), delta_bias, delta_softplus)
    later = dt.flip(1).cumsum(1).flip(1) - dt
    decay = torch.exp(later.unsqueeze(-1) * state_matrix(A, False, dtype))
    return (decay * (dt * u.to(dtype)).unsqueeze(-1) * _per_channel(B, u.shape[2]).to(dtype)).sum(1)
