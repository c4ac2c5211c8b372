"""Light decoders of masked autoencoders: features of visible patches in, pixels of every patch out.

Source: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377, section 3.
"""

import math
from functools import partial
from typing import Any, Iterable, List, Literal, NamedTuple, Set, Tuple

import torch
import torch.nn as nn
from timm.models import checkpoint
from timm.models.vision_transformer import Block as AttentionBlock

from vim_timm.layers.bimamba import BiMamba
from vim_timm.layers.bissd import BiSSD
from vim_timm.layers.block import Block
from vim_timm.layers.draw import zero_bias
from vim_timm.layers.norm import RmsNorm
from vim_timm.layers.pos_embed import resample_pos_embed, sincos_pos_embed
from vim_timm.layers.swiglu import SwiGluMlp
from vim_timm.layers.token_order import Layout

Grid = Tuple[int, int]


class DecoderBlocks(NamedTuple):
    """What a decoder is made of.

    Attributes:
        kind: Blocks of attention and MLP, of Vim's mixer, or of Vision Mamba 2's mixer and MLP.
        dim: Their width.
        depth: Their number.
        num_heads: Attention heads of a block.
    """

    kind: Literal['transformer', 'vim', 'vim2'] = 'transformer'
    dim: int = 512
    depth: int = 8
    num_heads: int = 8

    def make(self, device=None, dtype=None) -> List[nn.Module]:
        """The blocks.

        Raises:
            ValueError: an unknown kind, or a width that the heads do not divide.
        """
        dd = {'device': device, 'dtype': dtype}
        if self.kind == 'vim':
            return [Block(self.dim, BiMamba(self.dim, **dd), norm_layer=RmsNorm, **dd) for _ in range(self.depth)]
        if self.kind == 'vim2':
            return [self._make_vim2(**dd) for _ in range(self.depth)]
        if self.kind != 'transformer':
            raise ValueError(f"the decoder must be 'transformer', 'vim' or 'vim2', not {self.kind!r}")
        if self.dim % self.num_heads:
            raise ValueError(f'{self.num_heads} heads do not divide a decoder of width {self.dim}')
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        return [
            AttentionBlock(self.dim, self.num_heads, qkv_bias=True, norm_layer=norm_layer, **dd)
            for _ in range(self.depth)
        ]

    def _make_vim2(self, **dd: Any) -> Block:
        # wider than the mixers of vim2_*, in both orders: a decoder has few blocks
        sizes: Any = dict(d_state=64, headdim=math.gcd(64, 2 * self.dim), expand=2, orders='both')
        mixer = BiSSD(self.dim, **sizes, **dd)
        return Block(self.dim, mixer, SwiGluMlp(self.dim, int(2.5 * self.dim), **dd), RmsNorm, **dd)


class PixelDecoder(nn.Module):
    """What decoders share: a projection into their width, a mask token, blocks, and a projection to pixels."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dim: int,
        blocks: Iterable[nn.Module],
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            in_dim: Width of the encoder's tokens.
            out_dim: Values of a patch.
            dim: Width of the decoder.
            blocks: Its blocks.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.grad_checkpointing = False
        self.embed = nn.Linear(in_dim, dim, **dd)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.pred = nn.Linear(dim, out_dim, **dd)

    def init_weights(self) -> None:
        """Draw every parameter anew, as the paper does: uniform by Glorot's rule, tokens with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that weight decay must leave alone."""
        return {'mask_token'}

    def set_grid(self, grid: Grid) -> None:
        """Change the grid of patches, on which nothing depends unless positions are learned."""

    def run_blocks(self, x: torch.Tensor, *layout: Any) -> torch.Tensor:
        """Tokens through the blocks, each called with the tokens and `layout`."""
        for block in self.blocks:
            x = checkpoint(block, x, *layout) if self.grad_checkpointing and self.training else block(x, *layout)
        return x


class MaskedDecoder(PixelDecoder):
    """(B, prefix + K, in_dim) and the indices of the K visible patches -> (B, L, out_dim) for all L patches.

    A transformer sees the encoder's prefix tokens too; blocks that scan see the patches alone, in order.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid: Grid,
        num_prefix_tokens: int,
        blocks: DecoderBlocks,
        pos_embed: Literal['sincos', 'learned'] = 'sincos',
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            in_dim: Width of the encoder's tokens.
            out_dim: Values of a patch.
            grid: Rows and columns of patches.
            num_prefix_tokens: Tokens of the encoder before its patches.
            blocks: Kind, width and number of the blocks.
            pos_embed: Fixed or learned positions.

        Raises:
            ValueError: an unknown kind or pos_embed, or a width that does not fit the blocks or the positions.
        """
        dd = {'device': device, 'dtype': dtype}
        if pos_embed not in ('sincos', 'learned'):
            raise ValueError(f"pos_embed must be 'sincos' or 'learned', not {pos_embed!r}")
        sincos_pos_embed(blocks.dim, (1, 1))  # refuses a width that it cannot take
        super().__init__(in_dim, out_dim, blocks.dim, blocks.make(**dd), **dd)
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.scans = blocks.kind != 'transformer'
        learned = pos_embed == 'learned'
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], blocks.dim, **dd)) if learned else None
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every parameter anew; mixers that scan draw their own."""
        super().init_weights()
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.scans:
            for module in reversed(list(self.blocks.modules())):
                reset = getattr(module, 'reset_parameters', None)
                if reset is not None:
                    reset()
            for mixer in self.mixers():
                mixer.init_weights(len(self.blocks), '')

    def no_weight_decay(self) -> Set[str]:
        """The mask token, learned positions, and what the mixers name."""
        names = {name for name in ('mask_token', 'pos_embed') if getattr(self, name) is not None}
        if self.scans:
            for i, mixer in enumerate(self.mixers()):
                names |= {f'blocks.{i}.mixer.{name}' for name in mixer.no_weight_decay()}
        return names

    def mixers(self) -> List[Any]:
        """The mixers of blocks that scan."""
        return [block.mixer for block in self.blocks]

    def set_grid(self, grid: Grid) -> None:
        """Change the grid of patches, with learned positions resampled."""
        if self.pos_embed is not None:
            resampled = resample_pos_embed(self.pos_embed.detach(), list(grid), list(self.grid), num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        self.grid = grid

    def positions(self, grid: Grid) -> torch.Tensor:
        """Position embedding (1, L, dim) of a grid of patches."""
        if self.pos_embed is None:
            table = sincos_pos_embed(self.dim, grid, device=self.mask_token.device)
            return table.float().to(self.mask_token.dtype)[None]  # float32 also in float64 models, as the original's
        return resample_pos_embed(self.pos_embed, list(grid), list(self.grid), num_prefix_tokens=0)

    def forward(self, x: torch.Tensor, keep: torch.Tensor, grid: Grid) -> torch.Tensor:
        prefix, count = self.num_prefix_tokens, grid[0] * grid[1]
        x = self.embed(x).to(self.mask_token.dtype)
        places = keep.unsqueeze(-1).expand(-1, -1, self.dim)
        patches = self.mask_token.expand(x.shape[0], count, -1).scatter(1, places, x[:, prefix:])
        patches = patches + self.positions(grid)
        if self.scans:
            patches = self.run_blocks(patches, Layout(grid, [], None))
        else:
            patches = self.run_blocks(torch.cat([x[:, :prefix], patches], dim=1))[:, prefix:]
        return self.pred(self.norm(patches))
