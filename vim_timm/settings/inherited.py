"""What a checkpoint may say: which model it holds and what images that takes; nothing about where data come from.

docs/security.md lists all of it. Whoever made the file may have written anything there, so every value is checked for
its type and range before anybody uses it, and none is a path, an address or a name of code.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ..errors import UserError, shown

_LARGEST_SIDE, _MOST_CHANNELS, _MOST_CLASSES, _LARGEST_ARGUMENT = 16384, 4096, 10_000_000, 1_000_000
_LARGEST_DECODER = 10_000
# arguments of timm's factories that are no model's: files, addresses, and switches of the caller's
_FACTORY = {
    'model_name', 'variant', 'model_cls', 'model_cfg', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay',
    'pretrained_strict', 'pretrained_filter_fn', 'pretrained_custom_load', 'pretrained_model_args', 'checkpoint_path',
    'cache_dir', 'scriptable', 'exportable', 'no_jit', 'features_only', 'feature_cfg', 'out_indices', 'kwargs_filter',
    'device', 'dtype',
}  # fmt: skip
_IMAGE_MODES = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F')

Rule = Callable[[Any], bool]


def _whole(high: int) -> Rule:
    return lambda value: type(value) is int and 1 <= value <= high


def _real(low: float, high: float) -> Rule:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _several(rule: Rule, *counts: int) -> Rule:
    """As many values as one of `counts`, or up to _MOST_CHANNELS."""
    return lambda value: (
        isinstance(value, (list, tuple))
        and (len(value) in counts if counts else 1 <= len(value) <= _MOST_CHANNELS)
        and all(map(rule, value))
    )


def _word(value: Any) -> bool:
    """A name that can be neither a path nor an address."""
    return isinstance(value, str) and re.fullmatch(r'[\w.+-]{0,200}', value) is not None


def _one_of(*choices: str) -> Rule:
    return lambda value: isinstance(value, str) and value in choices


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


def _size(value: Any) -> bool:
    side = _whole(_LARGEST_SIDE)
    return side(value) or _several(side, 2)(value)


def _argument(value: Any, depth: int = 0) -> bool:
    """A value of an argument of a model: a plain one, or a few of them."""
    if isinstance(value, (list, tuple)):
        return depth < 3 and len(value) <= 1000 and all(_argument(item, depth + 1) for item in value)
    if isinstance(value, dict):
        items = [item for pair in value.items() for item in pair]
        return depth < 3 and len(value) <= 1000 and all(_argument(item, depth + 1) for item in items)
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= _LARGEST_ARGUMENT
    return value is None or _word(value)


def _arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and key.isidentifier() and key not in _FACTORY and _argument(item)
        for key, item in value.items()
    )


# name of a setting of train.py -> what it may be
INHERITED: dict[str, Rule] = {
    'model': lambda value: _word(value) and value != '',
    'model_kwargs': _arguments,
    'num_classes': _whole(_MOST_CLASSES),
    'gp': _word,
    'img_size': _size,
    'in_chans': _whole(_MOST_CHANNELS),
    'input_size': lambda value: _several(_whole(_LARGEST_SIDE), 3)(value) and value[0] <= _MOST_CHANNELS,
    'crop_pct': _real(0.01, 1),
    'mean': _several(_real(-1000, 1000)),
    'std': _several(_real(1e-6, 1000)),
    'interpolation': _word,
    'crop_mode': _one_of('center', 'squash', 'border'),
    'amp': _switch,
    'amp_dtype': _one_of('float16', 'bfloat16'),
    'model_dtype': _one_of('float32', 'float16', 'bfloat16'),
    'channels_last': _switch,
    'fast_norm': _switch,
    # of a masked autoencoder
    'mae': _switch,
    'mask_ratio': _real(0, 1),
    'norm_pix_loss': _switch,
    'mae_loss': _word,
    'channel_drop': _real(0, 1),
    'decoder': _word,
    'decoder_dim': _whole(_LARGEST_DECODER),
    'decoder_depth': _whole(_LARGEST_DECODER // 100),
    'decoder_heads': _whole(_LARGEST_DECODER),
    'decoder_pos_embed': _word,
    # of the values that images are read as, before their mean and deviation
    'input_img_mode': _one_of(*_IMAGE_MODES),
    'input_span': _several(_real(-1e9, 1e9), 2),
}


# of those, what a checkpoint of ours has in `data_config` too
_RESOLVED = ('input_size', 'crop_pct', 'crop_mode', 'mean', 'std', 'interpolation')


def _is_local(path: Any) -> bool:
    if not isinstance(path, str) or path.startswith(('//', '\\\\')) or ':' in os.path.splitdrive(path)[1]:
        return False
    return os.path.exists(path)


# name of a setting of train.py -> its name in validate.py, and what it may be
LOCAL_DATA: dict[str, tuple[str, Rule]] = {
    'data_dir': ('data_dir', _is_local),
    'dataset': (
        'dataset',
        lambda value: isinstance(value, str) and re.fullmatch(r'digits|arrays|torch/\w{1,40}', value) is not None,
    ),
    'class_map': ('class_map', _is_local),
    'val_split': ('split', _word),
    'val_fraction': ('val_fraction', _real(0, 1)),
    **{name: (name, INHERITED[name]) for name in ('input_img_mode', 'input_span')},
}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def settings_of(content: Mapping[str, Any], what: str = 'the checkpoint') -> dict[str, Any]:
    """What a checkpoint's content says of its model and the images it takes, checked; {} where it says nothing.

    Args:
        content: of a training checkpoint of ours or timm's, of one of the original's, whose arguments have other names,
            or of anything else.
        what: the checkpoint, in words.

    Raises:
        UserError: a value is none that its setting could have.
    """
    args = content.get('args')
    args = args if isinstance(args, dict) else getattr(args, '__dict__', {})
    if isinstance(content.get('registered'), dict):  # of a model that the run named by an address
        args = {**args, **content['registered']}
    if 'model' in content:  # DeiT-style: of its arguments only these mean the same
        args = {ours: args.get(theirs) for ours, theirs in (('model', 'model'), ('img_size', 'input_size'))}
    found = {name: _plain(args[name]) for name in INHERITED if args.get(name) is not None}
    images = content.get('data_config')  # what the run made of its settings and the model's
    if isinstance(images, dict):
        found.update((name, _plain(images[name])) for name in _RESOLVED if images.get(name) is not None)
    for name, value in found.items():
        if not INHERITED[name](value):
            raise UserError(f'{what}: its setting {name} cannot be {shown(repr(value))}')
    return found


def without_size(settings: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """Settings without the size of the images where another is chosen; by --img-size its channels stay."""
    if 'input_size' in chosen:
        return {name: settings[name] for name in settings if name not in ('img_size', 'input_size', 'in_chans')}
    if 'img_size' not in chosen:
        return dict(settings)
    channels = {'in_chans': settings['input_size'][0]} if 'input_size' in settings else {}
    return {**{name: settings[name] for name in settings if name not in ('img_size', 'input_size')}, **channels}


def data_of(content: Mapping[str, Any], what: str = 'the checkpoint', chosen: Collection[str] = ()) -> dict[str, Any]:
    """The local data that a training checkpoint was evaluated on, by settings of validate.py; {} where it names none.

    Only what lies on this machine as plain images, and what torchvision reads from a folder here: a file must not
    choose a stream, an address, or code to run.

    Args:
        chosen: settings of validate.py that need not be taken, as the user gives them.

    Raises:
        UserError: it names something else, or what is not here, or its files were chosen by a key.
    """
    args = content.get('args')
    if not isinstance(args, dict) or not any(args.get(name) for name in ('data_dir', 'dataset')):
        return {}
    found = {ours: args[name] for name, (ours, _) in LOCAL_DATA.items() if args.get(name) not in (None, '')}
    found = {name: value for name, value in found.items() if name not in chosen}
    for name, (ours, rule) in LOCAL_DATA.items():
        if ours in found and not rule(found[ours]):
            raise UserError(
                f'{what}: its setting {name} is {shown(repr(found[ours]))}, which is not here or nothing that a file '
                'may choose: give --data-dir or --dataset'
            )
    key = args.get('input_key')
    if key and 'input_key' not in chosen and args.get('dataset') != 'digits':
        raise UserError(
            f'{what}: its run chose its files by --input-key {shown(repr(key))}, and a key is never taken from a file: '
            'give --input-key'
        )
    if found.get('val_fraction'):  # images of the training split were held out, by its seed
        seed, split = args.get('seed'), args.get('train_split')
        if not (type(seed) is int and 0 <= seed < 2**32 and _word(split)):
            raise UserError(f'{what}: its settings seed and train_split do not say which images were held out')
        found.update(seed=seed, split=split)
    return found
