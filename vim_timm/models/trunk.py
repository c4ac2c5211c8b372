"""The columnar trunk of every family here, with timm's model interface written once.

At its surface a trunk keeps its tokens as every timm model does, class token first, then patches in row-major order.
Only between the first and the last block do they stand in scan order, where the class token may be in the middle.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import get_device_dtype, global_pool_nlc
from timm.models import checkpoint, load_pretrained
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size

from vim_timm.layers.block import Block
from vim_timm.layers.draw import draw_linear
from vim_timm.layers.masking import kept_patches, take_tokens
from vim_timm.layers.norm import at_least_float32
from vim_timm.layers.patch_embed import PatchEmbed, Size
from vim_timm.layers.pos_embed import resample_pos_embed
from vim_timm.layers.rope import StreamRope, rope_tables, rotate
from vim_timm.layers.token_order import (
    PREFIX_TOKENS,
    ClassToken,
    random_order,
    scan_layout,
    to_prefix_order,
    to_scan_order,
)
from vim_timm.models.adapt import filter_of
from vim_timm.models.checkpoint import read_checkpoint, recorded_size, select_weights
from vim_timm.models.pretrained import describes_weights
from vim_timm.settings.inherited import settings_of

# they decide by a tensor or its size, which a tracer has not
for _name in ('at_least_float32', 'resample_pos_embed', 'rope_tables'):
    torch.fx.wrap(_name)

POOLS = ('', 'token', 'avg', 'max', 'last')


class Trunk(nn.Module):
    """Patches and class tokens through blocks of one width, a norm, a pool and a head.

    A family subclasses it with a constructor that makes the parts from plain arguments; `docs/add-a-family.md` is an
    example.
    """

    # a subclass's own annotations would hide Final ones
    __constants__ = ['dynamic_img_size', 'class_token', 'rope', 'rope_residual', 'wants_neighbours']

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Sequence[Block],
        norm_layer: Callable[..., nn.Module],
        num_classes: int = 1000,
        global_pool: str = 'token',
        class_token: ClassToken = 'middle',
        pos_embed: bool = True,
        rope: Optional[StreamRope] = None,
        fc_norm: bool = False,
        residual_in_fp32: bool = True,
        random_token_order: bool = False,
        random_class_position: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        weight_init: str = '',
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            patch_embed: The stem, images (B, C, H, W) -> patches (B, M, D).
            blocks: Blocks of width D, all different.
            norm_layer: Makes the last norm from a width.
            num_classes: Number of classes of the head, 0 for none.
            global_pool: 'token' (class token), 'avg' or 'max' over patches, 'last' (last patch), '' (all tokens).
            class_token: Where the class token stands in the scan: before patch M // 2, before all patches, both
                before and after ('double', two tokens, averaged by the 'token' pool), or nowhere.
            pos_embed: Add a learned position embedding.
            rope: Rotate the residual stream before every block.
            fc_norm: Normalize once more after pooling.
            residual_in_fp32: Keep the residual stream in float32 when tokens are bfloat16 or float16.
            random_token_order: Shuffle the scan order in training.
            random_class_position: Put the class token at a random place of the scan in training.
            drop_rate: Dropout before the head.
            pos_drop_rate: Dropout after the position embedding.
            weight_init: Scheme of initialization, '' the family's usual, 'skip' none, others as the family says.

        Raises:
            AssertionError: unsupported global_pool, or the 'token' pool without a class token.
            ValueError: another argument has an unknown value, or does not go with the others.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        embed_dim = patch_embed.embed_dim
        if class_token not in PREFIX_TOKENS:
            raise ValueError(f"class_token must be 'middle', 'head', 'double' or 'none', not {class_token!r}")
        if random_class_position and class_token not in ('middle', 'head'):
            raise ValueError(f"random_class_position needs class_token 'middle' or 'head', not {class_token!r}")
        if rope is not None and embed_dim % 4:
            raise ValueError(f'rope needs an embed_dim divisible by 4, not {embed_dim}')
        if (random_token_order or random_class_position) and any(block.wants_layout for block in blocks):
            raise ValueError('a random scan order does not go with mixers that need to know where tokens stand')
        self.num_prefix_tokens = PREFIX_TOKENS[class_token]
        self._check_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = patch_embed.in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.has_class_token = self.num_prefix_tokens > 0
        self.class_token = class_token
        self.rope = rope is not None
        self.rope_residual = rope is None or rope.residual
        self.rope_pretrained_grid = 0 if rope is None else rope.pretrained_grid
        self.residual_in_fp32 = residual_in_fp32
        self.dynamic_img_size = not patch_embed.strict_img_size
        self.random_token_order = random_token_order
        self.random_class_position = random_class_position
        self.weight_init = weight_init
        self.grad_checkpointing = False

        self.patch_embed = patch_embed
        num_tokens = patch_embed.num_patches + self.num_prefix_tokens
        self.cls_token = (
            nn.Parameter(torch.empty(1, self.num_prefix_tokens, embed_dim, **dd)) if self.has_class_token else None
        )
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(blocks)
        self.wants_neighbours = any(getattr(module, 'wants_neighbours', False) for module in self.blocks.modules())
        self.feature_info = [
            dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=patch_embed.feat_ratio())
            for i in range(len(self.blocks))
        ]
        self.norm = norm_layer(embed_dim, **dd)
        self.fc_norm = norm_layer(embed_dim, **dd) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.make_head(num_classes, **dd)
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _check_pool(self, global_pool: str) -> None:
        assert global_pool in POOLS, f'global_pool must be one of {POOLS}, not {global_pool!r}'
        assert global_pool != 'token' or self.num_prefix_tokens, "global_pool 'token' needs a class token"

    def make_head(self, num_classes: int, device=None, dtype=None) -> nn.Module:
        """A new classifier of pooled features (B, D), nn.Identity for no classes."""
        return nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter anew.

        Args:
            needs_reset: Also call `reset_parameters` of every module; False right after construction.
        """
        if needs_reset:
            # children first, since a mixer overwrites what its projections draw
            for module in reversed(list(self.modules())):
                reset = getattr(module, 'reset_parameters', None)
                if reset is not None:
                    reset()
        self.init_stem()
        for block in self.blocks:
            init = getattr(block.mixer, 'init_weights', None)
            if init is not None:
                init(len(self.blocks), self.weight_init)
        self.init_head()

    def init_stem(self) -> None:
        """Draw the embeddings and the patch projection."""
        # truncation at +-2 is absolute, which at these deviations cuts nothing
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.patch_embed.init_weights()

    def init_head(self) -> None:
        """Draw the classifier."""
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                draw_linear(module)

    @torch.jit.ignore
    def classifier_name(self) -> str:
        """Name of the layer whose outputs are the logits."""
        return 'head.fc2' if isinstance(self.head, nn.Sequential) else 'head'

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str) -> None:
        """Load a checkpoint file as timm's factory does, but `model` rather than `model_ema` of a DeiT-style file.

        Configurations ask for it with `custom_load`.

        Raises:
            CheckpointError: the file cannot be read, or is not this model's.
        """
        cfg: Dict[str, Any] = getattr(self, 'pretrained_cfg', {})
        content = read_checkpoint(checkpoint_path)
        settings = settings_of(content) or recorded_size(checkpoint_path)
        if not settings and describes_weights(cfg):
            size = getattr(self, 'pretrained_model_args', {}).get('img_size') or cfg['input_size'][1:]
            settings = {'img_size': size}
        weights = {'state_dict': select_weights(content, None, f'checkpoint {checkpoint_path}'), 'args': settings}
        load_pretrained(
            self,
            {**cfg, 'state_dict': weights, 'custom_load': False, 'classifier': self.classifier_name()},
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            filter_fn=filter_of(self),
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that weight decay must leave alone: embeddings, and what the mixers name."""
        names = {name for name in ('pos_embed', 'cls_token') if getattr(self, name) is not None}
        for i, block in enumerate(self.blocks):
            own = getattr(block.mixer, 'no_weight_decay', set)
            names |= {f'blocks.{i}.mixer.{name}' for name in own()}
        return names

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
            self.global_pool = global_pool
            update_model_args(self, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        self.head = self.make_head(num_classes, **get_device_dtype(self))
        self.head.train(self.training)

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Change the image size or the patch size, with position embedding and patch projection resampled.

        Raises:
            ValueError: a size is no whole number, or the patches do not tile img_size.
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

    def embed(self, x: torch.Tensor, keep: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, Tuple[int, int]]:
        """Images (B, C, H, W) -> patches (B, M, D) with their position embedding, row-major, and the grid of all.

        Args:
            keep: Row-major indices (B, K) of the patches that are wanted, (B, K, D); None for all.
        """
        grid = self.patch_embed.grid_size
        if self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.patch_embed(x) if keep is None else self.patch_embed(x, keep)
        pos_embed = self.pos_embed
        if pos_embed is not None:
            if self.dynamic_img_size:
                pos_embed = resample_pos_embed(
                    pos_embed,
                    new_size=[grid[0], grid[1]],
                    old_size=[self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]],
                    num_prefix_tokens=self.num_prefix_tokens,
                )
            positions = pos_embed[:, self.num_prefix_tokens :]
            if keep is not None:
                positions = take_tokens(positions.expand(x.shape[0], -1, -1), keep)
            x = x + positions
        return x, grid

    def encode(
        self,
        patches: torch.Tensor,
        grid: Tuple[int, int],
        keep: Optional[torch.Tensor] = None,
        take: Sequence[int] = (),
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Embedded patches through the blocks.

        Args:
            patches: What `embed` returns, (B, M, D), or of the patches in `keep` alone (B, K, D).
            grid: The grid of all patches.
            keep: Row-major indices (B, K), ascending, of the patches that a masked autoencoder leaves visible; None
                for all. The class token then stands in the middle of what is visible.
            take: Numbers of the blocks whose outputs are wanted.

        Returns:
            Tokens (B, prefix + K, D), class token first, before the last norm; and the outputs of the blocks in `take`,
            in the same order of tokens.

        Raises:
            ValueError: rotary positions with a class token in the middle and a masked image.
        """
        if keep is not None and self.rope and self.class_token == 'middle':
            raise ValueError("a masked image with rotary positions needs class_token 'head' or 'none'")
        x, intermediates, _ = self._run(patches, grid, keep, list(take), len(self.blocks) - 1)
        return x, intermediates

    def _run(
        self,
        x: torch.Tensor,
        patch_grid: Optional[Tuple[int, int]],
        keep: Optional[torch.Tensor],
        take: List[int],
        stop: int,
    ) -> Tuple[torch.Tensor, List[torch.Tensor], Tuple[int, int]]:
        """Images (patch_grid None), or embedded patches, through the blocks up to number `stop`.

        The embedded tokens live in this frame alone, so that they are freed after the first block.

        Returns:
            Tokens, copies of them after the blocks in `take`, both class token first, and the grid of patches.
        """
        if patch_grid is None:
            x, grid = self.embed(x)
        else:
            grid = patch_grid
        if keep is not None:
            x = kept_patches(x, keep, grid[0] * grid[1])
        layout = scan_layout(grid, self.class_token, x.shape[1], keep, self.wants_neighbours)
        x = self._with_prefix(x)
        x = self.pos_drop(x)
        if self.residual_in_fp32:
            x = at_least_float32(x)
        x = to_scan_order(x, self.class_token)
        order = torch.empty(0, dtype=torch.long)
        shuffle = self.training and (self.random_token_order or self.random_class_position)
        if shuffle:
            order = random_order(
                x.shape[1], self.class_token, self.random_class_position, self.random_token_order, x.device
            )
            x = x[:, order]
        cos, sin = order, order
        if self.rope:
            # an embedded class token counts as one before all patches, in the middle too, as in the original
            before = min(self.num_prefix_tokens, 1)
            tokens = grid[0] * grid[1] + self.num_prefix_tokens
            cos, sin = rope_tables(grid, self.embed_dim, self.rope_pretrained_grid, before, tokens, x.device)
            if keep is not None:
                # row 0 of a table with prefix tokens is one that is not rotated
                rows = nn.functional.pad(keep + before, [before, self.num_prefix_tokens - before])
                cos, sin = cos[rows], sin[rows]
        intermediates: List[torch.Tensor] = []
        last = x
        for i, block in enumerate(self.blocks):
            if torch.jit.is_scripting() or i <= stop:
                if self.rope:
                    if self.rope_residual or i == 0:
                        x = rotate(x, cos, sin)
                    else:
                        x = last + rotate(x - last, cos, sin)
                last = x
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, layout)
                else:
                    x = block(x, layout)
                if i in take:
                    y = x[:, order.argsort()] if shuffle else x
                    intermediates.append(to_prefix_order(y, self.class_token))
        if shuffle:
            x = x[:, order.argsort()]
        return to_prefix_order(x, self.class_token), intermediates, grid

    def _with_prefix(self, x: torch.Tensor) -> torch.Tensor:
        """Patches (B, K, D) -> [cls, patches], the class token with its position embedding."""
        if self.cls_token is None:
            return x
        prefix = self.cls_token.expand(x.shape[0], -1, -1)
        if self.pos_embed is not None:
            prefix = prefix + self.pos_embed[:, : self.num_prefix_tokens]
        return torch.cat([prefix, x], dim=1)

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
        stop = max_index if stop_early else len(self.blocks) - 1
        x, outputs, (height, width) = self._run(x, None, None, take_indices, stop)
        if norm:
            outputs = [self.norm(y) for y in outputs]
        outputs = [y.to(dtype) for y in outputs]
        prefix_tokens = [y[:, : self.num_prefix_tokens] for y in outputs]
        intermediates = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == 'NCHW':
            intermediates = [
                y.transpose(1, 2).reshape(y.shape[0], y.shape[2], height, width).contiguous() for y in intermediates
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
        take: List[int] = []
        x, _, _ = self._run(x, None, None, take, len(self.blocks) - 1)
        return self.norm(x)

    def pool(self, x: torch.Tensor, pool_type: Optional[str] = None) -> torch.Tensor:
        """Tokens (B, prefix + M, D) -> (B, D), or all tokens for ''."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == 'last':
            return x[:, -1]
        if pool_type == 'token' and self.class_token == 'double':
            return x[:, :2].mean(dim=1)
        return global_pool_nlc(x, pool_type=pool_type, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of `forward_features` -> logits (B, num_classes), or the pooled features (B, D)."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
