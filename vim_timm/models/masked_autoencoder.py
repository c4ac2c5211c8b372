"""Masked autoencoders over token encoders: most patches are hidden, and their pixels predicted from the others.

Paper: Masked Autoencoders Are Scalable Vision Learners, https://arxiv.org/abs/2111.06377. Written from the paper.
Visible tokens stay in scan order, which a scan needs and a transformer does not mind.
"""

from typing import Any, Callable, Dict, List, Literal, Optional, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.layers import PatchEmbed, to_2tuple
from timm.models import checkpoint_seq, generate_default_cfgs, group_parameters, register_model
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import VisionTransformer

from vim_timm.layers.decoder import DecoderBlocks, MaskedDecoder
from vim_timm.layers.masking import check_ratio, num_kept, random_masking, take_tokens
from vim_timm.layers.patch_embed import Size, check_channels, sides
from vim_timm.layers.patches import patchify, unpatchify
from vim_timm.layers.pos_embed import resample_pos_embed
from vim_timm.models.adapt import check_fit, filter_of, source_grid
from vim_timm.models.build import build_model, cfg, small_cfg
from vim_timm.models.checkpoint import CheckpointError, check_weights, read_checkpoint, select_weights, wants_average
from vim_timm.models.families import describe_family, register_family
from vim_timm.models.trunk import Trunk
from vim_timm.settings.inherited import settings_of
from vim_timm.settings.masked import AUTOENCODER

__all__ = ['MaskedAutoencoder']

Grid = Tuple[int, int]
EVAL_SEED = 0

# what an encoder may have after its tokens, and a pretext task on tokens leaves without gradient
_AFTER_TOKENS = ('fc_norm', 'attn_pool', 'head_dist', 'head')


def _of_encoder(name: str) -> property:
    return property(lambda self: getattr(self.encoder, name), doc=f"The encoder's `{name}`.")


class MaskedAutoencoder(nn.Module):
    """An encoder that sees some patches, and a decoder that predicts the pixels of all.

    timm's verbs (`forward_features`, `forward_head`, `forward_intermediates`, ...) are the encoder's, with every token
    visible.
    """

    loss: Literal['mse', 'l1'] = 'mse'  # the usual one
    by_channel = False  # whether patches are of one channel each, with a mask for each channel

    num_classes = _of_encoder('num_classes')
    num_features = _of_encoder('num_features')
    head_hidden_size = _of_encoder('head_hidden_size')
    embed_dim = _of_encoder('embed_dim')
    num_prefix_tokens = _of_encoder('num_prefix_tokens')
    global_pool = _of_encoder('global_pool')
    feature_info = _of_encoder('feature_info')
    patch_embed = _of_encoder('patch_embed')
    dynamic_img_size = _of_encoder('dynamic_img_size')
    # TorchScript compiles properties from the source of a method, which these have not
    __jit_unused_properties__ = [name for name, value in vars().items() if isinstance(value, property)]

    def __init__(
        self,
        encoder: Union[str, nn.Module],
        mask_ratio: float = 0.75,
        decoder: Literal['transformer', 'vim', 'vim2'] = 'transformer',
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 8,
        decoder_pos_embed: Literal['sincos', 'learned'] = 'sincos',
        num_classes: int = 0,
        device=None,
        dtype=None,
        **encoder_args: Any,
    ) -> None:
        """
        Args:
            encoder: A model of this package or a VisionTransformer of timm's, or the name of one. What it has after its
                tokens (pooling, head) stays as it is, and no longer takes gradients.
            mask_ratio: Share of the patches that the encoder does not see.
            decoder: Kind of its blocks, see `vim_timm.layers.decoder.DecoderBlocks`.
            decoder_dim: Width of the decoder.
            decoder_depth: Number of its blocks.
            decoder_heads: Attention heads of a transformer's block.
            decoder_pos_embed: Fixed or learned positions in the decoder.
            num_classes: Classes of the encoder's head, 0 for none.
            encoder_args: Arguments of the named encoder, such as img_size, patch_size, in_chans, embed_dim, depth.

        Raises:
            ValueError: mask_ratio or a size is impossible, or the encoder is none that can leave tokens out.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.set_encoder(encoder, mask_ratio, encoder_args, dict(num_classes=num_classes, **dd))
        self.decoder: Any = MaskedDecoder(
            self.encoder.embed_dim,
            self.patch_size[0] * self.patch_size[1] * self.in_chans,
            self.encoder.patch_embed.grid_size,
            self.encoder.num_prefix_tokens,
            DecoderBlocks(decoder, decoder_dim, decoder_depth, decoder_heads),
            pos_embed=decoder_pos_embed,
            **dd,
        )
        self.freeze_head()

    def set_encoder(
        self,
        encoder: Union[str, nn.Module],
        mask_ratio: float,
        encoder_args: Dict[str, Any],
        common: Dict[str, Any],
    ) -> None:
        """Check and take an encoder, or one by its name with arguments; the first part of a constructor.

        Raises:
            TypeError: encoder_args for an encoder that is there already, or of another autoencoder.
            ValueError: see the constructor.
        """
        check_ratio(mask_ratio)
        for name in AUTOENCODER:
            if name in encoder_args:
                raise TypeError(f'{type(self).__name__} has no {name}')
        if isinstance(encoder, str):
            encoder = timm.create_model(encoder, **common, **encoder_args)
        elif encoder_args:
            raise TypeError(f'{next(iter(encoder_args))} is an argument of an encoder that is given by its name')
        self.encoder: Any = encoder
        self.mask_ratio = mask_ratio
        self.has_trunk = isinstance(encoder, Trunk)
        if not isinstance(encoder, (Trunk, VisionTransformer)):
            raise ValueError(
                'a masked autoencoder takes a model of vim-timm or a VisionTransformer of timm as encoder, '
                f'not {type(encoder).__name__}'
            )
        embed: Any = encoder.patch_embed
        self.patch_size: Tuple[int, int] = to_2tuple(embed.patch_size)
        wanted = 'a masked autoencoder needs patches side by side that see nothing of each other, and this encoder'
        if isinstance(encoder, VisionTransformer) and not isinstance(embed, PatchEmbed):
            raise ValueError(f'{wanted} has other layers before them, a {type(embed).__name__}')
        if not isinstance(getattr(encoder, 'patch_drop', nn.Identity()), nn.Identity):
            raise ValueError('patch_drop_rate does not go with a masked autoencoder, which hides patches itself')
        seen, step = to_2tuple(embed.proj.kernel_size), to_2tuple(embed.proj.stride)
        if not seen == step == self.patch_size:
            raise ValueError(f'{wanted} looks at {seen} in steps of {step} for patches of {self.patch_size}')
        self.in_chans: int = getattr(encoder, 'in_chans', embed.proj.in_channels)
        # what timm's factory gives to the models that it makes
        self.pretrained_cfg = self.default_cfg = getattr(encoder, 'pretrained_cfg', {})
        self._traits = dict(getattr(encoder, '_traits', {}), first_conv=None)

    def freeze_head(self) -> None:
        """Take the gradients of what the encoder has after its tokens; the last part of a constructor."""
        for name in _AFTER_TOKENS:
            module = getattr(self.encoder, name, None)
            if module is not None:
                module.requires_grad_(False)

    @torch.jit.unused
    def forward(self, x: torch.Tensor, noise: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, torch.Tensor]:
        """Predict the patches of images from the visible ones.

        Args:
            x: Images (B, C, H, W).
            noise: What decides the masks (B, L): the patches with the least stay visible. By default random in
                training, and the same at every call in evaluation.

        Returns:
            Pixels of all patches (B, L, p * p * C), ordered as `vim_timm.layers.patches.patchify` orders them, and the
            mask (B, L), 1 where a patch was removed.

        Raises:
            ValueError: no patch is visible, or x or noise has another size.
        """
        check_channels(x, self.in_chans)
        count = self.num_patches((x.shape[2], x.shape[3]))
        noise = self.draw_noise(x, count) if noise is None else noise
        if tuple(noise.shape) != (x.shape[0], count):
            raise ValueError(f'noise is {tuple(noise.shape)}, not {(x.shape[0], count)}, a number for each patch')
        keep, mask = random_masking(noise, self.mask_ratio)
        tokens, grid = self._embed(x, keep)
        return self.decoder(self._encode(tokens, grid, keep), keep, grid), mask

    def num_patches(self, size: Tuple[int, int]) -> int:
        """Patches L of an image of size (H, W), each of which has a number of noise and a row of the prediction."""
        return -(-size[0] // self.patch_size[0]) * -(-size[1] // self.patch_size[1])

    def patches_of_mask(self, size: Tuple[int, int]) -> int:
        """Patches of an image of size (H, W), or of each of its channels, among which a mask is drawn."""
        return self.num_patches(size) // (self.in_chans if self.by_channel else 1)

    def describe_mask(self, size: Tuple[int, int]) -> str:
        """How many patches of an image of size (H, W) are hidden: '39 of 64 patches (60.9 %)' at the ratio 0.6."""
        patches = self.patches_of_mask(size)
        hidden = patches - num_kept(patches, self.mask_ratio)
        where = ' of each channel' if self.by_channel else ''
        return f'{hidden} of {patches} patches{where} ({100 * hidden / patches:.3g} %)'

    def noise_count(self, size: Tuple[int, int]) -> int:
        """Numbers of noise that decide the whole of a training image's mask."""
        return self.num_patches(size)

    def draw_noise(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Noise (B, count) for a call that brings none; ValueError under export to ONNX, which has no such numbers."""
        if torch.onnx.is_in_onnx_export():
            raise ValueError(f'ONNX draws no masks: give noise (B, {count}) as a second input')
        if self.training:
            return torch.rand(x.shape[0], count, device=x.device, dtype=torch.float32)
        generator = torch.Generator('cpu').manual_seed(EVAL_SEED)
        return torch.rand(x.shape[0], count, generator=generator, dtype=torch.float32, device='cpu').to(x.device)

    def _embed(self, x: torch.Tensor, keep: torch.Tensor) -> Tuple[torch.Tensor, Grid]:
        """Images -> kept tokens with positions, of timm's models behind prefix tokens, and the grid of all patches."""
        if self.has_trunk:
            return self.encoder.embed(x, keep)
        embed = self.encoder.patch_embed
        grid = embed.grid_size
        if self.encoder.dynamic_img_size:
            grid = embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        tokens, prefix = self.encoder._pos_embed(embed(x)), self.encoder.num_prefix_tokens
        return torch.cat([tokens[:, :prefix], take_tokens(tokens[:, prefix:], keep)], dim=1), grid

    def _encode(self, tokens: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
        """What `_embed` returns -> normalized features (B, prefix + K, D)."""
        encoder = self.encoder
        if self.has_trunk:
            return encoder.norm(encoder.encode(tokens, grid, keep)[0])
        x = encoder.norm_pre(tokens)
        x = checkpoint_seq(encoder.blocks, x) if encoder.grad_checkpointing else encoder.blocks(x)
        return encoder.norm(x)

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> what `forward` predicts of them, (B, L, p * p * C)."""
        return patchify(x, self.patch_size)

    def unpatchify(self, patches: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        """The inverse of `patchify`, for images of size (H, W)."""
        grid = -(-size[0] // self.patch_size[0]), -(-size[1] // self.patch_size[1])
        return unpatchify(patches, self.patch_size, grid)[:, :, : size[0], : size[1]]

    # timm's verbs

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> the encoder's normalized tokens, all visible."""
        return self.encoder.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of `forward_features` -> logits of the encoder's head, or the pooled features."""
        return self.encoder.forward_head(x, pre_logits=pre_logits)

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
        """The encoder's `forward_intermediates`, with every token visible."""
        return self.encoder.forward_intermediates(
            x,
            indices=indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
        )

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Drop the encoder's blocks after the last wanted one, and norm and head, the decoder too, if asked for."""
        if prune_head:
            self.decoder = nn.Identity()
        return self.encoder.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)

    def get_classifier(self) -> nn.Module:
        """The encoder's head."""
        return self.encoder.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the encoder's head."""
        self.encoder.reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Change the encoder's image size.

        Raises:
            ValueError: a size is no whole number, patches do not tile img_size, or patch_size differs, for which the
                decoder has no pixels.
        """
        if patch_size is not None and (patch := sides('patch_size', patch_size)) != self.patch_size:
            raise ValueError(f'the decoder predicts patches of {self.patch_size}, not of {patch}')
        self.encoder.set_input_size(None if img_size is None else sides('img_size', img_size))
        self.decoder.set_grid(self.encoder.patch_embed.grid_size)
        update_model_input_size(self, self.encoder.patch_embed.img_size)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter of encoder and decoder anew."""
        if self.has_trunk:
            self.encoder.init_weights(needs_reset=needs_reset)
        else:
            self.encoder.init_weights()
        self.decoder.init_weights()

    def no_weight_decay(self) -> Set[str]:
        """Parameters that weight decay must leave alone: the encoder's, and the decoder's tokens and positions."""
        names = {f'encoder.{name}' for name in self.encoder.no_weight_decay()}
        return names | {f'decoder.{name}' for name in self.decoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The encoder's layers by depth; the decoder belongs to the last."""
        layers = group_parameters(self.encoder, self.encoder.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix('encoder.'), last)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block of encoder and decoder in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def load_pretrained(self, checkpoint_path: str) -> None:
        """Load an autoencoder: a training checkpoint of ours, this model's own state dict, or an original MAE's.

        Raises:
            CheckpointError: the file cannot be read, has no decoder, or is another model's.
        """
        self.load_state_dict(checkpoint_filter_fn(read_checkpoint(checkpoint_path), self))


def as_autoencoder(encoder: nn.Module, **kwargs: Any) -> MaskedAutoencoder:
    """The masked autoencoder around an encoder: the encoder's own kind, where it has one."""
    make = getattr(encoder, 'as_autoencoder', None)
    return make(**kwargs) if make is not None else MaskedAutoencoder(encoder, **kwargs)


def autoencoder_weights(content: Dict[str, Any], use_ema: Optional[bool] = None) -> Dict[str, torch.Tensor]:
    """The state dict of a `MaskedAutoencoder` from what a checkpoint file holds.

    Args:
        content: A training checkpoint of ours (the encoder as `state_dict`, the decoder in `task_state`), a state dict
            of encoder and decoder, or one in the original MAE's layout.
        use_ema: Take the moving average of a training checkpoint; None: where timm does.

    Raises:
        CheckpointError: there is no decoder in it.
    """
    weights = select_weights(content, use_ema)
    state = content.get('task_state_ema' if wants_average(content, use_ema) else 'task_state')
    decoder = state.get('decoder') if isinstance(state, dict) else None
    if isinstance(decoder, dict):
        weights = {f'encoder.{name}': value for name, value in weights.items()}
        weights.update({f'decoder.{name}': value for name, value in check_weights(decoder).items()})
    elif 'decoder_embed.weight' in weights:
        weights = {_from_original(name): value for name, value in weights.items() if name != 'decoder_pos_embed'}
    if not any(name.startswith('decoder.') for name in weights):
        raise CheckpointError(
            f'it holds an encoder without its decoder, {describe_family(weights)}, which cannot reconstruct anything: '
            'take the checkpoint that train.py --mae wrote (last.pth.tar)'
        )
    return weights


def _from_original(name: str) -> str:
    """A parameter's name in the original MAE -> ours."""
    if name == 'mask_token' or name.startswith('decoder_'):
        return f'decoder.{name.removeprefix("decoder_")}'
    return f'encoder.{name}'


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: MaskedAutoencoder) -> Dict[str, torch.Tensor]:
    """`autoencoder_weights` as the model's state dict, resampled to its image size; strict by itself.

    Raises:
        CheckpointError: there is no decoder, or names or shapes are another model's.
    """
    weights, own = autoencoder_weights(state_dict), model.state_dict()
    encoder = {name.removeprefix('encoder.'): v for name, v in weights.items() if name.startswith('encoder.')}
    decoder = {name: value for name, value in weights.items() if not name.startswith('encoder.')}
    filter_fn = filter_of(model.encoder)
    if filter_fn is not None and isinstance(model.encoder, Trunk):
        encoder = filter_fn({'state_dict': encoder, 'args': settings_of(state_dict)}, model.encoder)
    elif filter_fn is not None:
        encoder = filter_fn(encoder, model.encoder)
    positions = decoder.get('decoder.pos_embed')  # a learned one
    if positions is not None:
        projection = weights['encoder.patch_embed.proj.weight']
        grid = source_grid(positions.shape[1], projection, settings_of(state_dict), model.encoder)
        decoder['decoder.pos_embed'] = resample_pos_embed(positions, list(model.decoder.grid), list(grid), 0)
    weights = {**{f'encoder.{name}': value for name, value in encoder.items()}, **decoder}
    check_fit(weights, own)
    return weights


register_family(
    'a masked autoencoder with its decoder (mae)',
    r'^encoder\.blocks\.',
    r'^encoder\.patch_embed\.',
    r'^decoder\.mask_token$',
    r'^decoder\.pred\.',
)


def _create_masked_autoencoder(variant: str, pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    return build_model(MaskedAutoencoder, variant, pretrained, checkpoint_filter_fn, kwargs)


_ENCODER = dict(num_classes=0, classifier=None, first_conv=None, paper_ids='arXiv:2111.06377')

default_cfgs = generate_default_cfgs(
    {
        'mae_vim_tiny_patch16_224.mae': cfg(**_ENCODER),
        'mae_vim_small_patch16_224.mae': cfg(**_ENCODER),
        'mae_vim_base_patch16_224.mae': cfg(**_ENCODER),
        'mae_vim_tiny_patch4_32.mae': small_cfg(**_ENCODER),
        'mae_vim2_tiny_patch16_224.mae': cfg(**_ENCODER),
        'mae_vim2_tiny_patch4_32.mae': small_cfg(**_ENCODER),
        'mae_vim_hybrid_small_patch16_224.mae': cfg(**_ENCODER),
    }
)


@register_model
def mae_vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder over Vim-Ti."""
    model_args = dict(encoder='vim_tiny_patch16_224')
    return _create_masked_autoencoder('mae_vim_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def mae_vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder over Vim-S."""
    model_args = dict(encoder='vim_small_patch16_224')
    return _create_masked_autoencoder('mae_vim_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def mae_vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder over Vim-B."""
    model_args = dict(encoder='vim_base_patch16_224')
    return _create_masked_autoencoder('mae_vim_base_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def mae_vim_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder over Vim-Ti for 32 x 32 images."""
    model_args = dict(encoder='vim_tiny_patch4_32')
    return _create_masked_autoencoder('mae_vim_tiny_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def mae_vim2_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder over Vision Mamba 2 (tiny)."""
    model_args = dict(encoder='vim2_tiny_patch16_224')
    return _create_masked_autoencoder('mae_vim2_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def mae_vim2_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder over Vision Mamba 2 (tiny) for 32 x 32 images."""
    model_args = dict(encoder='vim2_tiny_patch4_32')
    return _create_masked_autoencoder('mae_vim2_tiny_patch4_32', pretrained, **dict(model_args, **kwargs))


@register_model
def mae_vim_hybrid_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder over the hybrid of state space and attention branches (small)."""
    model_args = dict(encoder='vim_hybrid_small_patch16_224')
    return _create_masked_autoencoder('mae_vim_hybrid_small_patch16_224', pretrained, **dict(model_args, **kwargs))
