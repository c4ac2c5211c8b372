"""Image to tokens: a convolution whose stride may be smaller than its patch."""
from typing import Final, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_patch_embed, to_2tuple
from torch import _assert

Size = Union[int, Tuple[int, int]]


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, M, D) with M tokens in row-major order; timm's `PatchEmbed` with a stride.

    The grid is ((H - patch) // stride + 1, (W - patch) // stride + 1).
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
            ValueError: img_size cannot be tiled and there is no padding.
        """
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.stride = self.patch_size if stride is None else to_2tuple(stride)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self._set_img_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)

    def _set_img_size(self, img_size: Size) -> None:
        self.img_size = to_2tuple(img_size)
        if not self.dynamic_img_pad:
            for size, patch, stride in zip(self.img_size, self.patch_size, self.stride):
                if size < patch or (size - patch) % stride:
                    raise ValueError(_untiled(size, patch, stride))
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Change the image size, the patch size (the projection is resampled), or both.

        A stride equal to the patch follows it; another stride stays.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            patch_size = to_2tuple(patch_size)
            if self.stride == self.patch_size:
                self.stride = patch_size
            self.patch_size = patch_size
            old = self.proj
            self.proj = nn.Conv2d(
                old.in_channels, old.out_channels, patch_size, self.stride,
                device=old.weight.device, dtype=old.weight.dtype)
            with torch.no_grad():
                self.proj.weight.copy_(resample_patch_embed(old.weight, list(patch_size)))
                self.proj.bias.copy_(old.bias)
            self.proj.weight.requires_grad_(old.weight.requires_grad)
            self.proj.bias.requires_grad_(old.bias.requires_grad)
            self.proj.train(old.training)
        self._set_img_size(self.img_size if img_size is None else img_size)

    def feat_ratio(self) -> int:
        """Pixels between neighbouring tokens."""
        return max(self.stride)

    def _padding(self, size: int, axis: int) -> int:
        patch, stride = self.patch_size[axis], self.stride[axis]
        return max(patch - size, 0) if size <= patch else (stride - (size - patch) % stride) % stride

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Grid of an image of this size, padding included."""
        height, width = img_size
        if self.dynamic_img_pad:
            height = height + self._padding(height, 0)
            width = width + self._padding(width, 1)
        return (
            (height - self.patch_size[0]) // self.stride[0] + 1,
            (width - self.patch_size[1]) // self.stride[1] + 1,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2], x.shape[3]
        if self.strict_img_size:
            _assert(
                height == self.img_size[0],
                f'input height ({height}) does not match the model ({self.img_size[0]}): set img_size or use '
                f'dynamic_img_size=True')
            _assert(
                width == self.img_size[1],
                f'input width ({width}) does not match the model ({self.img_size[1]}): set img_size or use '
                f'dynamic_img_size=True')
        elif not self.dynamic_img_pad:
            _assert((height - self.patch_size[0]) % self.stride[0] == 0, self._untiled_axis(height, 0))
            _assert((width - self.patch_size[1]) % self.stride[1] == 0, self._untiled_axis(width, 1))
        if self.dynamic_img_pad:
            x = F.pad(x, [0, self._padding(width, 1), 0, self._padding(height, 0)])
        return self.proj(x).flatten(2).transpose(1, 2)

    def _untiled_axis(self, size: int, axis: int) -> str:
        if torch.jit.is_scripting():
            return 'image size does not fit the patches'
        else:
            return _untiled(size, self.patch_size[axis], self.stride[axis])


def _untiled(size: int, patch: int, stride: int) -> str:
    """One sentence with the two nearest sizes that fit."""
    below = (size - patch) // stride * stride + patch
    sizes = f'{below} or {below + stride}' if size > patch else f'{patch} or {patch + stride}'
    return (
        f'image size {size} cannot be tiled by patches of {patch} with stride {stride}: use {sizes}, '
        f'or dynamic_img_pad=True to pad')
