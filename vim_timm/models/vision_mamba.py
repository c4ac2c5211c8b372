"""Vision Mamba (Vim): a plain, bidirectional state space backbone.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417. Original code and weights: https://github.com/hustvl/Vim (Apache-2.0).
"""

import re
from functools import partial
from typing import Any, Dict, Literal, Optional, Set, Union

import torch
import torch.nn as nn
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_model_deprecations

from vim_timm.layers.bimamba import BiMamba, ScanType
from vim_timm.layers.block import Block
from vim_timm.layers.norm import get_norm_layer
from vim_timm.layers.patch_embed import PatchEmbed, Size
from vim_timm.layers.rope import StreamRope
from vim_timm.layers.token_order import ClassToken, to_prefix_order
from vim_timm.models.adapt import adapt
from vim_timm.models.build import build_model, cfg, small_cfg
from vim_timm.models.families import register_family
from vim_timm.models.pretrained import packaged
from vim_timm.models.trunk import Trunk

__all__ = ['VisionMamba']


class VisionMamba(Trunk):
    """Vision Mamba with timm's model interface."""

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        stride: Optional[Size] = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal['', 'token', 'avg', 'max', 'last'] = 'token',
        embed_dim: int = 192,
        depth: int = 24,
        class_token: ClassToken = 'middle',
        pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = True,
        rope_pretrained_grid: int = 14,
        scan: ScanType = 'bidirectional',
        halve: bool = True,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: Union[int, Literal['auto']] = 'auto',
        conv_bias: bool = True,
        proj_bias: bool = False,
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'rmsnorm',
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        init_values: Optional[float] = None,
        fc_norm: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        random_token_order: bool = False,
        random_class_position: bool = False,
        decay_state: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal['', 'early', 'skip'] = '',
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            img_size: Input image size.
            patch_size: Patch size.
            stride: Step between patches, None for the patch size.
            in_chans: Number of image channels.
            num_classes: Number of classes of the head, 0 for none.
            global_pool: 'token' (class token), 'avg' or 'max' over patches, 'last' (last patch), '' (all tokens).
            embed_dim: Width of the tokens.
            depth: Number of blocks.
            class_token: Where the class token stands in the scan: before patch M // 2, before all patches, both
                before and after ('double', two tokens, averaged by the 'token' pool), or nowhere.
            pos_embed: Add a learned position embedding.
            rope: Rotate the tokens before every block (first release).
            rope_residual: Rotate the whole residual stream; False rotates only the latest block's contribution.
            rope_pretrained_grid: Grid side to which rotary positions are scaled.
            scan: Directions of the mixer: 'bidirectional' (v2), 'shared' (v1), 'forward'.
            halve: Average the directions of a 'bidirectional' mixer instead of adding them.
            d_state: State size of each channel.
            d_conv: Width of the mixer's convolution.
            expand: Mixer channels as a multiple of embed_dim.
            dt_rank: Rank of the step size projection, 'auto' for ceil(embed_dim / 16).
            conv_bias: Bias in the convolutions.
            proj_bias: Bias in the mixer's in_proj and out_proj.
            norm_layer: 'rmsnorm' or 'layernorm'.
            norm_eps: Epsilon of every norm.
            residual_in_fp32: Keep the residual stream in float32 when tokens are bfloat16 or float16.
            init_values: Initial layer scale, None for none.
            fc_norm: Normalize once more after pooling.
            dynamic_img_size: Accept any image size, with the position embedding resampled in every forward.
            dynamic_img_pad: Pad images that the patches do not tile.
            random_token_order: Shuffle the scan order in training.
            random_class_position: Put the class token at a random place of the scan in training.
            decay_state: Leave A_log and D out of `no_weight_decay`, as the original's training did with A_log.
            drop_rate: Dropout before the head.
            pos_drop_rate: Dropout after the position embedding.
            proj_drop_rate: Dropout of every mixer's output.
            drop_path_rate: Stochastic depth, linear from 0 in the first block to this rate in the last.
            weight_init: '' the published initialization, 'early' the first release's, 'skip' none.

        Raises:
            AssertionError: unsupported global_pool, or the 'token' pool without a class token.
            ValueError: another argument has an unknown value, or patches do not tile img_size.
        """
        dd = {'device': device, 'dtype': dtype}
        if weight_init not in ('', 'early', 'skip'):
            raise ValueError(f"weight_init must be '', 'early' or 'skip', not {weight_init!r}")
        norm = partial(get_norm_layer(norm_layer), eps=norm_eps)
        patch_embed = PatchEmbed(
            img_size,
            patch_size,
            stride,
            in_chans,
            embed_dim,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)

        def make_block(drop_path: float) -> Block:
            mixer = BiMamba(
                embed_dim,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                dt_rank=dt_rank,
                conv_bias=conv_bias,
                proj_bias=proj_bias,
                scan=scan,
                halve=halve,
                proj_drop=proj_drop_rate,
                **dd,
            )
            return Block(embed_dim, mixer, norm_layer=norm, init_values=init_values, drop_path=drop_path, **dd)

        super().__init__(
            patch_embed,
            [make_block(rate) for rate in rates],
            norm,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token=class_token,
            pos_embed=pos_embed,
            rope=StreamRope(rope_residual, rope_pretrained_grid) if rope else None,
            fc_norm=fc_norm,
            residual_in_fp32=residual_in_fp32,
            random_token_order=random_token_order,
            random_class_position=random_class_position,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            weight_init=weight_init,
            **dd,
        )
        self.decay_state = decay_state

    def init_stem(self) -> None:
        """Draw the embeddings and the patch projection from the original's distributions (goldens in the tests)."""
        if self.weight_init != 'early':
            return super().init_stem()
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that weight decay must leave alone: embeddings and, unless `decay_state`, every A_log and D."""
        names = super().no_weight_decay()
        return {name for name in names if '.mixer.' not in name} if self.decay_state else names


def _from_original(state_dict: Dict[str, torch.Tensor], model: VisionMamba) -> Dict[str, torch.Tensor]:
    """The original's names and orders (any class token; rope buffers are dropped) -> ours."""
    if not any(name.startswith('layers.') for name in state_dict):
        return state_dict
    out = {}
    for name, value in state_dict.items():
        if name in ('rope.freqs_cos', 'rope.freqs_sin', 'cls_token_head', 'cls_token_tail'):
            continue
        name = re.sub(r'^layers\.', 'blocks.', name)
        name = re.sub(r'^norm_f\.', 'norm.', name)
        name = re.sub(r'\.mixer\.gamma$', '.ls.gamma', name)
        out[name] = value
    if 'cls_token_head' in state_dict and 'cls_token_tail' in state_dict:
        out['cls_token'] = torch.cat([state_dict['cls_token_head'], state_dict['cls_token_tail']], dim=1)
    if 'pos_embed' in out:
        out['pos_embed'] = to_prefix_order(out['pos_embed'], model.class_token)
    return out


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionMamba) -> Dict[str, torch.Tensor]:
    """Weights of the original's releases or of this package -> the model's state dict, see `adapt`."""
    return adapt(state_dict, model, _from_original)


register_family('a Vision Mamba with bidirectional scans (v2)', r'mixer\.A_log$', r'mixer\.conv1d_b\.')
register_family('a Vision Mamba with shared projections (v1)', r'mixer\.A_log$', r'mixer\.A_b_log$')

_LICENCE = (
    "The authors' repositories on the Hub contradict themselves: their metadata say apache-2.0, as their code does, "
    'the text of their cards a non-commercial licence. Ask them before a commercial use.'
)


def _hustvl(size: str, filename: str) -> Dict[str, Any]:
    return cfg(
        hf_hub_id=f'hustvl/Vim-{size}-midclstok',
        hf_hub_filename=filename,
        origin_url='https://github.com/hustvl/Vim',
        notes=(_LICENCE,),
    )


default_cfgs = generate_default_cfgs(
    {
        'vim_tiny_patch16_224.hustvl_in1k': _hustvl('tiny', 'vim_t_midclstok_76p1acc.pth'),
        'vim_small_patch16_224.hustvl_in1k': _hustvl('small', 'vim_s_midclstok_80p5acc.pth'),
        'vim_base_patch16_224.hustvl_in1k': _hustvl('base', 'vim_b_midclstok_81p9acc.pth'),
        'vim_tiny_patch16_384.untrained': cfg(input_size=(3, 384, 384), crop_pct=1.0),
        'vim_small_patch16_384.untrained': cfg(input_size=(3, 384, 384), crop_pct=1.0),
        'vim_base_patch16_384.untrained': cfg(input_size=(3, 384, 384), crop_pct=1.0),
        'vim_tiny_patch16_stride8_224.hustvl_in1k_ft_in1k': _hustvl('tiny', 'vim_t_midclstok_ft_78p3acc.pth'),
        'vim_small_patch16_stride8_224.hustvl_in1k_ft_in1k': _hustvl('small', 'vim_s_midclstok_ft_81p6acc.pth'),
        'vim_tiny_patch16_rope_ape_gap_224.untrained': cfg(),
        'vim_small_patch16_rope_ape_gap_224.untrained': cfg(),
        'vim_base_patch16_rope_ape_gap_224.untrained': cfg(),
        'vim_tiny_patch8_rope_ape_gap_224.untrained': cfg(),
        'vim_tiny_patch16_rope_ape_224.untrained': cfg(),
        'vim_tiny_patch8_rope_ape_224.untrained': cfg(),
        'vim_nano_patch4_32.untrained': small_cfg(),
        'vim_nano_patch4_32.cifar10': small_cfg(**packaged('vim_nano_patch4_32.cifar10')),
        'vim_tiny_patch4_32.untrained': small_cfg(),
        'vim_small_patch4_32.untrained': small_cfg(),
        'test_vim.untrained': cfg(input_size=(3, 160, 160), fixed_input_size=False, crop_pct=0.95),
    }
)


def _create_vision_mamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    return build_model(VisionMamba, variant, pretrained, checkpoint_filter_fn, kwargs)


# the first release: rotated stream, directions added
_EARLY = dict(rope=True, halve=False, weight_init='early')
_EARLY_GAP = dict(_EARLY, class_token='none', global_pool='avg')


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti."""
    model_args = dict(embed_dim=192, depth=24)
    return _create_vision_mamba('vim_tiny_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S."""
    model_args = dict(embed_dim=384, depth=24)
    return _create_vision_mamba('vim_small_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B."""
    model_args = dict(embed_dim=768, depth=24)
    return _create_vision_mamba('vim_base_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_384(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti at 384 x 384."""
    model_args = dict(img_size=384, embed_dim=192, depth=24)
    return _create_vision_mamba('vim_tiny_patch16_384', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S at 384 x 384."""
    model_args = dict(img_size=384, embed_dim=384, depth=24)
    return _create_vision_mamba('vim_small_patch16_384', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B at 384 x 384."""
    model_args = dict(img_size=384, embed_dim=768, depth=24)
    return _create_vision_mamba('vim_base_patch16_384', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti+ of the paper: overlapping patches."""
    model_args = dict(stride=8, embed_dim=192, depth=24)
    return _create_vision_mamba('vim_tiny_patch16_stride8_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S+ of the paper: overlapping patches."""
    model_args = dict(stride=8, embed_dim=384, depth=24)
    return _create_vision_mamba('vim_small_patch16_stride8_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_rope_ape_gap_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti of the first release: rotary positions, mean of the patches."""
    model_args = dict(embed_dim=192, depth=24, **_EARLY_GAP)
    return _create_vision_mamba(
        'vim_tiny_patch16_rope_ape_gap_224', pretrained=pretrained, **dict(model_args, **kwargs)
    )


@register_model
def vim_small_patch16_rope_ape_gap_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S of the first release: rotary positions, mean of the patches."""
    model_args = dict(embed_dim=384, depth=24, **_EARLY_GAP)
    return _create_vision_mamba(
        'vim_small_patch16_rope_ape_gap_224', pretrained=pretrained, **dict(model_args, **kwargs)
    )


@register_model
def vim_base_patch16_rope_ape_gap_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B of the first release: rotary positions, mean of the patches."""
    model_args = dict(embed_dim=768, depth=24, **_EARLY_GAP)
    return _create_vision_mamba(
        'vim_base_patch16_rope_ape_gap_224', pretrained=pretrained, **dict(model_args, **kwargs)
    )


@register_model
def vim_tiny_patch8_rope_ape_gap_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti of the first release with patches of 8."""
    model_args = dict(patch_size=8, embed_dim=192, depth=24, **_EARLY_GAP)
    return _create_vision_mamba('vim_tiny_patch8_rope_ape_gap_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_rope_ape_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti of the first release with a leading class token."""
    model_args = dict(patch_size=16, embed_dim=192, depth=24, class_token='head', **_EARLY)
    return _create_vision_mamba('vim_tiny_patch16_rope_ape_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch8_rope_ape_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti of the first release with a leading class token, patches of 8."""
    model_args = dict(patch_size=8, embed_dim=192, depth=24, class_token='head', **_EARLY)
    return _create_vision_mamba('vim_tiny_patch8_rope_ape_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Under a million parameters, for 32 x 32 images."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=96, depth=12)
    return _create_vision_mamba('vim_nano_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti for 32 x 32 images."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=192, depth=24)
    return _create_vision_mamba('vim_tiny_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S for 32 x 32 images."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=384, depth=24)
    return _create_vision_mamba('vim_small_patch4_32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """A small model for tests."""
    model_args = dict(img_size=160, embed_dim=64, depth=6, dynamic_img_size=True)
    return _create_vision_mamba('test_vim', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti, the short name of `vim_tiny_patch16_224`."""
    return vim_tiny_patch16_224(pretrained=pretrained, **kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S, the short name of `vim_small_patch16_224`."""
    return vim_small_patch16_224(pretrained=pretrained, **kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B, the short name of `vim_base_patch16_224`."""
    return vim_base_patch16_224(pretrained=pretrained, **kwargs)


_MIDDLE = 'bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'
_MIDDLE_BASE = 'bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2'
_ROPE = 'bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual'

register_model_deprecations(
    __name__,
    {
        f'vim_tiny_patch16_224_{_MIDDLE}': 'vim_tiny_patch16_224',
        f'vim_small_patch16_224_{_MIDDLE}': 'vim_small_patch16_224',
        f'vim_base_patch16_224_{_MIDDLE_BASE}': 'vim_base_patch16_224',
        f'vim_tiny_patch16_stride8_224_{_MIDDLE}': 'vim_tiny_patch16_stride8_224',
        f'vim_small_patch16_stride8_224_{_MIDDLE}': 'vim_small_patch16_stride8_224',
        f'vim_tiny_patch16_384_{_MIDDLE}': 'vim_tiny_patch16_384',
        f'vim_small_patch16_384_{_MIDDLE}': 'vim_small_patch16_384',
        f'vim_tiny_patch16_224_{_ROPE}': 'vim_tiny_patch16_rope_ape_gap_224',
        f'vim_small_patch16_224_{_ROPE}': 'vim_small_patch16_rope_ape_gap_224',
        f'vim_base_patch16_224_{_ROPE}': 'vim_base_patch16_rope_ape_gap_224',
        f'vim_tiny_patch8_224_{_ROPE}': 'vim_tiny_patch8_rope_ape_gap_224',
        f'vim_tiny_patch16_224_{_ROPE}_with_cls_token': 'vim_tiny_patch16_rope_ape_224',
        f'vim_tiny_patch8_224_{_ROPE}_with_cls_token': 'vim_tiny_patch8_rope_ape_224',
    },
)
