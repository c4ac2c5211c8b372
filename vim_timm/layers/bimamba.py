"""The bidirectional Mamba mixer: what one Vision Mamba block computes between its norm and its residual sum.

Source: Vision Mamba, arXiv 2401.09417, algorithm 1; Mamba, arXiv 2312.00752, section 3.4.
Shape suffixes: B batch, L tokens, C width (embed_dim), D channels (expand * C), N state (d_state), R dt_rank.
"""

import math
from typing import Any, Final, Literal, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from vim_timm.layers.plain import is_plain, is_plain_depthwise, is_plain_projection, parameters, weights
from vim_timm.layers.state_space import StateSpaceMixer, draw_out_proj, draw_step_bias
from vim_timm.ops import bidirectional_conv, bidirectional_scan, causal_conv, fused_mixer, probe_backends
from vim_timm.ops.operands import Direction, Mixer, Taps, Weights

ScanType = Literal['bidirectional', 'shared', 'forward']

# a tracer that goes into the mixer all the same records calls of these
for _name in ('bidirectional_conv', 'bidirectional_scan', 'causal_conv'):
    torch.fx.wrap(_name)


def _call_conv(conv: nn.Module, x_BLD: torch.Tensor, width: int, reverse: bool) -> torch.Tensor:
    """SiLU of a convolution that is to be called: it sees (B, D, W - 1 + L), zeros before the first token."""
    x_BDL = (x_BLD.flip(1) if reverse else x_BLD).transpose(1, 2)
    y_BLD = F.silu(conv(F.pad(x_BDL, [width - 1, 0]))).transpose(1, 2)
    return (y_BLD.flip(1) if reverse else y_BLD).contiguous()


@register_notrace_module  # what runs is decided by tensors, outside an FX graph
class BiMamba(StateSpaceMixer):
    """Gated, bidirectional selective state space mixer, (B, L, C) -> (B, L, C).

    `scan` names the directions: 'bidirectional' (the original's v2) gives the backward direction its own convolution,
    projections and state matrix (the `_b` parameters); 'shared' (v1) only its own state matrix, on the reversed tokens
    of the one convolution; 'forward' has no backward direction.
    """

    bidirectional: Final[bool]
    shared: Final[bool]

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: Union[int, Literal['auto']] = 'auto',
        conv_bias: bool = True,
        proj_bias: bool = False,
        scan: ScanType = 'bidirectional',
        halve: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C of the tokens.
            d_state: State size N of each channel.
            d_conv: Width of the causal convolution.
            expand: Channels D = expand * C.
            dt_rank: Rank R of the step size projection, 'auto' for ceil(C / 16).
            conv_bias: Bias in the convolutions.
            proj_bias: Bias in in_proj and out_proj.
            scan: Directions, see the class.
            halve: Average the two directions ('bidirectional' only) instead of adding them.
            proj_drop: Dropout of the output.

        Raises:
            ValueError: unknown `scan`, or no channels.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if scan not in ('bidirectional', 'shared', 'forward'):
            raise ValueError(f"scan must be 'bidirectional', 'shared' or 'forward', not {scan!r}")
        probe_backends()
        d_inner = int(expand * dim)
        if d_inner < 1 or (dt_rank != 'auto' and dt_rank < 1):
            raise ValueError(f'expand {expand} and dt_rank {dt_rank} leave a mixer of width {dim} without channels')
        self.d_state = d_state
        self.d_conv = d_conv
        self.dt_rank = math.ceil(dim / 16) if dt_rank == 'auto' else dt_rank
        self.bidirectional = scan == 'bidirectional'
        self.shared = scan == 'shared'
        self.scale = 0.5 if self.bidirectional and halve else 1.0

        def conv() -> nn.Conv1d:
            return nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias, **dd)

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, **dd)

        self.in_proj = linear(dim, 2 * d_inner, proj_bias)
        self.conv1d = conv()
        self.x_proj = linear(d_inner, self.dt_rank + 2 * d_state, False)
        self.dt_proj = linear(self.dt_rank, d_inner, True)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(d_inner, **dd))
        if self.bidirectional:
            self.conv1d_b = conv()
            self.x_proj_b = linear(d_inner, self.dt_rank + 2 * d_state, False)
            self.dt_proj_b = linear(self.dt_rank, d_inner, True)
            self.D_b = nn.Parameter(torch.empty(d_inner, **dd))
        if self.bidirectional or self.shared:
            self.A_b_log = nn.Parameter(torch.empty(d_inner, d_state, **dd))
        self.out_proj = linear(d_inner, dim, proj_bias)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0.0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the state space parameters: A = -(1..N), D = 1, forward step sizes log-uniform in 0.001 to 0.1.

        The backward direction's step sizes keep Linear's weights and a zero bias, as in the original.
        """
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
        with torch.no_grad():
            self.A_log.copy_(torch.log(states).expand_as(self.A_log))
            self.D.fill_(1.0)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            draw_step_bias(self.dt_proj.bias)
            if self.bidirectional:
                self.D_b.fill_(1.0)
                nn.init.zeros_(self.dt_proj_b.bias)
            if self.bidirectional or self.shared:
                self.A_b_log.copy_(self.A_log)

    @torch.jit.ignore
    def init_weights(self, depth: int, scheme: str) -> None:
        """Draw the projections anew from the original's distributions, out_proj smaller in a deeper model.

        Args:
            scheme: '' the published initialization, 'early' the first release's.
        """
        early = scheme == 'early'
        for name, linear in self.named_children():
            if not isinstance(linear, nn.Linear):
                continue
            if early:
                nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None and (early or name != 'dt_proj'):
                nn.init.zeros_(linear.bias)
        draw_out_proj(self.out_proj.weight, depth)

    def _direction(self, u_BLD: torch.Tensor) -> Direction:
        """Operands of the forward scan over its convolved tokens.

        A plain dt_proj leaves its bias to the scan, which adds it in float32; one that is wrapped, hooked or quantized
        is called whole.
        """
        dt_BLR, B_BLN, C_BLN = self.x_proj(u_BLD).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if not torch.jit.is_scripting():
            if not is_plain(self.dt_proj):
                return Direction(u_BLD, self.dt_proj(dt_BLR), self.A_log, B_BLN, C_BLN, self.D, None)
        delta_BLD = F.linear(dt_BLR, self.dt_proj.weight)
        return Direction(u_BLD, delta_BLD, self.A_log, B_BLN, C_BLN, self.D, self.dt_proj.bias)

    def _direction_b(self, u_BLD: torch.Tensor) -> Direction:
        """`_direction` of the backward scan (TorchScript passes no modules as arguments)."""
        dt_BLR, B_BLN, C_BLN = self.x_proj_b(u_BLD).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if not torch.jit.is_scripting():
            if not is_plain(self.dt_proj_b):
                return Direction(u_BLD, self.dt_proj_b(dt_BLR), self.A_b_log, B_BLN, C_BLN, self.D_b, None)
        delta_BLD = F.linear(dt_BLR, self.dt_proj_b.weight)
        return Direction(u_BLD, delta_BLD, self.A_b_log, B_BLN, C_BLN, self.D_b, self.dt_proj_b.bias)

    def _convolve(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """SiLU of the convolution of the tokens, from the first on."""
        if not torch.jit.is_scripting():
            if not is_plain_depthwise(self.conv1d, 0):
                return _call_conv(self.conv1d, x_BLD, self.d_conv, False)
        return causal_conv(x_BLD, self.conv1d.weight.squeeze(1), self.conv1d.bias)

    def _convolve_both(self, x_BLD: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """`_convolve`, and the same with the backward direction's convolution from the last token on."""
        if not torch.jit.is_scripting():
            if not (is_plain_depthwise(self.conv1d, 0) and is_plain_depthwise(self.conv1d_b, 0)):
                u_b_BLD = _call_conv(self.conv1d_b, x_BLD, self.d_conv, True)
                return _call_conv(self.conv1d, x_BLD, self.d_conv, False), u_b_BLD
        taps = Taps(self.conv1d.weight.squeeze(1), self.conv1d.bias)
        return bidirectional_conv(x_BLD, taps, Taps(self.conv1d_b.weight.squeeze(1), self.conv1d_b.bias))

    def _directions(self, x_BLD: torch.Tensor) -> Tuple[Direction, Optional[Direction]]:
        """Operands of both scans, the second None for a forward scan alone."""
        if self.bidirectional:
            u_BLD, u_b_BLD = self._convolve_both(x_BLD)
            return self._direction(u_BLD), self._direction_b(u_b_BLD)
        forward = self._direction(self._convolve(x_BLD))
        if self.shared:
            return forward, Direction(
                forward.u, forward.delta, self.A_b_log, forward.B, forward.C, forward.D, forward.delta_bias
            )
        return forward, None

    def _fused(self, xz_BLE: torch.Tensor) -> Optional[torch.Tensor]:
        """What `forward` makes of in_proj's output, in one kernel; None where none can."""
        if not self.bidirectional:
            return None
        layers: Any = self._modules  # each as an attribute costs the host several times as much
        conv, x_proj, dt_proj = layers['conv1d'], layers['x_proj'], layers['dt_proj']
        conv_b, x_proj_b, dt_proj_b = layers['conv1d_b'], layers['x_proj_b'], layers['dt_proj_b']
        if not (is_plain_depthwise(conv, 0) and is_plain_depthwise(conv_b, 0)):
            return None
        if not (is_plain_projection(x_proj) and is_plain_projection(x_proj_b)):  # a kernel has no place for its bias
            return None
        if not (is_plain(dt_proj) and is_plain(dt_proj_b)):
            return None
        (taps, bias), (taps_b, bias_b) = weights(conv), weights(conv_b)
        A_log, D, A_b_log, D_b = parameters(self, 'A_log', 'D', 'A_b_log', 'D_b')
        forward = Weights(taps, bias, weights(x_proj)[0], *weights(dt_proj), A_log, D)
        backward = Weights(taps_b, bias_b, weights(x_proj_b)[0], *weights(dt_proj_b), A_b_log, D_b)
        out_proj = layers['out_proj']
        if is_plain(out_proj):
            return fused_mixer(Mixer(xz_BLE, forward, backward, self.scale, *weights(out_proj)))
        y_BLD = fused_mixer(Mixer(xz_BLE, forward, backward, self.scale))
        return None if y_BLD is None else out_proj(y_BLD)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        xz_BLE = self.project(x_BLC)
        if not torch.jit.is_scripting():
            traced = isinstance(xz_BLE, torch.fx.Proxy)
            fused_BLC = None if traced else self._fused(xz_BLE)
            if fused_BLC is not None:
                proj_drop: Any = self._modules['proj_drop']
                return proj_drop(fused_BLC)
        x_BLD, z_BLD = xz_BLE.chunk(2, dim=-1)
        forward, backward = self._directions(x_BLD)
        y_BLD = bidirectional_scan(forward, backward, z_BLD, self.scale)
        return self.proj_drop(self.out_proj(y_BLD))
