"""Checkpoints of other layouts and sizes become a model's state dict, or are refused in a sentence."""

import math
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import resample_patch_embed
from timm.models._input import get_pretrained_grid_size

from vim_timm.layers.pos_embed import resample_pos_embed
from vim_timm.models.checkpoint import CheckpointError, check_names, check_shape

StateDict = Dict[str, torch.Tensor]


def filter_of(model: nn.Module) -> Optional[Callable[[Dict[str, Any], nn.Module], StateDict]]:
    """The `checkpoint_filter_fn` of a model's family, which timm wants in the module of the model's class."""
    return getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)


def _source_grid(model: Any, patch_weight: Optional[torch.Tensor], num_patches: int) -> Tuple[int, int]:
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


def adapt(
    state_dict: Dict[str, Any],
    model: Any,
    rename: Optional[Callable[[StateDict, Any], StateDict]] = None,
) -> StateDict:
    """Weights of a checkpoint -> the state dict of a `Trunk`; strict by itself.

    Takes a DeiT-style training checkpoint's `model`, resamples patch projection and position embedding to the model's
    sizes, and lets a headless encoder pass.

    Args:
        rename: From the family's older layouts to the model's.

    Raises:
        CheckpointError: names or shapes are another family's or another size's.
    """
    for key in ('model', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if rename is not None:
        state_dict = rename(state_dict, model)
    own = model.state_dict()
    check_names(set(state_dict), set(own))
    out = {}
    for name, value in state_dict.items():
        if name == 'patch_embed.proj.weight' and value.shape[-2:] != own[name].shape[-2:]:
            value = resample_patch_embed(value, list(own[name].shape[-2:]))
        elif name == 'pos_embed' and value.ndim == 3 and value.shape[2] == own[name].shape[2]:
            value = _at_grid(value, own[name], state_dict.get('patch_embed.proj.weight'), model)
        if name in own:  # where the model has no head, timm drops the checkpoint's
            check_shape(name, value, own[name])
        out[name] = value
    return out


def _at_grid(value: torch.Tensor, own: torch.Tensor, patch_weight: Optional[torch.Tensor], model: Any) -> torch.Tensor:
    """A checkpoint's position embedding at the model's grid."""
    num_patches = value.shape[1] - model.num_prefix_tokens
    grid: List[int] = list(model.patch_embed.grid_size)
    square = math.isqrt(max(num_patches, 0)) ** 2 == num_patches
    if value.shape == own.shape and not (square and grid[0] != grid[1]):
        return value
    return resample_pos_embed(
        value,
        new_size=grid,
        old_size=list(_source_grid(model, patch_weight, num_patches)),
        num_prefix_tokens=model.num_prefix_tokens,
    )
