"""Image to tokens by a few small convolutions."""

import math
from collections import OrderedDict
from typing import Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import LayerNorm2d

from vim_timm.layers.masking import take_tokens
from vim_timm.layers.patch_embed import PatchEmbed, Size, as_tokens, check_channels, check_matches, check_tiled

# they decide by a tensor or its size, which a tracer has not
for _name in ('check_channels', 'check_matches', 'check_tiled'):
    torch.fx.wrap(_name)


class ConvStem(PatchEmbed):
    """(B, C, H, W) -> (B, M, D): 3x3 convolutions, the first with stride 1, then one of stride 2 for each halving.

    Norms and GELU stand between them. Early convolutions help transformers see better (arXiv 2106.14881).
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            patch_size: Pixels between neighbouring tokens, a power of two.
            strict_img_size: Refuse inputs of another size than img_size.

        Raises:
            ValueError: patch_size is no power of two, or does not tile img_size.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(img_size, patch_size, None, in_chans, embed_dim, strict_img_size, **dd)
        steps = int(math.log2(self.patch_size[0]))
        if self.patch_size[0] != self.patch_size[1] or 2**steps != self.patch_size[0] or steps == 0:
            raise ValueError(f"stem 'conv' halves an image: patch_size must be 2, 4, 8 or 16, not {patch_size}")
        widths = [in_chans, *(max(8, embed_dim // 2 ** (steps - i)) for i in range(steps)), embed_dim]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(steps):
            layers[f'conv{i}'] = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i else 1, padding=1, **dd)
            layers[f'norm{i}'] = LayerNorm2d(widths[i + 1], **dd)
            layers[f'act{i}'] = nn.GELU()
        self.convs = nn.Sequential(layers)
        self.proj = nn.Conv2d(widths[steps], embed_dim, 3, stride=2, padding=1, **dd)

    def _resample_patches(self, patch_size: Tuple[int, int]) -> None:
        raise ValueError(f"stem 'conv' has patches of {self.patch_size[0]}, which cannot be resampled to {patch_size}")

    def forward(self, x: torch.Tensor, keep: Optional[torch.Tensor] = None) -> torch.Tensor:
        check_channels(x, self.in_chans)
        if self.strict_img_size:
            check_matches(x.shape[2], x.shape[3], self.img_size)
        else:
            check_tiled(x.shape[2], self.patch_size[0], self.stride[0])
            check_tiled(x.shape[3], self.patch_size[1], self.stride[1])
        tokens = as_tokens(self.proj(self.convs(x)))
        return tokens if keep is None else take_tokens(tokens, keep)
