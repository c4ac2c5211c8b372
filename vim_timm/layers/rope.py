"""Two-dimensional rotary position embedding of whole tokens, as in Vision Mamba's first release."""

from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function


class StreamRope(NamedTuple):
    """How the residual stream is rotated before every block.

    Attributes:
        residual: Rotate the whole stream; False rotates only the latest block's contribution.
        pretrained_grid: Grid side to which positions are scaled.
    """

    residual: bool = True
    pretrained_grid: int = 14


@register_notrace_function
def rope_tables(
    grid_size: Tuple[int, int],
    dim: int,
    pretrained_grid: int,
    num_before: int,
    num_tokens: int,
    device: torch.device,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (num_tokens, dim), float32.

    The first half of the channels turns with a patch's row, the second with its column, in neighbouring pairs, by
    angles t / grid * pretrained_grid * 10000^(-2k / (dim / 2)). `num_before` tokens before the first patch and all
    after the last are not rotated.
    """
    height, width = grid_size
    half = dim // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2, device=device).float() / half)
    rows = torch.arange(height, device=device).float() / height * pretrained_grid
    columns = torch.arange(width, device=device).float() / width * pretrained_grid
    row_angles = torch.outer(rows, frequencies).repeat_interleave(2, dim=1)
    column_angles = torch.outer(columns, frequencies).repeat_interleave(2, dim=1)
    patches = torch.cat(
        [
            row_angles.unsqueeze(1).expand(height, width, half),
            column_angles.unsqueeze(0).expand(height, width, half),
        ],
        dim=-1,
    ).flatten(0, 1)
    angles = F.pad(patches, [0, 0, num_before, num_tokens - num_before - height * width])
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channel pairs (a, b) of x (B, L, D) into (a cos - b sin, b cos + a sin)."""
    pairs = x.unflatten(-1, [-1, 2])
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
