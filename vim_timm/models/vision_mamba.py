"""Vision Mamba (Vim): a plain, bidirectional state space backbone.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417. Original code and weights: https://github.com/hustvl/Vim (Apache-2.0).

At its surface the model keeps its tokens as every timm model does, class token first, then patches in row-major order.
Only between the first and the last block do they stand in scan order, where the class token is in the middle.
"""

import math
import re
from typing import Any, Dict, Final, List, Literal, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerScale,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_patch_embed,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    load_pretrained,
    register_model,
    register_model_deprecations,
)
from timm.models._features import feature_take_indices
from timm.models._input import get_pretrained_grid_size, update_model_args, update_model_input_size

from vim_timm.layers import BiMamba, PatchEmbed, get_norm_layer, rope_tables, rotate
from vim_timm.layers.autocast import as_product_operand
from vim_timm.layers.mamba import ScanType
from vim_timm.layers.norm import at_least_float32
from vim_timm.layers.patch_embed import Size
from vim_timm.layers.plain import is_plain
from vim_timm.layers.pos_embed import resample_pos_embed
from vim_timm.models.checkpoint import CheckpointError, check_names, check_shape, load_weights
from vim_timm.models.pretrained import on_disk, packaged

__all__ = ['VisionMamba']

ClassToken = Literal['middle', 'head', 'double', 'none']
_POOLS = ('', 'token', 'avg', 'max', 'last')


class Block(nn.Module):
    """x + drop_path(scale(mixer(norm(x)))), (B, L, C) -> (B, L, C); x is the float32 residual stream."""

    def __init__(
        self,
        dim: int,
        norm_layer: str = 'rmsnorm',
        norm_eps: float = 1e-5,
        init_values: Optional[float] = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
        **mixer_args: Any,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = get_norm_layer(norm_layer)(dim, eps=norm_eps, **dd)
        self.mixer = BiMamba(dim, **mixer_args, **dd)
        self.ls = nn.Identity() if init_values is None else LayerScale(dim, init_values=init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if not torch.jit.is_scripting():
            # a wrapped or quantized in_proj may want float32
            if isinstance(self.mixer, BiMamba) and is_plain(self.mixer.in_proj):
                y = as_product_operand(y)
        return x + self.drop_path(self.ls(self.mixer(y)))


class VisionMamba(nn.Module):
    """Vision Mamba with timm's model interface."""

    dynamic_img_size: Final[bool]
    middle_token: Final[bool]
    double_token: Final[bool]
    rope: Final[bool]
    rope_residual: Final[bool]

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
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if class_token not in ('middle', 'head', 'double', 'none'):
            raise ValueError(f"class_token must be 'middle', 'head', 'double' or 'none', not {class_token!r}")
        if weight_init not in ('', 'early', 'skip'):
            raise ValueError(f"weight_init must be '', 'early' or 'skip', not {weight_init!r}")
        if random_class_position and class_token not in ('middle', 'head'):
            raise ValueError(f"random_class_position needs class_token 'middle' or 'head', not {class_token!r}")
        if rope and embed_dim % 4:
            raise ValueError(f'rope needs an embed_dim divisible by 4, not {embed_dim}')
        self.num_prefix_tokens = {'none': 0, 'double': 2}.get(class_token, 1)
        self._check_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.has_class_token = self.num_prefix_tokens > 0
        self.middle_token = class_token == 'middle'
        self.double_token = class_token == 'double'
        self.rope = rope
        self.rope_residual = rope_residual
        self.rope_pretrained_grid = rope_pretrained_grid
        self.residual_in_fp32 = residual_in_fp32
        self.dynamic_img_size = dynamic_img_size
        self.random_token_order = random_token_order
        self.random_class_position = random_class_position
        self.decay_state = decay_state
        self.weight_init = weight_init
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            stride,
            in_chans,
            embed_dim,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.cls_token = (
            nn.Parameter(torch.empty(1, self.num_prefix_tokens, embed_dim, **dd)) if self.has_class_token else None
        )
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(
            *[
                Block(
                    embed_dim,
                    norm_layer=norm_layer,
                    norm_eps=norm_eps,
                    init_values=init_values,
                    drop_path=drop_path_rates[i],
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
                for i in range(depth)
            ]
        )
        self.feature_info = [
            dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=self.patch_embed.feat_ratio()) for i in range(depth)
        ]
        self.norm = get_norm_layer(norm_layer)(embed_dim, eps=norm_eps, **dd)
        self.fc_norm = get_norm_layer(norm_layer)(embed_dim, eps=norm_eps, **dd) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _check_pool(self, global_pool: str) -> None:
        assert global_pool in _POOLS, f'global_pool must be one of {_POOLS}, not {global_pool!r}'
        assert global_pool != 'token' or self.num_prefix_tokens, "global_pool 'token' needs a class token"

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter anew from the original's distributions (golden statistics in the tests).

        Args:
            needs_reset: Also call `reset_parameters` of every module; False right after construction.
        """
        if needs_reset:
            # children first, since a mixer overwrites what its projections draw
            for module in reversed(list(self.modules())):
                reset = getattr(module, 'reset_parameters', None)
                if reset is not None:
                    reset()
        early = self.weight_init == 'early'
        # the original's truncation at +-2 is absolute, which at these deviations cuts nothing
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            if early:
                nn.init.zeros_(self.cls_token)
            else:
                nn.init.trunc_normal_(self.cls_token, std=0.02)
        if not early:
            _lecun_normal_(self.patch_embed.proj.weight)
            nn.init.constant_(self.patch_embed.get_parameter('proj.bias'), 0.0)
        for mixer in self.modules():
            if isinstance(mixer, BiMamba):
                self._init_mixer(mixer, early)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _init_mixer(self, mixer: BiMamba, early: bool) -> None:
        for name, linear in mixer.named_children():
            if not isinstance(linear, nn.Linear):
                continue
            if early:
                nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None and (early or name != 'dt_proj'):
                nn.init.zeros_(linear.bias)
        nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str) -> None:
        """Load a checkpoint file as timm's factory does, but `model` rather than `model_ema` of a DeiT-style file.

        The released configurations ask for it with `custom_load`.

        Raises:
            CheckpointError: the file cannot be read, or is not this model's.
        """
        cfg: Any = dict(
            getattr(self, 'pretrained_cfg', {}), state_dict=load_weights(checkpoint_path), custom_load=False
        )
        load_pretrained(self, cfg, num_classes=self.num_classes, in_chans=self.in_chans, filter_fn=checkpoint_filter_fn)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that weight decay must leave alone: embeddings and, unless `decay_state`, every A_log and D."""
        kept = {'pos_embed', 'cls_token'}
        if not self.decay_state:
            kept |= {'A_log', 'A_b_log', 'D', 'D_b'}
        return {name for name, _ in self.named_parameters() if name.rsplit('.', 1)[-1] in kept}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return dict(stem=r'^cls_token|pos_embed|patch_embed', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head, and the pooling unless global_pool is None.

        Raises:
            AssertionError: unsupported global_pool.
        """
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool  # type: ignore[assignment]
            update_model_args(self, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, **get_device_dtype(self)) if num_classes else nn.Identity()
        self.head.train(self.training)

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Change the image size or the patch size, with position embedding and patch projection resampled.

        Raises:
            ValueError: the patches do not tile img_size.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            self.pos_embed = nn.Parameter(
                resample_pos_embed(
                    self.pos_embed,
                    new_size=list(self.patch_embed.grid_size),
                    old_size=list(old_grid),
                    num_prefix_tokens=self.num_prefix_tokens,
                ),
                requires_grad=self.pos_embed.requires_grad,
            )
        for info in self.feature_info:
            info['reduction'] = self.patch_embed.feat_ratio()
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, Tuple[int, int]]:
        """Image -> tokens with position embedding, class token first, and the grid of patches."""
        grid_size = self.patch_embed.grid_size
        if self.dynamic_img_size:
            grid_size = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            pos_embed = self.pos_embed
            if self.dynamic_img_size:
                pos_embed = resample_pos_embed(
                    pos_embed,
                    new_size=[grid_size[0], grid_size[1]],
                    old_size=[self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]],
                    num_prefix_tokens=self.num_prefix_tokens,
                )
            x = x + pos_embed
        x = self.pos_drop(x)
        if self.residual_in_fp32:
            x = at_least_float32(x)
        return x, grid_size

    def _to_scan_order(self, x: torch.Tensor) -> torch.Tensor:
        """[cls, patches] -> the order in which tokens are scanned."""
        if self.middle_token:
            middle = (x.shape[1] - 1) // 2
            x = torch.cat([x[:, 1 : middle + 1], x[:, :1], x[:, middle + 1 :]], dim=1)
        elif self.double_token:
            x = torch.cat([x[:, :1], x[:, 2:], x[:, 1:2]], dim=1)
        return x

    def _to_prefix_order(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_to_scan_order`."""
        if self.middle_token:
            middle = (x.shape[1] - 1) // 2
            x = torch.cat([x[:, middle : middle + 1], x[:, :middle], x[:, middle + 1 :]], dim=1)
        elif self.double_token:
            x = torch.cat([x[:, :1], x[:, -1:], x[:, 1:-1]], dim=1)
        return x

    @torch.jit.ignore
    def _random_order(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """A random scan order of this training step, as indices into the usual one."""
        order = torch.arange(num_tokens, device=device)
        if self.random_class_position:
            middle = (num_tokens - 1) // 2 if self.middle_token else 0
            patches = torch.cat([order[:middle], order[middle + 1 :]])
            position = int(torch.randint(num_tokens, ()))
            order = torch.cat([patches[:position], order[middle : middle + 1], patches[position:]])
        if self.random_token_order:
            order = order[torch.randperm(num_tokens, device=device)]
        return order

    def _run_blocks(
        self,
        x: torch.Tensor,
        take_indices: List[int],
        stop_index: int,
    ) -> Tuple[torch.Tensor, List[torch.Tensor], Tuple[int, int]]:
        """Images through the embedding and the blocks up to stop_index.

        The embedded tokens live in this frame alone, so that they are freed after the first block.

        Returns:
            Tokens, copies of them after the blocks in take_indices, both class token first, and the grid of patches.
        """
        x, grid_size = self._embed(x)
        x = self._to_scan_order(x)
        order = torch.empty(0, dtype=torch.long)
        shuffle = self.training and (self.random_token_order or self.random_class_position)
        if shuffle:
            order = self._random_order(x.shape[1], x.device)
            x = x[:, order]
        cos, sin = order, order
        if self.rope:
            # an embedded class token counts as one before all patches, in the middle too, as in the original
            cos, sin = rope_tables(
                grid_size,
                self.embed_dim,
                self.rope_pretrained_grid,
                min(self.num_prefix_tokens, 1),
                x.shape[1],
                x.device,
            )
        intermediates: List[torch.Tensor] = []
        before = x
        for i, block in enumerate(self.blocks):
            if torch.jit.is_scripting() or i <= stop_index:
                if self.rope:
                    if self.rope_residual or i == 0:
                        x = rotate(x, cos, sin)
                    else:
                        x = before + rotate(x - before, cos, sin)
                before = x
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
                if i in take_indices:
                    intermediates.append(self._to_prefix_order(x[:, order.argsort()] if shuffle else x))
        if shuffle:
            x = x[:, order.argsort()]
        return self._to_prefix_order(x), intermediates, grid_size

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """Forward features that also returns the residual stream after chosen blocks, in the input's dtype.

        Args:
            x: Images (B, C, H, W).
            indices: Last n blocks if int, all if None, these blocks if a list.
            return_prefix_tokens: Return pairs of spatial and prefix tokens.
            norm: Apply the final norm to every intermediate.
            stop_early: Stop after the last wanted block.
            output_fmt: 'NCHW' (B, D, H', W') or 'NLC' (B, M, D).
            intermediates_only: Return the intermediates alone.
            output_dict: Return a dict with 'image_features', 'image_intermediates' ('image_intermediates_prefix').

        Returns:
            Final features and intermediates, the intermediates alone, or a dict of them.
        """
        assert output_fmt in ('NCHW', 'NLC'), "output_fmt must be 'NCHW' or 'NLC'"
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        dtype = x.dtype
        stop_index = max_index if stop_early else len(self.blocks) - 1
        x, outputs, (height, width) = self._run_blocks(x, take_indices, stop_index)
        if norm:
            outputs = [self.norm(y) for y in outputs]
        outputs = [y.to(dtype) for y in outputs]
        prefix_tokens = [y[:, : self.num_prefix_tokens] for y in outputs]
        intermediates = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == 'NCHW':
            intermediates = [
                y.transpose(1, 2).reshape(y.shape[0], -1, height, width).contiguous() for y in intermediates
            ]

        if output_dict:
            result: Dict[str, Any] = {'image_intermediates': intermediates}
            if return_prefix_tokens and self.num_prefix_tokens:
                result['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result
        if not torch.jit.is_scripting() and return_prefix_tokens and self.num_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens))  # type: ignore[arg-type]
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Drop the blocks after the last wanted one, and norm and head if asked for.

        Returns:
            Absolute indices of the wanted blocks.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> normalized tokens (B, prefix + M, D), class token first."""
        take_indices: List[int] = []
        x, _, _ = self._run_blocks(x, take_indices, len(self.blocks) - 1)
        return self.norm(x)

    def pool(self, x: torch.Tensor, pool_type: Optional[str] = None) -> torch.Tensor:
        """Tokens (B, prefix + M, D) -> (B, D), or all tokens for ''."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == 'last':
            return x[:, -1]
        if pool_type == 'token' and self.double_token:
            return x[:, :2].mean(dim=1)
        return global_pool_nlc(x, pool_type=pool_type, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of `forward_features` -> logits (B, num_classes), or the pooled features (B, D)."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _lecun_normal_(weight: torch.Tensor) -> None:
    """timm 0.4.12's lecun_normal_: a normal of variance 1 / fan_in widened for a truncation that never bites."""
    fan_in = weight[0].numel()
    nn.init.trunc_normal_(weight, std=math.sqrt(1.0 / fan_in) / 0.87962566103423978)


def _from_original(state_dict: Dict[str, torch.Tensor], model: VisionMamba) -> Dict[str, torch.Tensor]:
    """The original's names and orders (any class token; rope buffers are dropped) -> ours."""
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
        rows = out['pos_embed']
        if model.middle_token:
            middle = (rows.shape[1] - 1) // 2
            out['pos_embed'] = torch.cat([rows[:, middle : middle + 1], rows[:, :middle], rows[:, middle + 1 :]], dim=1)
        elif model.double_token:
            out['pos_embed'] = torch.cat([rows[:, :1], rows[:, -1:], rows[:, 1:-1]], dim=1)
    return out


def _source_grid(model: VisionMamba, patch_weight: Optional[torch.Tensor], num_patches: int) -> Tuple[int, int]:
    """Grid of a checkpoint's position embedding: from its metadata where that fits, else a square."""
    grid = get_pretrained_grid_size(model, patch_weight, num_patches)
    side = math.isqrt(num_patches)
    if grid is not None:
        return grid
    if side * side != num_patches:
        raise CheckpointError(
            f'the position embedding of {num_patches} patches is not square and its grid is not recorded: '
            f'create the model at the image size it was trained with'
        )
    return side, side


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionMamba) -> Dict[str, torch.Tensor]:
    """Weights of the original's releases or of this package -> the model's state dict; strict by itself.

    Takes a DeiT-style training checkpoint's `model`, resamples patch projection and position embedding to the model's
    sizes, and lets a headless encoder pass.

    Raises:
        CheckpointError: names or shapes are another family's or another size's.
    """
    for key in ('model', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if any(name.startswith('layers.') for name in state_dict):
        state_dict = _from_original(state_dict, model)
    own = model.state_dict()
    check_names(set(state_dict), set(own))
    out = {}
    for name, value in state_dict.items():
        if name == 'patch_embed.proj.weight' and value.shape[-2:] != own[name].shape[-2:]:
            value = resample_patch_embed(value, list(own[name].shape[-2:]))
        elif name == 'pos_embed' and value.ndim == 3 and value.shape[2] == own[name].shape[2]:
            num_patches = value.shape[1] - model.num_prefix_tokens
            grid = list(model.patch_embed.grid_size)
            square = math.isqrt(max(num_patches, 0)) ** 2 == num_patches
            if value.shape != own[name].shape or (square and grid[0] != grid[1]):
                value = resample_pos_embed(
                    value,
                    new_size=grid,
                    old_size=list(_source_grid(model, state_dict.get('patch_embed.proj.weight'), num_patches)),
                    num_prefix_tokens=model.num_prefix_tokens,
                )
        if name in own:  # where the model has no head, timm drops the checkpoint's
            check_shape(name, value, own[name])
        out[name] = value
    return out


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'fixed_input_size': True,
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2401.09417',
        'custom_load': True,
        **kwargs,
    }


def _hustvl(size: str, filename: str) -> Dict[str, Any]:
    return _cfg(
        hf_hub_id=f'hustvl/Vim-{size}-midclstok',
        hf_hub_filename=filename,
        origin_url='https://github.com/hustvl/Vim',
    )


def _small_cfg(**kwargs: Any) -> Dict[str, Any]:
    return _cfg(**{'num_classes': 10, 'input_size': (3, 32, 32), 'crop_pct': 1.0, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        'vim_tiny_patch16_224.hustvl_in1k': _hustvl('tiny', 'vim_t_midclstok_76p1acc.pth'),
        'vim_small_patch16_224.hustvl_in1k': _hustvl('small', 'vim_s_midclstok_80p5acc.pth'),
        'vim_base_patch16_224.hustvl_in1k': _hustvl('base', 'vim_b_midclstok_81p9acc.pth'),
        'vim_tiny_patch16_384.untrained': _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        'vim_small_patch16_384.untrained': _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        'vim_base_patch16_384.untrained': _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        'vim_tiny_patch16_stride8_224.hustvl_in1k_ft_in1k': _hustvl('tiny', 'vim_t_midclstok_ft_78p3acc.pth'),
        'vim_small_patch16_stride8_224.hustvl_in1k_ft_in1k': _hustvl('small', 'vim_s_midclstok_ft_81p6acc.pth'),
        'vim_tiny_patch16_rope_ape_gap_224.untrained': _cfg(),
        'vim_small_patch16_rope_ape_gap_224.untrained': _cfg(),
        'vim_base_patch16_rope_ape_gap_224.untrained': _cfg(),
        'vim_tiny_patch8_rope_ape_gap_224.untrained': _cfg(),
        'vim_tiny_patch16_rope_ape_224.untrained': _cfg(),
        'vim_tiny_patch8_rope_ape_224.untrained': _cfg(),
        'vim_nano_patch4_32.untrained': _small_cfg(),
        'vim_nano_patch4_32.cifar10': _small_cfg(**packaged('vim_nano_patch4_32.cifar10')),
        'vim_tiny_patch4_32.untrained': _small_cfg(),
        'vim_small_patch4_32.untrained': _small_cfg(),
        'test_vim.untrained': _cfg(input_size=(3, 160, 160), fixed_input_size=False, crop_pct=0.95),
    }
)


def _create_vision_mamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    if pretrained:
        kwargs = on_disk(variant, kwargs)
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


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
