"""Vision Mamba 2 whose blocks of both orders have own B and C for each: a choice that is compared, not offered.

Source: the registered mixer of both orders is `layers.BiSSD` with B and C that the orders share. Here each has its own,
as the two directions of Vim (arXiv 2401.09417) have; rates of decay are own ones in both. No fused kernel computes
that, so `Shared`, the registered mixer kept from its fused kernel, is what its learning can be compared with.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_model

from vim_timm.layers.bissd import BiSSD
from vim_timm.layers.token_order import Layout, column_places
from vim_timm.models.vision_mamba2 import VisionMamba2, vim2_tiny_patch4_32
from vim_timm.ops import Ssd, symmetric_ssd


class Shared(BiSSD):
    """The registered mixer, composed of its parts."""

    def _fused(self, zxbcdt_BLE: torch.Tensor, layout: Layout) -> None:
        return None


class Own(BiSSD):
    """Both orders, each with its own B and C, for images without class tokens, (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int, d_state: int, headdim: int, expand: float) -> None:
        super().__init__(dim, d_state, headdim, expand, orders='both')
        channels = self.d_inner + 4 * d_state
        self.in_proj = nn.Linear(dim, self.d_inner + channels + self.num_heads, bias=False)
        self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x_BLC: torch.Tensor, layout: Layout) -> torch.Tensor:
        states = [self.d_state] * 4
        sizes = [self.d_inner, self.d_inner + sum(states), self.num_heads]
        z_BLD, xbc_BLX, delta_BLH = self.in_proj(x_BLC).split(sizes, dim=-1)
        x_BLD, *BC_BLN = self._convolve(xbc_BLX, layout).split([self.d_inner, *states], dim=-1)
        x_BLHP = x_BLD.unflatten(-1, [self.num_heads, self.headdim])
        by_rows, by_columns = (
            symmetric_ssd(Ssd(x_BLHP, delta_BLH, A_log, B, C, self.D, self.dt_bias, columns is None, columns))
            for A_log, B, C, columns in zip(
                self.A_log.split(1), BC_BLN[::2], BC_BLN[1::2], (None, column_places(layout, x_BLC.device))
            )
        )
        y_BLD = (by_rows + by_columns).flatten(2) / 2
        return self.out_proj(self.norm(y_BLD) * F.silu(z_BLD))


def _with_mixers(kind: Any, pretrained: bool, kwargs: dict[str, Any]) -> VisionMamba2:
    """`vim2_tiny_patch4_32` with both orders in every block, and mixers of a kind in its mixers' places."""
    model = vim2_tiny_patch4_32(pretrained, orders='both', **kwargs)
    for block in model.blocks:
        old = block.mixer
        block.mixer = kind(model.embed_dim, old.d_state, old.headdim, old.d_inner / model.embed_dim)
    model.init_weights(needs_reset=False)
    return model


@register_model
def vim2_tiny_patch4_32_own(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Own B and C for each order of a block."""
    return _with_mixers(Own, pretrained, kwargs)


@register_model
def vim2_tiny_patch4_32_shared(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """B and C that both orders of a block share, without its fused kernel."""
    return _with_mixers(Shared, pretrained, kwargs)
