"""The law: what the operators of a Mamba block compute, one token at a time, in plain aten.

Every other backend is compared with this file. It takes every dtype and device and has any derivative; it is slow.
Shapes: see `ops.operands`.
"""

import math
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.operands import Direction, Taps
from vim_timm.ops.registration import conv_flops, count, scan_flops

LARGEST_LOG = 60.0  # of decay rates: leaves a step's gradient, a sum of products with them, in float32's range
FASTEST = math.exp(LARGEST_LOG) * math.log2(math.e)  # the same rate as kernels have it, whose exponentials are of two


def compute_dtype(x: Tensor) -> torch.dtype:
    """Scans and their states are float32 at least: float64 inputs stay float64, all others become float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def step_size(delta: Tensor, delta_bias: Optional[Tensor], softplus: bool) -> Tensor:
    """Mamba's discretisation step from the projected delta (torch's softplus: the identity above 20)."""
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def state_matrix(A: Tensor, is_log: bool, dtype: torch.dtype, largest_log: float = LARGEST_LOG) -> Tensor:
    """The state matrix's diagonal (D, N); minus infinity becomes a finite number whose decays are 0 all the same, with
    derivatives that are 0 as well, where those of infinity are not a number."""
    A = A.to(dtype)
    return -torch.exp(A.clamp(max=largest_log)) if is_log else A.clamp(min=-math.exp(largest_log))


def no_tokens(direction: Direction) -> Tensor:
    """The result of a scan of no tokens (B, 0, D), which all operands lead to, so that all have a gradient of zeros."""
    u, delta, A, B, C, D, delta_bias = direction
    y = u * delta * (B * C).sum(-1, keepdim=True) * A.sum(-1)
    if D is not None:
        y = y * D
    if delta_bias is not None:
        y = y * delta_bias
    return y.to(compute_dtype(u))


def scan_one_direction(direction: Direction, delta_softplus: bool, A_is_log: bool, reverse: bool) -> Tensor:
    """y_t = C_t h_t + D u_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t (Mamba, arXiv 2312.00752, eq. 2 and 4)."""
    u, delta, A, B, C, D, delta_bias = direction
    if u.shape[1] == 0:
        return no_tokens(direction)
    dtype = compute_dtype(u)
    u, dt, B, C = u.to(dtype), step_size(delta.to(dtype), delta_bias, delta_softplus), B.to(dtype), C.to(dtype)
    A = state_matrix(A, A_is_log, dtype)
    length = u.shape[1]
    h = torch.zeros([u.shape[0], u.shape[2], A.shape[1]], dtype=dtype, device=u.device)
    ys: List[Tensor] = []
    for i in range(length):
        t = length - 1 - i if reverse else i
        decay = torch.exp(dt[:, t].unsqueeze(-1) * A)
        h = decay * h + (dt[:, t] * u[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    if reverse:
        ys.reverse()
    y = torch.stack(ys, dim=1)
    return y if D is None else y + D.to(dtype) * u


def scan(given: operands.Scan, one_direction: Callable[..., Tensor] = scan_one_direction) -> Tensor:
    """scale * SiLU(z) * (forward scan + backward scan), in u's dtype. See `ops.scan`."""
    forward, backward, z, scale, delta_softplus, A_is_log = given
    y = one_direction(forward, delta_softplus, A_is_log, False)
    if backward is not None:
        y = y + one_direction(backward, delta_softplus, A_is_log, True)
    if scale != 1.0:
        y = y * scale
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return count(y.to(forward.u.dtype), scan_flops, given)


def check_taps(x: Tensor, taps: Taps) -> None:
    """Raise ValueError for taps of another shape than (D, W), or a bias of another one than (D)."""
    weight, bias = taps
    if weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(f'the taps of {x.shape[2]} channels have the shape {list(weight.shape)}')
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f'the bias of {x.shape[2]} channels has the shape {list(bias.shape)}')


def conv_one_direction(x: Tensor, taps: Taps, silu: bool, reverse: bool) -> Tensor:
    """Depthwise causal convolution: weight[:, -1] meets the current token, W - 1 zeros stand before the first."""
    check_taps(x, taps)
    weight, bias = taps
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


def conv(given: operands.Conv) -> Tuple[Tensor, Optional[Tensor]]:
    """Both directions' convolutions of the same tokens, in x's dtype. See `ops.conv`."""
    x, forward, backward, silu = given
    y = conv_one_direction(x, forward, silu, False).to(x.dtype)
    if not torch.jit.is_scripting():
        count(y, conv_flops, given)
    if backward is None:
        return y, None
    return y, conv_one_direction(x, backward, silu, True).to(x.dtype)


def mixer(
    given: operands.Mixer,
    scan: Callable[[operands.Scan], Tensor] = scan,
    conv: Callable[[operands.Conv], Tuple[Tensor, Optional[Tensor]]] = conv,
) -> Tensor:
    """Convolutions, projections, gated scans and, where it is given, out_proj. See `ops.mixer`."""
    xz, forward, backward, scale, out_proj, out_bias = given
    x, z = xz.chunk(2, dim=-1)

    def taps(weights: operands.Weights) -> Taps:
        return Taps(weights.conv if weights.conv.dim() == 2 else weights.conv.squeeze(1), weights.conv_bias)

    def project(u: Optional[Tensor], weights: operands.Weights) -> Direction:
        assert u is not None
        state = weights.A_log.shape[1]
        dt, B, C = F.linear(u, weights.x_proj).split([weights.dt.shape[1], state, state], dim=-1)
        return Direction(u, F.linear(dt, weights.dt), weights.A_log, B, C, weights.D, weights.dt_bias)

    u, u_b = conv(operands.Conv(x, taps(forward), taps(backward)))
    y = scan(operands.Scan(project(u, forward), project(u_b, backward), z, scale))
    return y if out_proj is None else F.linear(y, out_proj, out_bias)
