"""A vision transformer for images of many channels, such as satellite tiles, and its masked autoencoder.

Attention is factorized: over the patches of a channel, then over the channels at a patch, so its cost grows with
C * M^2 + M * C^2 instead of (C * M)^2 for C channels of M patches. Every channel has a mask of its own.

Related: ChannelViT, https://arxiv.org/abs/2309.16108; masking whole channels, https://arxiv.org/abs/2503.19331.
"""

from functools import partial
from typing import Any, Dict, List, Literal, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, register_notrace_function, register_notrace_module
from timm.models import checkpoint, generate_default_cfgs, register_model

from vim_timm.layers.draw import zero_bias
from vim_timm.layers.factorized import FactorizedBlock, FactorizedDecoder, factorized_positions
from vim_timm.layers.masking import random_masking
from vim_timm.layers.norm import LayerNorm, at_least_float32
from vim_timm.layers.patch_embed import PatchEmbed, Size, check_channels, check_matches
from vim_timm.models import masked_autoencoder
from vim_timm.models.adapt import adapt
from vim_timm.models.build import build_model, cfg
from vim_timm.models.families import register_family
from vim_timm.models.masked_autoencoder import Grid, MaskedAutoencoder
from vim_timm.models.trunk import Trunk

# they decide by a tensor or its size, which a tracer has not
for _name in ('at_least_float32', 'check_channels', 'check_matches', 'factorized_positions', 'pad_images'):
    torch.fx.wrap(_name)

__all__ = ['FactorizedAutoencoder', 'FactorizedViT']


@register_notrace_function
def pad_images(x: torch.Tensor, value: torch.Tensor, patch: Tuple[int, int]) -> torch.Tensor:
    """Images (B, C, H, W) with rows and columns of `value` (1,) until patches tile them.

    Raises:
        ValueError: x is not of a floating point type, where the sum below would make it one that nothing refuses.
    """
    rows, columns = -x.shape[2] % patch[0], -x.shape[3] % patch[1]
    if rows == 0 and columns == 0:
        return x
    if not x.is_floating_point():
        raise ValueError('images of a floating point type are wanted, normalized as the model was trained')
    inside = torch.zeros([1, 1, x.shape[2], x.shape[3]], dtype=x.dtype, device=x.device)
    return F.pad(x, [0, columns, 0, rows]) + value * F.pad(inside, [0, columns, 0, rows], value=1.0)


@register_notrace_module  # the image's size decides whether it pads
class ChannelPatchEmbed(PatchEmbed):
    """(B, C, H, W) -> (B, C, M, D): one projection for all channels, a learned value where patches exceed the image."""

    pad_value: torch.Tensor

    def __init__(
        self, img_size: Size, patch_size: Size, embed_dim: int, strict_img_size: bool, device=None, dtype=None
    ):
        super().__init__(
            img_size,
            patch_size,
            in_chans=1,
            embed_dim=embed_dim,
            strict_img_size=strict_img_size,
            dynamic_img_pad=True,
            device=device,
            dtype=dtype,
        )
        self.register_buffer('pad_value', torch.zeros(1, device=device, dtype=dtype))
        self._train_pad_value()

    def _check_sizes(self, size: Grid, patch: Grid, stride: Grid) -> None:
        if size[0] < patch[0] or size[1] < patch[1]:
            raise ValueError(f'an image of {size} is smaller than a patch of {patch}')

    def _train_pad_value(self) -> None:
        """Make the padding a parameter where there is any, else a buffer: no parameter is without a gradient.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        padded = any(size % patch for size, patch in zip(self.img_size, self.patch_size))
        value = self.pad_value.detach()
        del self.pad_value
        if padded or not self.strict_img_size:
            self.pad_value = nn.Parameter(value, requires_grad=self.proj.weight.requires_grad)
        else:
            self.register_buffer('pad_value', value)

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Change the image size, the patch size, or both."""
        super().set_input_size(img_size, patch_size)
        self._train_pad_value()

    def init_weights(self) -> None:
        """Draw the projection; the padding starts at zero."""
        super().init_weights()
        nn.init.zeros_(self.pad_value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        batch, channels, height, width = x.shape
        if self.strict_img_size:
            check_matches(height, width, self.img_size)
        else:
            self._check_sizes((height, width), self.patch_size, self.patch_size)
        x = pad_images(x, self.pad_value, self.patch_size)
        x = self.proj(x.flatten(0, 1).unsqueeze(1)).flatten(2).transpose(1, 2)
        return x.reshape(batch, channels, x.shape[1], x.shape[2])


class FactorizedViT(Trunk):
    """Vision transformer with factorized attention, and timm's model interface.

    At its surface, in `forward_features` and after, the tokens of all channels are averaged: (B, 1 + M, D).
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 13,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        embed_dim: int = 256,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        fc_norm: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            img_size: Input image size; patches may exceed it.
            patch_size: Patch size.
            in_chans: Number of image channels C.
            num_classes: Number of classes of the head, 0 for none.
            global_pool: 'token' (class token), 'avg' or 'max' over patches, 'last' (last patch), '' (all tokens).
            embed_dim: Width D of the tokens.
            depth: Number of blocks.
            num_heads: Attention heads of a block.
            mlp_ratio: Width of both half feed-forwards as a multiple of embed_dim.
            fc_norm: Normalize once more after pooling.
            dynamic_img_size: Accept any image size.
            drop_rate: Dropout before the head.
            proj_drop_rate: Dropout in every block.
            drop_path_rate: Stochastic depth, linear from 0 in the first block to this rate in the last.

        Raises:
            AssertionError: unsupported global_pool.
            ValueError: a width that does not fit the heads or the positions.
        """
        dd = {'device': device, 'dtype': dtype}
        factorized_positions(embed_dim, 1, (1, 1))  # refuses a width that it cannot take
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        blocks: Any = [FactorizedBlock(embed_dim, num_heads, mlp_ratio, proj_drop_rate, rate, **dd) for rate in rates]
        super().__init__(
            ChannelPatchEmbed(img_size, patch_size, embed_dim, not dynamic_img_size, **dd),
            blocks,
            partial(LayerNorm, eps=1e-6),
            num_classes=num_classes,
            global_pool=global_pool,
            class_token='head',
            pos_embed=False,
            fc_norm=fc_norm,
            drop_rate=drop_rate,
            weight_init='skip',
            **dd,
        )
        self.in_chans = in_chans
        self.cls_token = nn.Parameter(torch.empty(1, in_chans, 1, embed_dim, **dd))
        self.weight_init = ''
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter anew: uniform by Glorot's rule, class tokens with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)
            elif needs_reset and (reset := getattr(module, 'reset_parameters', None)):
                reset()
        self.init_stem()
        self.init_head()

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """The class tokens."""
        return {'cls_token'}

    def embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, Tuple[int, int]]:  # type: ignore[override]
        """Images (B, C, H, W) -> patches (B, C, M, D) with their positions, and the grid of a channel's patches."""
        check_channels(x, self.in_chans)
        grid = self.patch_embed.grid_size
        if self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.patch_embed(x)
        return x + self._positions(grid, x)[:, :, 1:], grid

    def _positions(self, grid: Tuple[int, int], x: torch.Tensor) -> torch.Tensor:
        """Positions (1, C, 1 + M, D) in the dtype of x."""
        return factorized_positions(self.embed_dim, self.in_chans, grid, x.device).to(x.dtype)

    def encode(  # type: ignore[override]
        self,
        patches: torch.Tensor,
        grid: Tuple[int, int],
        keep: Optional[torch.Tensor] = None,
        take: Sequence[int] = (),
        present: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Embedded patches through the blocks.

        Args:
            patches: What `embed` returns, (B, C, M, D).
            grid: The grid of all patches of a channel.
            keep: Indices (B, C, K), ascending, of each channel's visible patches; None for all.
            take: Numbers of the blocks whose outputs are wanted.
            present: Which channels (B, C) of an image are there, at least one; None for all.

        Returns:
            Tokens (B, C, 1 + K, D), class tokens first, before the last norm, and the outputs of the blocks in `take`.
            Those of channels that are not there mean nothing.

        Raises:
            ValueError: keep is of other images.
        """
        return self._run_channels(patches, grid, keep, list(take), len(self.blocks) - 1, present)

    def _run(
        self,
        x: torch.Tensor,
        patch_grid: Optional[Tuple[int, int]],
        keep: Optional[torch.Tensor],
        take: List[int],
        stop: int,
    ) -> Tuple[torch.Tensor, List[torch.Tensor], Tuple[int, int]]:
        """What the verbs make of images: tokens (B, 1 + M, D), the mean of the channels, copies, and the grid."""
        x, grid = self.embed(x)
        x, intermediates = self._run_channels(x, grid, None, take, stop, None)
        return x.mean(dim=1), [y.mean(dim=1) for y in intermediates], grid

    def _run_channels(
        self,
        x: torch.Tensor,
        grid: Tuple[int, int],
        keep: Optional[torch.Tensor],
        take: List[int],
        stop: int,
        present: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """`encode` up to block number `stop`."""
        places: Optional[torch.Tensor] = None
        visible: Optional[torch.Tensor] = None
        if keep is not None:
            if x.shape[:2] != keep.shape[:2]:
                raise ValueError(f'keep of {list(keep.shape)} does not go with patches of {list(x.shape)}')
            x = x.gather(2, keep.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
            places = F.pad(keep + 1, [1, 0])  # place 0 is the class token's
        if places is not None or present is not None:
            nowhere = torch.zeros([x.shape[0], x.shape[1], 1 + grid[0] * grid[1]], dtype=torch.bool, device=x.device)
            visible = ~nowhere if places is None else nowhere.scatter(2, places, 1)  # no True in TorchScript
            if present is not None:
                visible = visible & present.unsqueeze(-1)
        token = self.cls_token
        assert token is not None
        tokens = (token + self._positions(grid, token)[:, :, :1]).expand(x.shape[0], -1, -1, -1)
        x = at_least_float32(self.pos_drop(torch.cat([tokens, x], dim=2)))
        intermediates: List[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            if torch.jit.is_scripting() or i <= stop:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, places, visible)
                else:
                    x = block(x, places, visible)
                if i in take:
                    intermediates.append(x)
        return x, intermediates

    def as_autoencoder(self, **kwargs: Any) -> 'FactorizedAutoencoder':
        """The masked autoencoder around this encoder."""
        return FactorizedAutoencoder(self, **kwargs)


class FactorizedAutoencoder(MaskedAutoencoder):
    """Masked autoencoder of many-channel images: a token for each channel and patch, a mask for each channel.

    `forward` returns predictions (B, L, p * p) and the mask (B, L) for the L = C * M patches, channel by channel.
    """

    loss: Literal['mse', 'l1'] = 'l1'
    by_channel = True

    def __init__(
        self,
        encoder: Union[str, nn.Module] = 'favit_small_patch16_224',
        mask_ratio: float = 0.75,
        channel_drop: float = 0.0,
        decoder_dim: int = 256,
        decoder_depth: int = 6,
        decoder_heads: int = 8,
        sigmoid: bool = False,
        num_classes: int = 0,
        device=None,
        dtype=None,
        **encoder_args: Any,
    ) -> None:
        """
        Args:
            encoder: A `FactorizedViT`, or the name of one.
            mask_ratio: Share of each channel's patches that the encoder does not see.
            channel_drop: Probability that it sees nothing of a channel, in training; at least one channel stays.
            decoder_dim: Width of the decoder.
            decoder_depth: Number of its blocks.
            decoder_heads: Attention heads of a block.
            sigmoid: End in a sigmoid, for pixels in 0..1.
            num_classes: Classes of the encoder's head, 0 for none.
            encoder_args: Arguments of the named encoder, such as img_size, patch_size, in_chans, embed_dim, depth.

        Raises:
            ValueError: a ratio or a size is impossible, or the encoder is another.
        """
        nn.Module.__init__(self)
        dd = {'device': device, 'dtype': dtype}
        if not 0.0 <= channel_drop < 1.0:
            raise ValueError(f'channel_drop must be at least 0 and below 1, not {channel_drop}')
        self.set_encoder(encoder, mask_ratio, encoder_args, dict(num_classes=num_classes, **dd))
        if not isinstance(self.encoder, FactorizedViT):
            raise ValueError(f'masks for each channel need a FactorizedViT, not {type(self.encoder).__name__}')
        self.channel_drop = channel_drop
        self.sigmoid = sigmoid
        self.decoder = FactorizedDecoder(
            self.encoder.embed_dim,
            self.patch_size[0] * self.patch_size[1],
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            **dd,
        )
        self.freeze_head()

    @torch.jit.unused
    def forward(
        self,
        x: torch.Tensor,
        noise: Optional[torch.Tensor] = None,
        present: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Predict the patches of images from the visible ones.

        Args:
            x: Images (B, C, H, W).
            noise: What decides the masks (B, L): the patches of a channel with the least stay visible. C further
                columns decide which channels are dropped in training. By default random in training, and the same at
                every call in evaluation.
            present: Which channels (B, C), bool, are there, at least one of each image; what stands in the others, be
                it NaN, has no part. By default all are.

        Returns:
            Pixels of all patches (B, L, p * p), and the mask (B, L), 1 where a patch was removed.

        Raises:
            ValueError: no patch is visible, or x, noise or present has another size.
        """
        check_channels(x, self.in_chans)
        if present is not None:
            if present.shape != x.shape[:2]:
                raise ValueError(f'present is {tuple(present.shape)}, not {tuple(x.shape[:2])}, one for each channel')
            x = x.masked_fill(~present[:, :, None, None], 0.0)
        patches, grid = self.encoder.embed(x)
        batch, channels, count = patches.shape[:3]
        total = channels * count
        if noise is None:
            noise = self.draw_noise(x, self.noise_count((x.shape[2], x.shape[3])))
        if noise.shape[0] != batch or noise.shape[1] not in (total, total + channels):
            raise ValueError(f'noise is {tuple(noise.shape)}, not {(batch, total)}, a number for each patch')
        keep, mask = random_masking(noise[:, :total].reshape(batch * channels, count), self.mask_ratio)
        keep, mask = keep.unflatten(0, [batch, channels]), mask.unflatten(0, [batch, channels])
        if present is None and noise.shape[1] > total and self.training:
            present = self._draw_channels(noise[:, total:])
        if present is not None:
            mask = torch.where(present.unsqueeze(-1), mask, 1.0)
        x = self.encoder.norm(self.encoder.encode(patches, grid, keep, present=present)[0])
        pred = self.decoder(x, keep, grid, present).flatten(1, 2)
        return torch.sigmoid(pred) if self.sigmoid else pred, mask.flatten(1)

    def _draw_channels(self, noise: torch.Tensor) -> torch.Tensor:
        """Which channels (B, C) stay: those with noise of at least channel_drop, and the one with the most."""
        return (noise >= self.channel_drop).scatter(1, noise.argmax(dim=1, keepdim=True), True)

    def num_patches(self, size: Grid) -> int:
        """Patches L = C * M of an image of size (H, W)."""
        return self.in_chans * super().num_patches(size)

    def noise_count(self, size: Grid) -> int:
        """A number for each patch, and in training with channel_drop one for each channel."""
        return self.num_patches(size) + (self.in_chans if self.training and self.channel_drop else 0)

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> what `forward` predicts of them, (B, L, p * p)."""
        patches = super().patchify(x.flatten(0, 1).unsqueeze(1))
        return patches.unflatten(0, [x.shape[0], x.shape[1]]).flatten(1, 2)

    def unpatchify(self, patches: torch.Tensor, size: Grid) -> torch.Tensor:
        """The inverse of `patchify`, for images of size (H, W)."""
        by_channel = patches.unflatten(1, [self.in_chans, -1]).flatten(0, 1)
        return super().unpatchify(by_channel, size).reshape(patches.shape[0], self.in_chans, *size)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Weights of this package -> the model's state dict; strict by itself."""
    if isinstance(model, MaskedAutoencoder):
        return masked_autoencoder.checkpoint_filter_fn(state_dict, model)
    return adapt(state_dict, model)


register_family('a factorized vision transformer (favit)', r'\.patch_attn\.', r'\.channel_attn\.')


def _create_factorized_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> FactorizedViT:
    return build_model(FactorizedViT, variant, pretrained, checkpoint_filter_fn, kwargs)


def _create_factorized_mae(variant: str, pretrained: bool = False, **kwargs: Any) -> FactorizedAutoencoder:
    return build_model(FactorizedAutoencoder, variant, pretrained, checkpoint_filter_fn, kwargs)


# one projection serves all channels, so that none is adapted to another number of them
_CFG = dict(input_size=(13, 224, 224), first_conv=(), crop_pct=1.0, mean=(0.5,) * 13, std=(0.5,) * 13, paper_ids=None)

default_cfgs = generate_default_cfgs(
    {
        'favit_small_patch16_224.untrained': cfg(**_CFG),
        'test_favit.untrained': cfg(**{**_CFG, 'input_size': (13, 64, 64)}),
        'mae_favit_small_patch16_224.mae': cfg(**_CFG, num_classes=0, classifier=None),
    }
)


@register_model
def favit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> FactorizedViT:
    """Factorized attention over 13 channels: 256 wide, 6 blocks, 8 heads."""
    model_args = dict(in_chans=13, embed_dim=256, depth=6, num_heads=8)
    return _create_factorized_vit('favit_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def test_favit(pretrained: bool = False, **kwargs: Any) -> FactorizedViT:
    """A small model for tests."""
    model_args = dict(img_size=64, in_chans=13, embed_dim=64, depth=4, num_heads=2)
    return _create_factorized_vit('test_favit', pretrained, **dict(model_args, **kwargs))


@register_model
def mae_favit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> FactorizedAutoencoder:
    """Masked autoencoder over it: 6 + 6 blocks, L1 loss."""
    model_args = dict(encoder='favit_small_patch16_224')
    return _create_factorized_mae('mae_favit_small_patch16_224', pretrained, **dict(model_args, **kwargs))
