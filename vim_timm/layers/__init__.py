"""nn.Modules made of `vim_timm.ops`."""

import timm  # noqa: F401  first: the models come with it, and import what follows

from vim_timm.layers.bimamba import BiMamba
from vim_timm.layers.bissd import BiSSD
from vim_timm.layers.block import Block
from vim_timm.layers.conv_stem import ConvStem
from vim_timm.layers.norm import LayerNorm, RmsNorm, get_norm_layer
from vim_timm.layers.patch_embed import PatchEmbed
from vim_timm.layers.rope import StreamRope, rope_tables, rotate
from vim_timm.layers.token_order import Layout

__all__ = [
    'BiMamba',
    'BiSSD',
    'Block',
    'ConvStem',
    'LayerNorm',
    'Layout',
    'PatchEmbed',
    'RmsNorm',
    'StreamRope',
    'get_norm_layer',
    'rope_tables',
    'rotate',
]
