"""Vision Mamba 2: blocks of a symmetric state space on the image's grid and a SwiGLU, nothing but matrix products.

The mixer is Mamba-2's (arXiv 2405.21060) with both directions in one masked product, row-major and column-major decays,
and a depthwise 3 x 3 convolution; see `layers/bissd.py`.
"""

from collections import OrderedDict
from functools import partial
from typing import Any, Dict, Literal, Optional

import torch.nn as nn
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model

from vim_timm.layers.bissd import BiSSD, ConvType
from vim_timm.layers.block import Block
from vim_timm.layers.conv_stem import ConvStem
from vim_timm.layers.draw import draw_linear
from vim_timm.layers.norm import RmsNorm
from vim_timm.layers.patch_embed import PatchEmbed, Size
from vim_timm.layers.swiglu import SwiGluMlp
from vim_timm.layers.token_order import ClassToken
from vim_timm.models.adapt import adapt as checkpoint_filter_fn
from vim_timm.models.build import build_model, cfg, small_cfg
from vim_timm.models.families import register_family
from vim_timm.models.trunk import Trunk

__all__ = ['VisionMamba2']


class VisionMamba2(Trunk):
    """Vision Mamba 2 with timm's model interface."""

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal['', 'token', 'avg', 'max', 'last'] = 'avg',
        embed_dim: int = 192,
        depth: int = 12,
        class_token: ClassToken = 'none',
        pos_embed: bool = True,
        stem: Literal['patch', 'conv'] = 'patch',
        d_state: int = 32,
        headdim: int = 64,
        expand: float = 1,
        orders: Literal['row', 'column', 'both', 'alternate'] = 'alternate',
        conv: ConvType = '2d',
        bc_norm: bool = False,
        rope: bool = False,
        gap_decay: bool = False,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        init_values: Optional[float] = None,
        fc_norm: bool = False,
        head_hidden: Optional[int] = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal['', 'skip'] = '',
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            img_size: Input image size.
            patch_size: Patch size.
            in_chans: Number of image channels.
            num_classes: Number of classes of the head, 0 for none.
            global_pool: 'token' (class token), 'avg' or 'max' over patches, 'last' (last patch), '' (all tokens).
            embed_dim: Width of the tokens.
            depth: Number of blocks.
            class_token: Where a class token stands: before patch M // 2, before all patches, both before and after
                ('double'), or nowhere. States do not decay at it.
            pos_embed: Add a learned position embedding.
            stem: 'patch' one convolution over disjoint patches, 'conv' several of 3 x 3.
            d_state: State size of each channel.
            headdim: Channels that share their decay.
            expand: Mixer channels as a multiple of embed_dim.
            orders: Along which the states decay: 'row', 'column', 'both' averaged, or rows in even blocks and columns
                in odd ones ('alternate').
            conv: The mixer's depthwise convolution: '2d' 3 x 3 on the grid, '1d' over 7 tokens, 'none'.
            bc_norm: Normalize the mixer's B and C.
            rope: Turn the mixer's B and C by rows and columns.
            gap_decay: States of masked images decay over hidden patches too; not with orders 'both'.
            mlp_ratio: Hidden width of the SwiGLU as a multiple of embed_dim, 0 for blocks without one.
            norm_eps: Epsilon of every norm.
            residual_in_fp32: Keep the residual stream in float32 when tokens are bfloat16 or float16.
            init_values: Initial layer scale, None for none.
            fc_norm: Normalize once more after pooling.
            head_hidden: Width of a hidden layer of the classifier, None for none.
            dynamic_img_size: Accept any image size, with the position embedding resampled in every forward.
            dynamic_img_pad: Pad images that the patches do not tile.
            drop_rate: Dropout before the head, and before its last layer where it has two.
            pos_drop_rate: Dropout after the position embedding.
            proj_drop_rate: Dropout of every mixer's and every MLP's output.
            drop_path_rate: Stochastic depth, linear from 0 in the first block to this rate in the last.
            weight_init: '' the usual initialization, 'skip' none.

        Raises:
            AssertionError: unsupported global_pool, or the 'token' pool without a class token.
            ValueError: another argument has an unknown value or does not go with the others.
        """
        dd = {'device': device, 'dtype': dtype}
        if stem not in ('patch', 'conv'):
            raise ValueError(f"stem must be 'patch' or 'conv', not {stem!r}")
        if orders not in ('row', 'column', 'both', 'alternate'):
            raise ValueError(f"orders must be 'row', 'column', 'both' or 'alternate', not {orders!r}")
        if stem == 'conv' and dynamic_img_pad:
            raise ValueError("dynamic_img_pad needs stem 'patch'")
        if mlp_ratio < 0:
            raise ValueError(f'mlp_ratio must be 0 for none, or more, not {mlp_ratio}')
        if weight_init not in ('', 'skip'):
            raise ValueError(f"weight_init must be '' or 'skip', not {weight_init!r}")
        norm = partial(RmsNorm, eps=norm_eps)
        if stem == 'conv':
            patch_embed: PatchEmbed = ConvStem(img_size, patch_size, in_chans, embed_dim, not dynamic_img_size, **dd)
        else:
            patch_embed = PatchEmbed(
                img_size, patch_size, None, in_chans, embed_dim, not dynamic_img_size, dynamic_img_pad, **dd
            )
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)

        def make_block(i: int) -> Block:
            order: Any = ('row', 'column')[i % 2] if orders == 'alternate' else orders
            mixer = BiSSD(
                embed_dim,
                d_state=d_state,
                headdim=headdim,
                expand=expand,
                orders=order,
                conv=conv,
                bc_norm=bc_norm,
                rope=rope,
                gap_decay=gap_decay,
                proj_drop=proj_drop_rate,
                norm_eps=norm_eps,
                **dd,
            )
            hidden = int(mlp_ratio * embed_dim)
            mlp = SwiGluMlp(embed_dim, hidden, drop=(0.0, proj_drop_rate), **dd) if hidden else None
            return Block(embed_dim, mixer, mlp, norm, init_values=init_values, drop_path=rates[i], **dd)

        self.head_hidden, self.hidden_drop_rate = head_hidden, drop_rate
        super().__init__(
            patch_embed,
            [make_block(i) for i in range(depth)],
            norm,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token=class_token,
            pos_embed=pos_embed,
            fc_norm=fc_norm,
            residual_in_fp32=residual_in_fp32,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            weight_init=weight_init,
            **dd,
        )
        if stem == 'conv':
            self._traits = {'first_conv': 'patch_embed.convs.conv0'}

    def make_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        """A new classifier of pooled features (B, D), nn.Identity for no classes."""
        if self.head_hidden is None or num_classes == 0:
            return super().make_head(num_classes, device=device, dtype=dtype)
        return nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(self.embed_dim, self.head_hidden, device=device, dtype=dtype),
                act=nn.GELU(),
                dropout=nn.Dropout(self.hidden_drop_rate),
                fc2=nn.Linear(self.head_hidden, num_classes, device=device, dtype=dtype),
            )
        )

    def init_head(self) -> None:
        """Draw the classifier; a hidden layer keeps what its constructor drew."""
        layers = list(self.head) if isinstance(self.head, nn.Sequential) else [self.head]
        if layers and isinstance(layers[-1], nn.Linear):
            draw_linear(layers[-1])


register_family('a Vision Mamba 2 (vim2)', r'^blocks\.\d+\.mixer\.dt_bias$', r'^patch_embed\.')

default_cfgs = generate_default_cfgs(
    {
        'vim2_tiny_patch16_224.untrained': cfg(),
        'vim2_small_patch16_224.untrained': cfg(),
        'vim2_base_patch16_224.untrained': cfg(),
        'vim2_nano_patch4_32.untrained': small_cfg(),
        'vim2_tiny_patch4_32.untrained': small_cfg(),
        'vim2_small_patch4_32.untrained': small_cfg(),
        'vim2_mnist.untrained': small_cfg(
            input_size=(1, 28, 28),
            mean=(0.1307,),
            std=(0.3081,),
            first_conv='patch_embed.convs.conv0',
            classifier='head.fc2',
        ),
        'test_vim2.untrained': cfg(input_size=(3, 160, 160), fixed_input_size=False, crop_pct=0.95),
    }
)


def _create_vision_mamba2(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    return build_model(VisionMamba2, variant, pretrained, checkpoint_filter_fn, kwargs)


@register_model
def vim2_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Vision Mamba 2, 7.2M parameters."""
    model_args: Dict[str, Any] = dict(embed_dim=192)
    return _create_vision_mamba2('vim2_tiny_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Vision Mamba 2, 27.7M parameters."""
    model_args: Dict[str, Any] = dict(embed_dim=384)
    return _create_vision_mamba2('vim2_small_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Vision Mamba 2, 109M parameters."""
    model_args: Dict[str, Any] = dict(embed_dim=768)
    return _create_vision_mamba2('vim2_base_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Vision Mamba 2 for images of 32 x 32, narrow."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=96, expand=2, mlp_ratio=2.5)
    return _create_vision_mamba2('vim2_nano_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Vision Mamba 2 for images of 32 x 32."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=192)
    return _create_vision_mamba2('vim2_tiny_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Vision Mamba 2 for images of 32 x 32, wide."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=384)
    return _create_vision_mamba2('vim2_small_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim2_mnist(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """Four mixers on 14 x 14 tokens of a grey image of 28 x 28, and a classifier of two layers, 0.5M parameters."""
    model_args = dict(
        img_size=28,
        patch_size=2,
        in_chans=1,
        embed_dim=128,
        depth=4,
        stem='conv',
        expand=2,
        mlp_ratio=0,
        head_hidden=64,
        drop_rate=0.1,
    )
    return _create_vision_mamba2('vim2_mnist', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_vim2(pretrained: bool = False, **kwargs: Any) -> VisionMamba2:
    """A small model for timm's tests."""
    model_args = dict(img_size=160, embed_dim=64, depth=4, expand=2, mlp_ratio=2.5, dynamic_img_size=True)
    return _create_vision_mamba2('test_vim2', pretrained=pretrained, **dict(model_args, **kwargs))
