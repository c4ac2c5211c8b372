"""Checkpoints of other layouts and sizes become a model's state dict, or are refused in a sentence."""

import itertools
import math
import sys
from typing import AbstractSet, Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import resample_patch_embed, to_2tuple
from timm.models import get_pretrained_cfg, is_model

from ..errors import shown
from ..layers.conv_stem import ConvStem
from ..layers.pos_embed import resample_pos_embed
from ..settings.inherited import settings_of
from .checkpoint import CheckpointError, StateDict
from .families import describe_family

Grid = Tuple[int, int]
_PROJECTION = 'patch_embed.proj.weight'
_STEM = 'patch_embed.convs.conv0.weight'  # what sees the image, where a stem has several convolutions


def filter_of(model: nn.Module) -> Optional[Callable[[Dict[str, Any], nn.Module], StateDict]]:
    """The `checkpoint_filter_fn` of a model's family, which timm wants in the module of the model's class."""
    return getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)


def check_names(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    what: str = 'the checkpoint',
    adaptable: AbstractSet[str] = frozenset(),
) -> None:
    """Refuse weights whose names are not a model's, see `check_fit`."""
    foreign, missing = sorted(state.keys() - own.keys() - adaptable), sorted(own.keys() - state.keys() - adaptable)
    if foreign or missing:
        found = f'brings {shown(foreign[0])}, for which it has no place' if foreign else f'lacks its {missing[0]}'
        raise CheckpointError(
            f'{what} is of {describe_family(state)} and does not fit this model, {describe_family(own)}: it {found}'
        )


def check_fit(
    state: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    what: str = 'the checkpoint',
    adaptable: AbstractSet[str] = frozenset(),
) -> None:
    """Refuse weights that are not a model's: other names, other shapes, or other kinds of numbers.

    Args:
        state: Weights by name.
        own: The model's state dict.
        what: The checkpoint, in words.
        adaptable: Names that may be missing, beside the model's own, or of another shape.

    Raises:
        CheckpointError: the first of these that is found.
    """
    check_names(state, own, what, adaptable)
    for name, value in state.items():
        if name not in own:  # where the model has no head, timm drops the checkpoint's
            continue
        if value.shape != own[name].shape and name not in adaptable:
            raise CheckpointError(
                f'{name} is {tuple(value.shape)} in {what} and {tuple(own[name].shape)} in the model: it was saved '
                'from a model of another size (--num-classes, --img-size, --in-chans, --model-kwargs)'
            )
        if own[name].is_floating_point() and not value.is_floating_point():
            raise CheckpointError(f'{name} in {what} holds {value.dtype}, which is no floating point type')


def adapt(
    state_dict: Dict[str, Any],
    model: Any,
    rename: Optional[Callable[[StateDict, Any], StateDict]] = None,
) -> StateDict:
    """Weights of a checkpoint -> the state dict of a `Trunk`; strict by itself.

    Takes a training checkpoint's `model` or `state_dict`, resamples patch projection and position embedding to the
    model's sizes, and lets a headless encoder pass, and another number of channels or classes, which timm adapts.

    Args:
        state_dict: A state dict, or the content of a checkpoint file, whose settings tell its image size.
        rename: From the family's older layouts to the model's.

    Raises:
        CheckpointError: names or shapes are another family's or another size's.
    """
    state, settings = state_dict, settings_of(state_dict)
    for key in ('model', 'state_dict'):
        if isinstance(state.get(key), dict):
            state = state[key]
    if rename is not None:
        state = rename(state, model)
    own, out = model.state_dict(), dict(state)
    head = {name for name in (*state, *own) if name.startswith('head.')}
    check_names(state, own, adaptable=head)
    projection, positions = out[_PROJECTION], out.get('pos_embed')
    if projection.ndim == 4 and projection.shape[-2:] != own[_PROJECTION].shape[-2:]:
        out[_PROJECTION] = resample_patch_embed(projection, list(own[_PROJECTION].shape[-2:]))
    if positions is not None and positions.ndim == 3 and positions.shape[2] == own['pos_embed'].shape[2]:
        out['pos_embed'] = _at_grid(positions, projection, settings, model)
    first = _STEM if _STEM in own else _PROJECTION
    stem = {first} if out[first].shape[:1] == own[first].shape[:1] and out[first].ndim == 4 else set()
    check_fit(out, own, adaptable=head | stem)
    return out


def _at_grid(
    positions: torch.Tensor, projection: torch.Tensor, settings: Mapping[str, Any], model: Any
) -> torch.Tensor:
    """A checkpoint's position embedding at the model's grid."""
    grid: List[int] = list(model.patch_embed.grid_size)
    source = source_grid(positions.shape[1] - model.num_prefix_tokens, projection, settings, model)
    return resample_pos_embed(positions, grid, list(source), model.num_prefix_tokens)


def image_size(settings: Mapping[str, Any]) -> Optional[Tuple[int, int]]:
    """Height and width of the images that a checkpoint's settings name, themselves or by its model's; None without."""
    size = settings.get('img_size') or settings.get('model_kwargs', {}).get('img_size')
    if settings.get('input_size'):
        size = settings['input_size'][1:]
    elif size is None and is_model(settings.get('model', '')):
        cfg = get_pretrained_cfg(settings['model'])
        size = None if cfg is None else cfg.input_size[1:]
    return None if size is None else to_2tuple(size)


def _steps(size: int, patch: int, stride: int, padded: bool) -> int:
    """Patches along a side."""
    return (size - patch + (stride - 1 if padded else 0)) // stride + 1


def _strides(patch: Grid, settings: Mapping[str, Any], stem: Any) -> Iterator[Grid]:
    """Steps between a checkpoint's patches: what its settings name, or the likely ones, best first."""
    named = settings.get('model_kwargs', {}).get('stride')
    if named:
        yield to_2tuple(named)
        return
    stride = getattr(stem, 'stride', stem.patch_size)  # timm's stems have none
    yield stride if stride != stem.patch_size else patch
    # an entrypoint's own may be another; no two of them give the same number of patches in different grids
    yield from ((step, step) for step in range(max(patch), 0, -1))


def source_grid(patches: int, projection: torch.Tensor, settings: Mapping[str, Any], model: Any) -> Grid:
    """Grid of a checkpoint's patches, by the first that fits their number.

    That of the image size in its settings; the model's own, since nothing speaks against it; a square.

    Raises:
        CheckpointError: none fits.
    """
    stem, size = model.patch_embed, image_size(settings)
    # the kernel of a stem that halves is none of its patches, whose size its number of convolutions tells
    patch: Grid = stem.patch_size if isinstance(stem, ConvStem) else (projection.shape[-2], projection.shape[-1])
    if size is not None:
        for stride, padded in itertools.product(_strides(patch, settings, stem), (False, True)):
            height, width = (_steps(*side, padded) for side in zip(size, patch, stride))
            if height * width == patches:
                return height, width
    own, side = model.patch_embed.grid_size, math.isqrt(max(patches, 0))
    if math.prod(own) == patches:
        return own
    if side * side != patches:
        raise CheckpointError(
            f'the position embedding of {patches} patches is not square and its grid is not recorded: '
            f'create the model at the image size it was trained with'
        )
    return side, side
