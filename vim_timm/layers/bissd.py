"""The mixer of Vision Mamba 2: a gated Mamba-2 block whose convolution and state space see the image's grid.

Source: the state space dual of Mamba-2, arXiv 2405.21060, in its symmetric form, see `ops.symmetric_ssd`.
Shape suffixes: B batch, L tokens, C width (embed_dim), D channels (expand * C), N state (d_state), H heads.
"""

from typing import Any, Final, Literal, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from vim_timm.layers.autocast import product_dtype
from vim_timm.layers.norm import RmsNorm, at_least_float32
from vim_timm.layers.plain import is_its_class, is_plain, is_plain_depthwise, is_plain_projection, weights
from vim_timm.layers.rope import rope_tables, rotate
from vim_timm.layers.state_space import StateSpaceMixer, draw_out_proj, draw_step_bias
from vim_timm.layers.token_order import Layout, column_places, hidden_before, patch_moves, patch_places
from vim_timm.ops import GridConv, GridMixer, Ssd, fused_grid_mixer, grid_conv, probe_backends, symmetric_ssd
from vim_timm.ops.registration import count_depthwise

Orders = Literal['row', 'column', 'both']
ConvType = Literal['2d', '1d', 'none']

# range of the initial decay rates (Mamba-2)
_RATE_MIN, _RATE_MAX = 1.0, 16.0
_WIDTH_1D = 7
_ROPE_GRID = 14

torch.fx.wrap('symmetric_ssd')  # a tracer that goes into the mixer all the same records calls of it


def _padded_rows(weight: torch.Tensor, pad: int, dtype: torch.dtype) -> torch.Tensor:
    """`F.pad` of rows and its cast by one kernel, where autograd has not to see them: the rows hold anything, as nobody
    reads their products."""
    padded = weight.new_empty([weight.shape[0] + pad, weight.shape[1]], dtype=dtype)
    padded[: weight.shape[0]] = weight
    return padded


def _pads_rows(x: torch.Tensor) -> bool:
    """Whether rows of a product that are no multiple of 8 long are slow on x's device."""
    return not isinstance(x, torch.fx.Proxy) and x.is_cuda


@register_notrace_module  # what runs is decided by tensors, outside an FX graph
class BiSSD(StateSpaceMixer):
    """Gated mixer of symmetric state spaces, (B, L, C) -> (B, L, C).

    `in_proj` makes z, x, B, C and step sizes; x, B and C pass a depthwise convolution and SiLU; the state space sums x
    over all tokens by B, C and decays that follow the tokens by rows, by columns, or both; its sum is normed, gated by
    SiLU(z), and projected by `out_proj`.
    """

    rows: Final[bool]
    columns: Final[bool]
    rope: Final[bool]
    gap_decay: Final[bool]
    conv_type: Final[str]

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        headdim: int = 64,
        expand: float = 2,
        orders: Orders = 'both',
        conv: ConvType = '2d',
        bc_norm: bool = False,
        rope: bool = False,
        gap_decay: bool = False,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C of the tokens.
            d_state: State size N of each channel.
            headdim: Channels that share their decay.
            expand: Channels D = expand * C.
            orders: Orders in which states decay along the tokens; 'both' averages, with decay rates for each.
            conv: Depthwise convolution of x, B and C: '2d' 3 x 3 on the grid of patches, '1d' over 7 tokens, 'none'.
            bc_norm: Normalize B and C.
            rope: Turn B and C by their patches' rows and columns.
            gap_decay: Of a masked image, decay at a patch once more for each hidden one between it and the one visited
                before, as if these had its step size and no content.
            proj_drop: Dropout of the output.
            norm_eps: Epsilon of every norm.

        Raises:
            ValueError: an argument has an unknown value, or does not go with the others.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if orders not in ('row', 'column', 'both'):
            raise ValueError(f"orders must be 'row', 'column' or 'both', not {orders!r}")
        if conv not in ('2d', '1d', 'none'):
            raise ValueError(f"conv must be '2d', '1d' or 'none', not {conv!r}")
        d_inner = int(expand * dim)
        if d_inner == 0 or d_inner % headdim:
            fit = [p for p in (8, 16, 32, 48, 64, 96, 128) if d_inner and d_inner % p == 0]
            raise ValueError(
                f'headdim {headdim} does not divide the {d_inner} channels of width {dim}, expand {expand:g}: '
                + (f'use one of {fit}' if fit else f'let width times expand be a multiple of {headdim}')
            )
        if rope and d_state % 4:
            raise ValueError(f'rope needs a d_state divisible by 4, not {d_state}: use {d_state + -d_state % 4}')
        if gap_decay and orders == 'both':
            raise ValueError("gap_decay needs one order, 'row' or 'column': patches have other gaps in the other")
        probe_backends()
        self.d_inner, self.d_state, self.headdim, self.num_heads = d_inner, d_state, headdim, d_inner // headdim
        self.rows, self.columns = orders != 'column', orders != 'row'
        self.rope, self.gap_decay = rope, gap_decay
        self.rope_grid = _ROPE_GRID  # side to which positions are scaled
        self.conv_type = conv
        # of masked images in the fused mixer, see `_fused`
        self.wants_neighbours = conv == '2d' and not (bc_norm or rope or gap_decay)
        channels = d_inner + 2 * d_state
        self.in_proj = nn.Linear(dim, d_inner + channels + self.num_heads, bias=False, **dd)
        self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **dd) if conv == '2d' else None
        self.conv1d = (
            nn.Conv1d(channels, channels, _WIDTH_1D, padding=_WIDTH_1D // 2, groups=channels, **dd)
            if conv == '1d'
            else None
        )
        self.b_norm = RmsNorm(d_state, eps=norm_eps, **dd) if bc_norm else None
        self.c_norm = RmsNorm(d_state, eps=norm_eps, **dd) if bc_norm else None
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(int(self.rows) + int(self.columns), self.num_heads, **dd))
        self.D = nn.Parameter(torch.empty(self.num_heads, **dd))
        self.norm = RmsNorm(d_inner, eps=norm_eps, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0.0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the state space: decay rates uniform in 1 to 16, D = 1, step sizes log-uniform in 0.001 to 0.1."""
        with torch.no_grad():
            rates = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(_RATE_MIN, _RATE_MAX)
            self.A_log.copy_(rates.log())
            self.D.fill_(1.0)
            draw_step_bias(self.dt_bias)

    @torch.jit.ignore
    def init_weights(self, depth: int, scheme: str) -> None:
        """Draw out_proj anew, smaller in a deeper model; all else keeps what its constructor drew."""
        draw_out_proj(self.out_proj.weight, 2 * depth)  # an MLP stands beside each

    def _project(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """z, x, B, C and step sizes, on a GPU in rows of a multiple of 8: others cost products three times as long."""
        if not torch.jit.is_scripting():
            pad = -(2 * (self.d_inner + self.d_state) + self.num_heads) % 8
            if pad and _pads_rows(x_BLC) and is_plain(self.in_proj):
                weight, bias = self.in_proj.weight, self.in_proj.bias
                if torch.is_grad_enabled():
                    weight = F.pad(weight, [0, 0, 0, pad])
                else:
                    weight = _padded_rows(weight, pad, product_dtype(x_BLC))
                return F.linear(x_BLC, weight, None if bias is None else F.pad(bias, [0, pad]))
        return self.project(x_BLC)

    def _fused(self, zxbcdt_BLE: torch.Tensor, layout: Layout) -> Optional[torch.Tensor]:
        """What `forward` makes of in_proj's output, in fused kernels; None where none can."""
        layers: Any = self._modules  # each as an attribute costs the host several times as much
        conv, norm, out_proj = layers.get('conv2d'), layers['norm'], layers['out_proj']
        first = len(layout.prefix)
        if conv is None or self.b_norm is not None or self.rope or (self.gap_decay and layout.keep is not None):
            return None
        if layout.prefix != list(range(first)) or not is_plain_depthwise(conv, 1) or conv.kernel_size != (3, 3):
            return None
        if type(norm) is not RmsNorm or not is_its_class(norm) or norm.eps is None:
            return None
        taps, bias = weights(conv)
        # autocast may multiply what a wrapped in_proj made in float32 in another dtype
        inside = is_plain_projection(out_proj) and product_dtype(zxbcdt_BLE) == zxbcdt_BLE.dtype
        y = fused_grid_mixer(
            GridMixer(
                zxbcdt_BLE,
                taps.flatten(1),
                bias,
                self.dt_bias,
                self.A_log,
                self.D,
                norm.weight,
                norm.eps,
                self.d_state,
                self.rows,
                first,
                layout.grid[0],
                layout.grid[1],
                layout.keep,
                layout.neighbours,
                weights(out_proj)[0] if inside else None,
            )
        )
        return y if y is None or inside else out_proj(y)

    def _on_image(self, x_BLX: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """SiLU of the 2-d convolution of an image, all of whose patches are there."""
        conv = self.conv2d
        assert conv is not None
        if not torch.jit.is_scripting():
            traced = isinstance(x_BLX, torch.fx.Proxy)
            if not traced and is_plain_depthwise(conv, 1) and conv.kernel_size == (3, 3):
                fused = grid_conv(GridConv(x_BLX, conv.weight.flatten(1), conv.bias, 0, height, width))
                if fused is not None:
                    return fused
        image_BXHW = x_BLX.transpose(1, 2).unflatten(2, [height, width])
        y_BXHW = conv(image_BXHW)
        if not torch.jit.is_scripting():
            count_depthwise(y_BXHW, image_BXHW, conv)
        return F.silu(y_BXHW.flatten(2).transpose(1, 2))

    def _on_grid(self, x_BLX: torch.Tensor, layout: Layout) -> torch.Tensor:
        """`_on_image` of the patches that are there among zeros; a class token is an image of one pixel."""
        height, width = layout.grid
        batch, length, channels = x_BLX.shape
        places = patch_places(layout, length, x_BLX.device)
        patches = x_BLX.index_select(1, places) if len(layout.prefix) > 0 else x_BLX.contiguous()
        keep = layout.keep
        if keep is not None:
            index = keep.unsqueeze(-1).expand(-1, -1, channels)
            image = torch.zeros([batch, height * width, channels], dtype=x_BLX.dtype, device=x_BLX.device)
            patches = image.scatter(1, index, patches)
        y = self._on_image(patches, height, width)
        if keep is not None:
            y = y.gather(1, keep.unsqueeze(-1).expand(-1, -1, channels))
        for place in layout.prefix:
            alone = self._on_image(x_BLX[:, place : place + 1], 1, 1)
            y = torch.cat([y[:, :place], alone, y[:, place:]], dim=1)
        return y

    def _convolve(self, x_BLX: torch.Tensor, layout: Layout) -> torch.Tensor:
        """SiLU of the convolution, where there is one."""
        if self.conv_type == '2d':
            return self._on_grid(x_BLX, layout)
        if self.conv1d is not None:
            y_BXL = self.conv1d(x_BLX.transpose(1, 2))
            if not torch.jit.is_scripting():
                count_depthwise(y_BXL, x_BLX, self.conv1d)
            return F.silu(y_BXL.transpose(1, 2))
        return F.silu(x_BLX)

    def _turn(self, B_BLN: torch.Tensor, C_BLN: torch.Tensor, layout: Layout) -> Tuple[torch.Tensor, torch.Tensor]:
        """B and C turned by the rows and columns of their patches; class tokens are not."""
        height, width = layout.grid
        patches = height * width
        cos, sin = rope_tables(layout.grid, self.d_state, self.rope_grid, 0, patches, B_BLN.device)
        tables = torch.stack([cos, sin]).unsqueeze(1)  # (2, 1 or B, M, N)
        keep = layout.keep
        if keep is not None:
            tables = tables[:, 0][:, keep]
        for place in layout.prefix:
            none = torch.stack([torch.ones_like(tables[0, :, :1]), torch.zeros_like(tables[0, :, :1])])
            tables = torch.cat([tables[:, :, :place], none, tables[:, :, place:]], dim=2)
        return rotate(B_BLN, tables[0], tables[1]), rotate(C_BLN, tables[0], tables[1])

    def _decay_over_gaps(
        self, delta_BLH: torch.Tensor, B_BLN: torch.Tensor, layout: Layout
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Step sizes multiplied by 1 + the hidden patches before them, and B divided by it: what is added stays."""
        times_BL1 = 1 + hidden_before(layout, self.columns).unsqueeze(-1)
        bias_H = at_least_float32(self.dt_bias)
        dt_BLH = times_BL1 * F.softplus(delta_BLH + bias_H).clamp(min=1e-20)
        longer_BLH = dt_BLH + torch.log(-torch.expm1(-dt_BLH)) - bias_H  # softplus undone
        return longer_BLH.to(delta_BLH.dtype), (B_BLN / times_BL1).to(B_BLN.dtype)

    def forward(self, x_BLC: torch.Tensor, layout: Layout) -> torch.Tensor:
        zxbcdt_BLE = self._project(x_BLC)
        if not torch.jit.is_scripting():
            traced = isinstance(zxbcdt_BLE, torch.fx.Proxy)
            fused_BLC = None if traced else self._fused(zxbcdt_BLE, layout)
            if fused_BLC is not None:
                return self.proj_drop(fused_BLC)
        channels = self.d_inner + 2 * self.d_state
        zxbcdt_BLE = zxbcdt_BLE[..., : self.d_inner + channels + self.num_heads]
        z_BLD, xbc_BLX, delta_BLH = zxbcdt_BLE.split([self.d_inner, channels, self.num_heads], dim=-1)
        xbc_BLX = self._convolve(xbc_BLX, layout)
        x_BLD, B_BLN, C_BLN = xbc_BLX.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        if self.b_norm is not None and self.c_norm is not None:
            B_BLN, C_BLN = self.b_norm(B_BLN).to(x_BLD.dtype), self.c_norm(C_BLN).to(x_BLD.dtype)
        if self.rope:
            B_BLN, C_BLN = self._turn(B_BLN, C_BLN, layout)
        if self.gap_decay and layout.keep is not None:
            delta_BLH, B_BLN = self._decay_over_gaps(delta_BLH, B_BLN, layout)
        columns: Optional[torch.Tensor] = None
        moves: Optional[torch.Tensor] = None
        if self.columns:
            columns = column_places(layout, x_BLC.device)
        if len(layout.prefix) > 0:
            moves = patch_moves(layout, x_BLC.shape[1], x_BLC.device)
        x_BLHP = x_BLD.unflatten(-1, [self.num_heads, self.headdim])
        y_BLD = symmetric_ssd(
            Ssd(x_BLHP, delta_BLH, self.A_log, B_BLN, C_BLN, self.D, self.dt_bias, self.rows, columns, moves)
        ).flatten(2)
        return self.proj_drop(self.out_proj(self.norm(y_BLD) * F.silu(z_BLD)))
