"""Reading checkpoint files of any origin without executing anything in them."""

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Union

import safetensors.torch
import torch
from timm.models import clean_state_dict

from ..errors import UserError

_WEIGHTS = ('model', 'state_dict')
_EMA_WEIGHTS = ('model_ema', 'state_dict_ema')


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read, or that is not for the model; the message is one sentence for a user."""


def read_checkpoint(path: Union[str, Path], mmap: bool = False) -> Dict[str, Any]:
    """The whole content of a .safetensors or torch file on the CPU.

    Only tensors, plain containers and argparse.Namespace (DeiT-style `args`) are unpickled.

    Args:
        mmap: leave tensors in the file until they are used, which has to stay as it is as long as they are.

    Raises:
        CheckpointError: missing, truncated, or in need of running code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'no checkpoint at {path}')
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns of foreign pickles, which end in a sentence below
            mmap = mmap and zipfile.is_zipfile(path)  # torch's older format cannot be mapped
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as e:
        if 'weights_only' in str(e) or 'Unsupported' in str(e):
            message = f'{path} is refused: it holds more than weights, a pickle that would run code'
            raise CheckpointError(message) from e
        raise CheckpointError(f'{path} is truncated or no checkpoint ({type(e).__name__})') from e
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a dictionary of weights')
    return content


def class_names_in(content: Dict[str, Any], path: Union[str, Path]) -> List[str]:
    """Class names by number in a training checkpoint of ours, or an empty list.

    Raises:
        CheckpointError: they are no names.
    """
    names = content.get('class_names')
    if names is None or isinstance(names, torch.Tensor):
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f'{path} is damaged: its class names are no list of names')
    return names


def has_average(content: Dict[str, Any]) -> bool:
    """Whether a training checkpoint holds a moving average of its weights."""
    return any(content.get(key) is not None for key in _EMA_WEIGHTS)


def wants_average(content: Dict[str, Any], use_ema: Optional[bool]) -> bool:
    """Whether to take the moving average of a training checkpoint; where nobody says (None), as timm does.

    timm takes that of its own checkpoints (`state_dict_ema`), and so do we, but not that of those with a `model` and a
    `model_ema`.
    """
    return content.get('state_dict_ema') is not None if use_ema is None else use_ema


def select_weights(content: Dict[str, Any], use_ema: Optional[bool] = False) -> Dict[str, torch.Tensor]:
    """The state dict of a training checkpoint: `model` / `state_dict`, or where `wants_average` its moving average.

    Raises:
        CheckpointError: `use_ema` of a checkpoint without one.
    """
    if wants_average(content, use_ema):
        for key in _EMA_WEIGHTS:
            if content.get(key) is not None:
                return clean_state_dict(content[key])
        raise CheckpointError('the checkpoint holds no moving average (model_ema or state_dict_ema)')
    for key in _WEIGHTS:
        if isinstance(content.get(key), dict):
            return clean_state_dict(content[key])
    return clean_state_dict(content)


def load_weights(path: Union[str, Path], use_ema: Optional[bool] = False) -> Dict[str, torch.Tensor]:
    """`select_weights` of `read_checkpoint`."""
    return select_weights(read_checkpoint(path), use_ema)


_FAMILIES = (
    (r'attn\.qkv\.weight$', 'a vision transformer (ViT, DeiT)'),
    (r'^blocks\.\d+\.mixer\.in_proj_x', 'MambaVision'),
    (r'^levels\.\d+\.', 'a hierarchical model such as MambaVision'),
    (r'(^|\.)x_proj_weight$', 'VMamba'),
    (r'^backbone\.(layers|embedding)', 'a Mamba language model'),
    (r'mixer\.dt_bias$', 'Mamba-2'),
    (r'^layers\.\d+\.blocks\.', 'a hierarchical model such as Swin or VMamba'),
    (r'^stages\.', 'a staged network such as ConvNeXt or MambaOut'),
    (r'^(conv1|bn1|layer1\.)', 'a ResNet'),
    (r'^decoder_', 'a masked autoencoder with its decoder'),
)


def describe_family(names: Set[str]) -> str:
    """What a state dict with these names is of, in words for an error message."""
    for pattern, family in _FAMILIES:
        if any(re.search(pattern, name) for name in names):
            return family
    if any(name.endswith('mixer.A_log') for name in names):
        if any('conv1d_b' in name for name in names):
            return 'a Vision Mamba with bidirectional scans (v2)'
        if any(name.endswith('A_b_log') for name in names):
            return 'a Vision Mamba with shared projections (v1)'
        return 'a unidirectional Mamba'
    return 'an unknown family'


def check_names(names: Set[str], own: Set[str]) -> None:
    """Refuse a checkpoint whose names, the head's apart, are not the model's `own`."""
    head = {'head.weight', 'head.bias'}
    foreign = sorted(names - own - head)
    missing = sorted(own - names - head)
    if foreign or missing:
        what = f'brings {foreign[0]}, for which it has no place' if foreign else f'lacks its {missing[0]}'
        raise CheckpointError(
            f'the checkpoint is of {describe_family(names)} and does not fit this model, {describe_family(own)}: '
            f'it {what}'
        )


def check_shape(name: str, value: torch.Tensor, own: torch.Tensor) -> None:
    """Heads and input channels are adapted by timm's factory; every other shape must agree."""
    if name.startswith('head.') or name == 'patch_embed.proj.weight' and value.shape[0] == own.shape[0]:
        return
    if value.shape != own.shape:
        raise CheckpointError(
            f'{name} is {tuple(value.shape)} in the checkpoint and {tuple(own.shape)} in the model: '
            f'it was saved from a model of another size'
        )
