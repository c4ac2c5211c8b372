"""nn.Modules made of `vim_timm.ops`."""

from vim_timm.layers.mamba import BiMamba
from vim_timm.layers.norm import LayerNorm, RmsNorm, get_norm_layer
from vim_timm.layers.patch_embed import PatchEmbed
from vim_timm.layers.rope import rope_tables, rotate

__all__ = ['BiMamba', 'LayerNorm', 'PatchEmbed', 'RmsNorm', 'get_norm_layer', 'rope_tables', 'rotate']
