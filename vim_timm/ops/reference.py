"""The law: what the two operators of a Mamba block compute, one token at a time, in plain aten.

Every other backend is compared with this file. It takes every dtype and device and has any derivative; it is slow.

Shapes: B batch, L tokens, D channels (d_inner), N state (d_state), W convolution width (d_conv).
"""

from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F


def unavailable() -> str:
    return ''


def unsupported(u: torch.Tensor, A: torch.Tensor) -> str:
    return ''


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Scans and their states are float32 at least: float64 inputs stay float64, all others become float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def step_size(delta: torch.Tensor, delta_bias: Optional[torch.Tensor], softplus: bool) -> torch.Tensor:
    """Mamba's discretisation step from the projected delta (torch's softplus: the identity above 20)."""
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def scan_one_direction(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor],
    delta_bias: Optional[torch.Tensor],
    delta_softplus: bool,
    A_is_log: bool,
    reverse: bool,
) -> torch.Tensor:
    """y_t = C_t h_t + D u_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t (Mamba, arXiv 2312.00752, eq. 2 and 4)."""
    dtype = compute_dtype(u)
    u, dt, B, C = u.to(dtype), step_size(delta.to(dtype), delta_bias, delta_softplus), B.to(dtype), C.to(dtype)
    A = -torch.exp(A.to(dtype)) if A_is_log else A.to(dtype)
    length = u.shape[1]
    h = torch.zeros([u.shape[0], u.shape[2], A.shape[1]], dtype=dtype, device=u.device)
    ys: List[torch.Tensor] = []
    for i in range(length):
        t = length - 1 - i if reverse else i
        decay = torch.exp(dt[:, t].unsqueeze(-1) * A)
        h = decay * h + (dt[:, t] * u[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    if reverse:
        ys.reverse()
    y = torch.stack(ys, dim=1)
    return y if D is None else y + D.to(dtype) * u


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor],
    delta_bias: Optional[torch.Tensor],
    u_b: Optional[torch.Tensor],
    delta_b: Optional[torch.Tensor],
    A_b: Optional[torch.Tensor],
    B_b: Optional[torch.Tensor],
    C_b: Optional[torch.Tensor],
    D_b: Optional[torch.Tensor],
    delta_bias_b: Optional[torch.Tensor],
    z: Optional[torch.Tensor],
    scale: float,
    delta_softplus: bool,
    A_is_log: bool,
    one_direction: Callable[..., torch.Tensor] = scan_one_direction,
) -> torch.Tensor:
    """scale * SiLU(z) * (forward scan + backward scan), in u's dtype. See `dispatch.bidirectional_scan`."""
    y = one_direction(u, delta, A, B, C, D, delta_bias, delta_softplus, A_is_log, False)
    if u_b is not None:
        y = y + one_direction(u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, delta_softplus, A_is_log, True)
    if scale != 1.0:
        y = y * scale
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def conv_one_direction(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    silu: bool,
    reverse: bool,
) -> torch.Tensor:
    """Depthwise causal convolution: weight[:, -1] meets the current token, W - 1 zeros stand before the first."""
    dtype = compute_dtype(x)
    width, length = weight.shape[1], x.shape[1]
    weight = weight.to(dtype)
    x = x.to(dtype)
    padded = F.pad(x, [0, 0, 0, width - 1] if reverse else [0, 0, width - 1, 0])
    y = torch.zeros_like(x)
    for k in range(width):
        tap = weight[:, width - 1 - k] if reverse else weight[:, k]
        y = y + padded[:, k : k + length] * tap
    if bias is not None:
        y = y + bias.to(dtype)
    return F.silu(y) if silu else y


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    weight_b: Optional[torch.Tensor],
    bias_b: Optional[torch.Tensor],
    silu: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Both directions' convolutions of the same tokens, in x's dtype. See `dispatch.bidirectional_conv`."""
    y = conv_one_direction(x, weight, bias, silu, False).to(x.dtype)
    if weight_b is None:
        return y, None
    return y, conv_one_direction(x, weight_b, bias_b, silu, True).to(x.dtype)
