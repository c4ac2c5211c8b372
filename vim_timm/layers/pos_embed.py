"""Learned position embeddings at another grid."""

from typing import List

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

from vim_timm.layers.norm import at_least_float32


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
