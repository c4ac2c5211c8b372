"""The public operators: the bidirectional, channels-last pair that the layers call, and mamba-ssm's (B, D, L) forms.

Shapes: B batch, L tokens, D channels (d_inner), N state (d_state), W convolution width, G groups.
"""

from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F

from vim_timm.ops import export
from vim_timm.ops.dispatch import dispatch_conv, dispatch_scan
from vim_timm.ops.reference import compute_dtype, step_size


def bidirectional_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A_log: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor],
    delta_bias: Optional[torch.Tensor],
    u_b: Optional[torch.Tensor],
    delta_b: Optional[torch.Tensor],
    A_b_log: Optional[torch.Tensor],
    B_b: Optional[torch.Tensor],
    C_b: Optional[torch.Tensor],
    D_b: Optional[torch.Tensor],
    delta_bias_b: Optional[torch.Tensor],
    z: Optional[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Gated sum of a forward and a backward selective scan (Vision Mamba, arXiv 2401.09417, algorithm 1).

    out = scale * SiLU(z) * (scan(u, ...) + reversed scan(u_b, ...)), where each scan computes, with A = -exp(A_log) and
    dt = softplus(delta + delta_bias), h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and y_t = C_t h_t + D u_t. The backward
    direction's tensors are in token order like the forward's; its scan runs from the last token to the first.

    Args:
        u: Scan input (B, L, D); its dtype is the output's.
        delta: Step sizes before bias and softplus (B, L, D).
        A_log: Logarithm of the state matrix's negated diagonal (D, N).
        B: Input matrix (B, L, N).
        C: Output matrix (B, L, N).
        D: Skip weight (D).
        delta_bias: Step size bias (D).
        u_b: The same seven for the backward direction; None for a forward scan alone.
        z: Gate (B, L, D).
        scale: 0.5 averages the directions.

    Returns:
        (B, L, D). State and arithmetic are float32 (float64 for float64 inputs) under any autocast.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    if torch.jit.is_scripting():
        out = export.scan(
            u, delta, A_log, B, C, D, delta_bias, u_b, delta_b, A_b_log, B_b, C_b, D_b, delta_bias_b, z, scale, True,
            True,
        )  # fmt: skip
    else:
        out = dispatch_scan(
            u, delta, A_log, B, C, D, delta_bias, u_b, delta_b, A_b_log, B_b, C_b, D_b, delta_bias_b, z, scale, True,
            True,
        )  # fmt: skip
    return out


def bidirectional_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    weight_b: torch.Tensor,
    bias_b: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """SiLU of x's depthwise causal convolution, from the first token forward and from the last token backward.

    Args:
        x: Tokens (B, L, D).
        weight: Taps (D, W), the last one for the current token.
        bias: (D).
        weight_b: Taps of the backward direction (D, W).
        bias_b: (D).

    Returns:
        Two (B, L, D) in x's dtype.
    """
    if torch.jit.is_scripting():
        y, y_b = export.conv(x, weight, bias, weight_b, bias_b, True)
    else:
        y, y_b = dispatch_conv(x, weight, bias, weight_b, bias_b, True)
    assert y_b is not None
    return y, y_b


def causal_conv(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """The forward direction of `bidirectional_conv` alone, (B, L, D) -> (B, L, D)."""
    if torch.jit.is_scripting():
        y, _ = export.conv(x, weight, bias, None, None, True)
    else:
        y, _ = dispatch_conv(x, weight, bias, None, None, True)
    return y


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
        y_BLD = dispatch_scan(
            _channels_last(u_BLD),
            _channels_last(delta_BLD),
            A,
            _channels_last(B.transpose(1, 2)),
            _channels_last(C.transpose(1, 2)),
            D,
            delta_bias,
            z=None if z is None else _channels_last(z.transpose(1, 2)),
            delta_softplus=delta_softplus,
        )
    else:
        y_BLD = _scan_channel_per_state(u_BLD, delta_BLD, A, B, C, D, z, delta_bias, delta_softplus)
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
    y, _ = dispatch_conv(_channels_last(x.transpose(1, 2)), weight, bias, None, None, activation is not None)
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


def _scan_channel_per_state(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> torch.Tensor:
    """Grouped or constant B and C: every (channel, state) pair becomes a channel of its own with one state."""
    dtype = compute_dtype(u)
    batch, length, channels = u.shape
    state = A.shape[1]
    dt = step_size(delta.to(dtype), delta_bias, delta_softplus)
    x = u.to(dtype).unsqueeze(-1) * _per_channel(B, channels).to(dtype)
    every = (batch, length, channels, state)
    ones = torch.ones(batch, length, 1, dtype=dtype, device=u.device)
    h = dispatch_scan(
        _channels_last(x.expand(every).flatten(2)),
        _channels_last(dt.unsqueeze(-1).expand(every).flatten(2)),
        A.reshape(channels * state, 1),
        ones,
        ones,
        delta_softplus=False,
    )
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
    decay = torch.exp(later.unsqueeze(-1) * A.to(dtype))
    return (decay * (dt * u.to(dtype)).unsqueeze(-1) * _per_channel(B, u.shape[2]).to(dtype)).sum(1)
