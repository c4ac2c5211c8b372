"""Position embeddings: learned ones at another grid, and those of sines and cosines."""

from typing import List, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from vim_timm.layers.norm import at_least_float32

CPU = torch.device('cpu')


@register_notrace_function
def resample_pos_embed(
    pos_embed: torch.Tensor,
    new_size: List[int],
    old_size: List[int],
    num_prefix_tokens: int,
) -> torch.Tensor:
    """(1, prefix + old grid, D) -> (1, prefix + new grid, D), bicubic, prefix rows as they are.

    Without antialiasing, as the original's fine-tuning does it (timm's `resample_abs_pos_embed` has it on and differs
    even when enlarging), in float32 at least.
    """
    if old_size[0] == new_size[0] and old_size[1] == new_size[1]:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = at_least_float32(grid).transpose(1, 2).reshape(1, pos_embed.shape[2], old_size[0], old_size[1])
    grid = F.interpolate(grid, size=[new_size[0], new_size[1]], mode='bicubic', align_corners=False)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def sincos_positions(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Positions (L,) -> (L, dim) in their dtype: sines, then cosines, of falling frequencies.

    Source: Attention Is All You Need, arXiv 1706.03762, section 3.5, with its two halves apart.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 2, device=positions.device, dtype=positions.dtype) / (dim / 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_pos_embed(
    dim: int, grid: Tuple[int, int], num_prefix_tokens: int = 0, device: torch.device = CPU
) -> torch.Tensor:
    """Fixed positions of a (rows, columns) grid, (prefix + rows * columns, dim) in float64 (float32 on MPS).

    The first half of the channels tells the column, the second the row; prefix tokens have zeros (arXiv 2111.06377).

    Raises:
        ValueError: dim is not divisible by 4.
    """
    if dim % 4 != 0:
        raise ValueError(f'sin-cos positions need a width divisible by 4, not {dim}')
    dtype = torch.float32 if device.type == 'mps' else torch.float64
    rows = sincos_positions(torch.arange(grid[0], device=device, dtype=dtype), dim // 2)
    columns = sincos_positions(torch.arange(grid[1], device=device, dtype=dtype), dim // 2)
    table = torch.cat([columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], dim=0)], dim=1)
    return torch.cat([torch.zeros([num_prefix_tokens, dim], dtype=dtype, device=device), table])
