"""Image to tokens: a convolution whose stride may be smaller than its patch."""

import math
from numbers import Integral
from typing import Any, Final, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function, resample_patch_embed, to_2tuple

from vim_timm.layers.autocast import as_product_operand, product_dtype
from vim_timm.layers.draw import zero_bias
from vim_timm.layers.masking import take_tokens
from vim_timm.layers.plain import is_plain
from vim_timm.ops import Pixels, visible_pixels

Size = Union[int, Tuple[int, int]]

# they decide by a tensor or its size, which a tracer has not
for _name in ('padding', 'check_matches', 'check_tiled', 'embed_patches'):
    torch.fx.wrap(_name)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, Integral) and int(value) > 0


def sides(name: str, size: Size) -> Tuple[int, int]:
    """A size, or a pair of them, as (height, width); ValueError with its name where one is no whole number."""
    pair = to_2tuple(size)
    if len(pair) != 2 or not all(is_count(side) for side in pair):
        raise ValueError(f'{name} must be a whole number of at least 1, not {size!r}')
    return int(pair[0]), int(pair[1])


@register_notrace_function
def padding(size: int, patch: int, stride: int) -> int:
    """Pixels that a side lacks until patches tile it."""
    return max(patch - size, 0) if size <= patch else (stride - (size - patch) % stride) % stride


@register_notrace_function
def check_matches(height: int, width: int, img_size: Tuple[int, int]) -> None:
    """Raise ValueError for an input of another size than the model's."""
    if height != img_size[0] or width != img_size[1]:
        raise ValueError(
            f'input of {height} x {width} does not match the model of {img_size[0]} x {img_size[1]}: '
            f'set img_size, or create the model with dynamic_img_size=True'
        )


@register_notrace_function
def check_channels(x: torch.Tensor, in_chans: int) -> None:
    """Raise ValueError for an input that is no batch of images of `in_chans` channels."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f'input of shape {list(x.shape)} is no batch of images of {in_chans} channels')


@register_notrace_function
def check_tiled(size: int, patch: int, stride: int) -> None:
    """Raise ValueError, with the two nearest sizes, for a side that patches do not tile."""
    if size < patch or (size - patch) % stride * (size % patch) != 0:
        below = max(patch, (size - patch) // stride * stride + patch)
        raise ValueError(
            f'image size {size} cannot be tiled by patches of {patch} with stride {stride}: use {below} or '
            f'{below + stride}, or dynamic_img_pad=True to pad'
        )


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """Feature maps (B, D, H, W) as tokens (B, H W, D) that lie so in memory.

    Sums have the layout of their first term: a residual stream that began as a view would be copied by every norm.
    """
    return x.flatten(2).transpose(1, 2).contiguous()


@register_notrace_function
def embed_patches(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], keep: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Disjoint patches (B, C, H, W) -> (B, M, D) by weight (D, C, P, Q), or those at `keep` (B, K) alone.

    A convolution, but of some patches, and on a GPU, a matrix product: cuDNN's convolution of this shape takes ten
    times as long.
    """
    if x.device.type != 'cuda' and keep is None:
        return as_tokens(F.conv2d(x, weight, bias, stride=weight.shape[2:]))
    patch, chans = weight.shape[2:], x.shape[1]
    if not torch.jit.is_scripting():
        if keep is not None and not (x.requires_grad and torch.is_grad_enabled()):
            pixels = visible_pixels(Pixels(x, keep, patch[0], patch[1], product_dtype(x)))
            if pixels is not None:
                return F.linear(pixels, weight.flatten(1), bias)
    rows, columns = x.shape[2] // patch[0], x.shape[3] // patch[1]
    x = x[:, :, : rows * patch[0], : columns * patch[1]]
    x = x.reshape(-1, chans, rows, patch[0], columns, patch[1]).permute(0, 2, 4, 1, 3, 5)
    count = rows * columns
    if keep is not None:
        images = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        x, count = x[images, keep // columns, keep % columns], keep.shape[1]
    x = as_product_operand(x)  # one copy that permutes and casts
    return F.linear(x.reshape(-1, count, chans * patch[0] * patch[1]), weight.flatten(1), bias)


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, M, D) with M tokens in row-major order; timm's `PatchEmbed` with a stride.

    The grid is ((H - patch) // stride + 1, (W - patch) // stride + 1). An image fits when its sides are multiples of
    the patch, or when steps of the stride end exactly at its border.
    """

    dynamic_img_pad: Final[bool]
    strict_img_size: Final[bool]

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        stride: Optional[Size] = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            stride: Step between patches, None for the patch size.
            strict_img_size: Refuse inputs of another size than img_size.
            dynamic_img_pad: Pad the bottom and right of inputs that the patches do not tile, with zeros.

        Raises:
            ValueError: a size is no whole number, or img_size cannot be tiled and there is no padding.
        """
        super().__init__()
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.patch_size = sides('patch_size', patch_size)
        self.stride = self.patch_size if stride is None else sides('stride', stride)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self._set_img_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Draw the projection as timm 0.4.12's `lecun_normal_`, with a zero bias.

        A normal of variance 1 / fan_in, widened for a truncation that never bites.
        """
        fan_in = self.proj.weight[0].numel()
        nn.init.trunc_normal_(self.proj.weight, std=math.sqrt(1.0 / fan_in) / 0.87962566103423978)
        zero_bias(self.proj)

    def _check_sizes(self, size: Tuple[int, int], patch: Tuple[int, int], stride: Tuple[int, int]) -> None:
        if not self.dynamic_img_pad:
            for side in zip(size, patch, stride):
                check_tiled(*side)

    def _set_img_size(self, img_size: Size) -> None:
        self.img_size = sides('img_size', img_size)
        self._check_sizes(self.img_size, self.patch_size, self.stride)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Change the image size, the patch size (the projection is resampled), or both.

        A stride equal to the patch follows it; another stride stays.

        Raises:
            ValueError: a size is no whole number, or the patches do not tile img_size.
        """
        size = self.img_size if img_size is None else sides('img_size', img_size)
        patch = self.patch_size if patch_size is None else sides('patch_size', patch_size)
        self._check_sizes(size, patch, patch if self.stride == self.patch_size else self.stride)
        if patch != self.patch_size:
            self._resample_patches(patch)
        self._set_img_size(size)

    def _resample_patches(self, patch_size: Tuple[int, int]) -> None:
        if self.stride == self.patch_size:
            self.stride = patch_size
        self.patch_size = patch_size
        old = self.proj
        self.proj = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            patch_size,
            self.stride,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        self.proj.weight = nn.Parameter(
            resample_patch_embed(old.weight.detach(), list(patch_size)), requires_grad=old.weight.requires_grad
        )
        self.proj.bias = old.bias
        self.proj.train(old.training)

    def feat_ratio(self) -> int:
        """Pixels between neighbouring tokens."""
        return max(self.stride)

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Grid of an image of this size, padding included."""
        height, width = img_size
        if self.dynamic_img_pad:
            height = height + padding(height, self.patch_size[0], self.stride[0])
            width = width + padding(width, self.patch_size[1], self.stride[1])
        return (
            (height - self.patch_size[0]) // self.stride[0] + 1,
            (width - self.patch_size[1]) // self.stride[1] + 1,
        )

    @torch.jit.ignore
    def _is_patchwise(self) -> bool:
        """Whether `proj` is one product for each patch."""
        proj = self.proj
        plain = is_plain(proj) and tuple(proj.stride) == proj.kernel_size == self.patch_size
        return plain and proj.padding == (0, 0) and proj.dilation == (1, 1) and proj.groups == 1

    def forward(self, x: torch.Tensor, keep: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Tokens of all patches, or of those at the row-major places `keep` (B, K) alone, (B, K, D)."""
        height, width = x.shape[2], x.shape[3]
        if self.strict_img_size:
            check_matches(height, width, self.img_size)
        elif not self.dynamic_img_pad:
            check_tiled(height, self.patch_size[0], self.stride[0])
            check_tiled(width, self.patch_size[1], self.stride[1])
        if self.dynamic_img_pad:
            x = F.pad(
                x,
                [
                    0,
                    padding(width, self.patch_size[1], self.stride[1]),
                    0,
                    padding(height, self.patch_size[0], self.stride[0]),
                ],
            )
        if not torch.jit.is_scripting():
            if self._is_patchwise():
                return embed_patches(x, self.proj.weight, self.proj.bias, keep)
        tokens = as_tokens(self.proj(x))
        return tokens if keep is None else take_tokens(tokens, keep)
