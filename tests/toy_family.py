"""A family of models that mix tokens by depthwise convolutions and by attention, in turn: `docs/add-a-family.md`."""

import torch
from timm.layers import Attention, SwiGLU
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vim_timm.layers import Block, Layout, PatchEmbed, RmsNorm
from vim_timm.models import Trunk
from vim_timm.models.adapt import adapt as checkpoint_filter_fn
from vim_timm.models.build import build_model, cfg


class Depthwise(nn.Module):
    def __init__(self, dim, **dd):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        height, width = layout.grid
        return self.conv(x.transpose(1, 2).unflatten(2, [height, width])).flatten(2).transpose(1, 2)


class Toy(Trunk):
    def __init__(
        self, img_size=224, patch_size=16, in_chans=3, embed_dim=64, depth=4, drop_path_rate=0.0,
        dynamic_img_size=False, device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        dd = dict(device=device, dtype=dtype)
        stem = PatchEmbed(img_size, patch_size, None, in_chans, embed_dim, not dynamic_img_size, **dd)
        blocks = []
        for i in range(depth):
            mixer = Attention(embed_dim, num_heads=4, **dd) if i % 2 else Depthwise(embed_dim, **dd)
            mlp = SwiGLU(embed_dim, 2 * embed_dim, **dd)
            blocks.append(Block(embed_dim, mixer, mlp, RmsNorm, drop_path=drop_path_rate * i / depth, **dd))
        super().__init__(stem, blocks, RmsNorm, **{'class_token': 'none', 'global_pool': 'avg', **kwargs}, **dd)


default_cfgs = generate_default_cfgs({'toy.untrained': cfg()})


@register_model
def toy(pretrained=False, **kwargs):
    return build_model(Toy, 'toy', pretrained, checkpoint_filter_fn, kwargs)
