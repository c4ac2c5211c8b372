"""Hybrid Vision Mamba: a state space branch and an attention branch on the same tokens, then an MLP.

Every block, or every fourth (`attn_blocks`), mixes the two branches by a learned weight. The state space branch is
Vision Mamba 2's (`layers.bissd`) or Vision Mamba's (arXiv 2401.09417); attention is timm's, on the kernel that
`layers.attention` chooses.
"""

from functools import partial
from typing import Any, Dict, Iterable, List, Literal, Optional, Sequence, Union

import torch.nn as nn
from timm.layers import Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model

from vim_timm.layers.attention import Attention
from vim_timm.layers.bimamba import BiMamba
from vim_timm.layers.bissd import BiSSD
from vim_timm.layers.block import Block
from vim_timm.layers.hybrid import Hybrid
from vim_timm.layers.norm import get_norm_layer
from vim_timm.layers.patch_embed import PatchEmbed, Size
from vim_timm.layers.token_order import ClassToken
from vim_timm.models.adapt import StateDict, adapt
from vim_timm.models.build import build_model, cfg, small_cfg
from vim_timm.models.families import register_family
from vim_timm.models.trunk import Trunk

__all__ = ['VisionMambaHybrid']

# State space branches by name.
_BRANCHES: Dict[str, Any] = {'ssd': BiSSD, 'mamba': BiMamba}

AttnBlocks = Union[Literal['all', 'every_fourth'], Sequence[int]]


def _blocks_with_attention(attn_blocks: AttnBlocks, depth: int) -> List[int]:
    """Numbers of the blocks that have an attention branch."""
    if attn_blocks == 'all':
        return list(range(depth))
    if attn_blocks == 'every_fourth':
        return list(range(3, depth, 4))
    numbers: List[Any] = list(attn_blocks) if isinstance(attn_blocks, Iterable) else [None]
    if not all(isinstance(i, int) and 0 <= i < depth for i in numbers):
        raise ValueError(
            f"attn_blocks must be 'all', 'every_fourth' or numbers from 0 to {depth - 1}, not {attn_blocks!r}"
        )
    return numbers


class VisionMambaHybrid(Trunk):
    """Hybrid Vision Mamba with timm's model interface."""

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal['', 'token', 'avg', 'max', 'last'] = 'avg',
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        class_token: ClassToken = 'none',
        pos_embed: bool = True,
        ssm: Literal['ssd', 'mamba'] = 'ssd',
        attn_blocks: AttnBlocks = 'all',
        mix: Literal['scalar', 'channel'] = 'scalar',
        expand: int = 2,
        d_state: Optional[int] = None,
        headdim: Optional[int] = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: Literal['rmsnorm', 'layernorm'] = 'rmsnorm',
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        init_values: Optional[float] = None,
        fc_norm: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
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
            num_heads: Heads of the attention branch.
            class_token: Where a class token stands in the scan, as in Vim, or 'none'.
            pos_embed: Add a learned position embedding.
            ssm: The state space branch: 'ssd' is Vision Mamba 2's mixer, 'mamba' Vim's.
            attn_blocks: Blocks with an attention branch: 'all', 'every_fourth' (3, 7, 11, ...), or their numbers.
            mix: One learned weight of the branches for a block ('scalar') or for every channel ('channel').
            expand: Channels of the state space branch as a multiple of embed_dim.
            d_state: State size, None for the branch's usual one.
            headdim: Channels of the 'ssd' branch that share their decay, None for 64.
            mlp_ratio: Width of the MLP as a multiple of embed_dim, 0 for blocks without one.
            qkv_bias: Bias in the attention branch's first product.
            norm_layer: 'rmsnorm' or 'layernorm'.
            norm_eps: Epsilon of every norm.
            residual_in_fp32: Keep the residual stream in float32 when tokens are bfloat16 or float16.
            init_values: Initial layer scale, None for none.
            fc_norm: Normalize once more after pooling.
            dynamic_img_size: Accept any image size, with the position embedding resampled in every forward.
            dynamic_img_pad: Pad images that the patches do not tile.
            drop_rate: Dropout before the head.
            pos_drop_rate: Dropout after the position embedding.
            proj_drop_rate: Dropout of every branch's output and of the MLP.
            attn_drop_rate: Dropout of attention weights.
            drop_path_rate: Stochastic depth, linear from 0 in the first block to this rate in the last.
            weight_init: '' the usual initialization, 'skip' none.

        Raises:
            AssertionError: unsupported global_pool, or the 'token' pool without a class token.
            ValueError: another argument has an unknown value, or patches do not tile img_size.
        """
        dd = {'device': device, 'dtype': dtype}
        if ssm not in _BRANCHES:
            raise ValueError(f'ssm must be one of {", ".join(_BRANCHES)}, not {ssm!r}')
        if weight_init not in ('', 'skip'):
            raise ValueError(f"weight_init must be '' or 'skip', not {weight_init!r}")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f'num_heads must divide embed_dim {embed_dim}, which {num_heads} does not')
        if mlp_ratio < 0:
            raise ValueError(f'mlp_ratio must be 0 for none, or more, not {mlp_ratio}')
        if headdim is not None and ssm != 'ssd':
            raise ValueError(f"headdim {headdim} needs ssm 'ssd': each channel of {ssm!r} has a decay of its own")
        norm = partial(get_norm_layer(norm_layer), eps=norm_eps)
        with_attention = _blocks_with_attention(attn_blocks, depth)
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        hidden = int(embed_dim * mlp_ratio)
        branch: Dict[str, Any] = dict(expand=expand, proj_drop=proj_drop_rate, **dd)
        branch |= {name: size for name, size in (('d_state', d_state), ('headdim', headdim)) if size is not None}
        if ssm == 'ssd':
            branch['norm_eps'] = norm_eps  # the other has no norm

        def mixer(i: int) -> nn.Module:
            space = _BRANCHES[ssm](embed_dim, **branch)
            if i not in with_attention:
                return space
            attention = Attention(
                embed_dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd
            )
            return Hybrid(embed_dim, space, attention, mix, **dd)

        super().__init__(
            PatchEmbed(
                img_size,
                patch_size,
                in_chans=in_chans,
                embed_dim=embed_dim,
                strict_img_size=not dynamic_img_size,
                dynamic_img_pad=dynamic_img_pad,
                **dd,
            ),
            [
                Block(
                    embed_dim,
                    mixer(i),
                    Mlp(embed_dim, hidden, drop=proj_drop_rate, **dd) if hidden else None,
                    norm,
                    init_values,
                    drop_path_rates[i],
                    **dd,
                )
                for i in range(depth)
            ],
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


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionMambaHybrid) -> StateDict:
    """Weights of a checkpoint -> the model's state dict; strict by itself.

    Raises:
        CheckpointError: names or shapes are another family's or another size's.
    """
    return adapt(state_dict, model)


register_family(
    'a hybrid of a state space and attention (vim_hybrid)', r'mixer\.mix$', r'mixer\.ssm\.', r'mixer\.attention\.'
)

default_cfgs = generate_default_cfgs(
    {
        'vim_hybrid_tiny_patch16_224.untrained': cfg(),
        'vim_hybrid_small_patch16_224.untrained': cfg(),
        'vim_hybrid_base_patch16_224.untrained': cfg(),
        'vim_hybrid_tiny_patch4_32.untrained': small_cfg(),
        'vim_hybrid_small_patch4_32.untrained': small_cfg(),
        'vim_hybrid_base_patch4_32.untrained': small_cfg(),
        'test_vim_hybrid.untrained': cfg(input_size=(3, 160, 160), fixed_input_size=False, crop_pct=0.95),
    }
)


def _create(variant: str, pretrained: bool, model_args: Dict[str, Any], kwargs: Dict[str, Any]) -> VisionMambaHybrid:
    return build_model(VisionMambaHybrid, variant, pretrained, checkpoint_filter_fn, {**model_args, **kwargs})


@register_model
def vim_hybrid_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMambaHybrid:
    """Hybrid of six blocks, 96 wide."""
    model_args = dict(embed_dim=96, depth=6, num_heads=2)
    return _create('vim_hybrid_tiny_patch16_224', pretrained, model_args, kwargs)


@register_model
def vim_hybrid_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMambaHybrid:
    """Hybrid of twelve blocks, 384 wide."""
    model_args = dict(embed_dim=384, depth=12, num_heads=6)
    return _create('vim_hybrid_small_patch16_224', pretrained, model_args, kwargs)


@register_model
def vim_hybrid_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMambaHybrid:
    """Hybrid of twelve blocks, 768 wide."""
    model_args = dict(embed_dim=768, depth=12, num_heads=12)
    return _create('vim_hybrid_base_patch16_224', pretrained, model_args, kwargs)


@register_model
def vim_hybrid_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMambaHybrid:
    """Hybrid of six blocks, 96 wide, for 32 x 32 images."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=2)
    return _create('vim_hybrid_tiny_patch4_32', pretrained, model_args, kwargs)


@register_model
def vim_hybrid_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMambaHybrid:
    """Hybrid of twelve blocks, 384 wide, for 32 x 32 images."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=384, depth=12, num_heads=6)
    return _create('vim_hybrid_small_patch4_32', pretrained, model_args, kwargs)


@register_model
def vim_hybrid_base_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionMambaHybrid:
    """Hybrid of twelve blocks, 768 wide, for 32 x 32 images."""
    model_args = dict(img_size=32, patch_size=4, embed_dim=768, depth=12, num_heads=12)
    return _create('vim_hybrid_base_patch4_32', pretrained, model_args, kwargs)


@register_model
def test_vim_hybrid(pretrained: bool = False, **kwargs: Any) -> VisionMambaHybrid:
    """A small model for tests."""
    model_args = dict(img_size=160, embed_dim=64, depth=4, num_heads=2, attn_blocks=(1, 3), dynamic_img_size=True)
    return _create('test_vim_hybrid', pretrained, model_args, kwargs)
