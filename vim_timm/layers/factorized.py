"""Attention over the tokens of many-channel images, along patches and along channels in turn.

Tokens are (B, C, T, D): B images, C channels, T = 1 + M tokens a channel (its class token, then its patches), D wide.
"""

from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, Mlp

from vim_timm.layers.attention import Attention, step_by_step, wants_steps
from vim_timm.layers.decoder import PixelDecoder
from vim_timm.layers.norm import LayerNorm
from vim_timm.layers.pos_embed import CPU, sincos_pos_embed, sincos_positions


def factorized_positions(dim: int, channels: int, grid: Tuple[int, int], device: torch.device = CPU) -> torch.Tensor:
    """Sin-cos positions of patches plus those of channels, (1, C, 1 + M, dim) in float32; class tokens have the latter.

    Raises:
        ValueError: dim is not divisible by 4.
    """
    patches = sincos_pos_embed(dim, grid, num_prefix_tokens=1, device=device)
    numbers = torch.arange(channels, device=device, dtype=patches.dtype)
    return (sincos_positions(numbers, dim)[:, None] + patches).float()[None]


class ChannelAttention(nn.Module):
    """Attention over the channels at each patch, and over the class tokens."""

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: torch.Tensor,
        places: Optional[torch.Tensor] = None,
        visible: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """(B, C, T, D) -> (B, C, T, D).

        Args:
            places: Places (B, C, T) of the tokens among those of their channel, where some are left out.
            visible: Which of all places (B, C, P) have a token that may be attended to; None for all.
        """
        B, C, T, D = x.shape
        qkv = self.qkv(x)
        if places is not None and visible is not None:
            # the tokens of a patch stand at different T in different channels
            index = places.unsqueeze(-1).expand(-1, -1, -1, 3 * D)
            qkv = qkv.new_zeros([B, C, visible.shape[2], 3 * D]).scatter(2, index, qkv)
        P = qkv.shape[2]
        qkv = qkv.reshape(B, C, P, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).reshape(3, B * P, self.num_heads, C, D // self.num_heads).unbind(0)
        mask: Optional[torch.Tensor] = None
        if visible is not None:
            # a token attends to itself in any case: a row without any would be NaN
            itself = torch.eye(C, dtype=torch.bool, device=x.device)
            mask = visible.transpose(1, 2).reshape(B * P, 1, 1, C) | itself
        if torch.jit.is_scripting():  # alone in its condition: TorchScript compiles all of `not is_scripting() and ...`
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif wants_steps():
            y = step_by_step(q, k, v, mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.reshape(B, P, self.num_heads, C, D // self.num_heads).permute(0, 3, 1, 2, 4).reshape(B, C, P, D)
        if places is not None and visible is not None:
            y = y.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, D))
        return self.proj_drop(self.proj(y))


class FactorizedBlock(nn.Module):
    """Half a feed-forward, attention over a channel's patches, over a patch's channels, half a feed-forward."""

    wants_layout = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'{num_heads} heads do not divide a width of {dim}')
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f'mlp_ratio must be more than 0, at least 1 / {dim} of this width, not {mlp_ratio}')
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp1 = Mlp(dim, hidden, drop=proj_drop, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.patch_attn = Attention(dim, num_heads, qkv_bias=True, proj_drop=proj_drop, **dd)
        self.norm3 = LayerNorm(dim, eps=1e-6, **dd)
        self.channel_attn = ChannelAttention(dim, num_heads, proj_drop, **dd)
        self.norm4 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp2 = Mlp(dim, hidden, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        places: Optional[torch.Tensor] = None,
        visible: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """(B, C, T, D) -> (B, C, T, D); the masks are those of `ChannelAttention`."""
        x = x + self.drop_path(0.5 * self.mlp1(self.norm1(x)))
        x = x + self.drop_path(self.patch_attn(self.norm2(x).flatten(0, 1)).view_as(x))
        x = x + self.drop_path(self.channel_attn(self.norm3(x), places, visible))
        return x + self.drop_path(0.5 * self.mlp2(self.norm4(x)))


class FactorizedDecoder(PixelDecoder):
    """Features of visible tokens (B, C, 1 + K, in_dim) -> the values of every patch (B, C, M, out_dim)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            in_dim: Width of the encoder's tokens.
            out_dim: Values of a patch of one channel.
            dim: Width of the decoder.
            depth: Number of its blocks.
            num_heads: Attention heads of a block.

        Raises:
            ValueError: a width that does not fit the heads or the positions.
        """
        dd = {'device': device, 'dtype': dtype}
        factorized_positions(dim, 1, (1, 1))  # refuses a width that it cannot take
        blocks = [FactorizedBlock(dim, num_heads, **dd) for _ in range(depth)]
        super().__init__(in_dim, out_dim, dim, blocks, **dd)
        self.init_weights()

    def forward(
        self, x: torch.Tensor, keep: torch.Tensor, grid: Tuple[int, int], present: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Predict patches.

        Args:
            x: Features (B, C, 1 + K, in_dim), class tokens first.
            keep: Indices (B, C, K) of the visible patches of each channel.
            grid: Rows and columns of all patches.
            present: Which channels (B, C) have visible patches; None for all.
        """
        B, C = x.shape[:2]
        x = self.embed(x).to(self.mask_token.dtype)
        places = F.pad(keep + 1, [1, 0]).unsqueeze(-1).expand(-1, -1, -1, self.dim)
        tokens = self.mask_token.expand(B, C, 1 + grid[0] * grid[1], -1)
        seen = tokens.scatter(2, places, x)
        if present is not None:
            seen = torch.where(present[:, :, None, None], seen, tokens)
        positions = factorized_positions(self.dim, C, grid, x.device).to(x.dtype)
        return self.pred(self.norm(self.run_blocks(seen + positions)[:, :, 1:]))
