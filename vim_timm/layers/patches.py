"""Images as rows of patches, and back."""

from typing import Tuple

import torch
import torch.nn.functional as F
from einops import rearrange

Pair = Tuple[int, int]


def pad_to_patches(images: torch.Tensor, patch: Pair, value: float = 0.0) -> torch.Tensor:
    """Images (B, C, H, W) with `value` to the right and below, until patches tile them."""
    height, width = images.shape[-2:]
    return F.pad(images, [0, -width % patch[1], 0, -height % patch[0]], value=value)


def patchify(images: torch.Tensor, patch: Pair) -> torch.Tensor:
    """(B, C, H, W) -> (B, L, p * q * C): patches in row-major order, the values of one ordered (row, column, channel).

    Images that patches do not tile are padded with zeros.
    """
    images = pad_to_patches(images, patch)
    return rearrange(images, 'b c (h p) (w q) -> b (h w) (p q c)', p=patch[0], q=patch[1])


def unpatchify(patches: torch.Tensor, patch: Pair, grid: Pair) -> torch.Tensor:
    """The inverse of `patchify` for a grid of (rows, columns) patches; padding stays."""
    return rearrange(patches, 'b (h w) (p q c) -> b c (h p) (w q)', h=grid[0], w=grid[1], p=patch[0], q=patch[1])


def normalize_patches(patches: torch.Tensor, eps: float = 1e-6) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each patch (..., P) without its own mean and standard deviation (of n - 1), the target of `norm_pix_loss`.

    Returns:
        Normalized patches, means (..., 1) and standard deviations (..., 1).
    """
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + eps).sqrt()
    return (patches - mean) / std, mean, std
