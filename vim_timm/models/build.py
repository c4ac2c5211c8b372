"""Configurations and models as timm's registry wants them."""

import inspect
import math
from numbers import Integral, Real
from typing import Any, Callable, Dict, Type, TypeVar

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models._features import FeatureGetterNet

from vim_timm.layers.patch_embed import is_count, sides
from vim_timm.models.pretrained import on_disk
from vim_timm.models.trunk import Trunk

Model = TypeVar('Model', bound=nn.Module)

# arguments that count something; those of images may be a pair
_OF_MIXERS = ('num_heads', 'd_state', 'd_conv', 'headdim')
_OF_DECODERS = ('decoder_dim', 'decoder_depth', 'decoder_heads')
_COUNTS = ('in_chans', 'embed_dim', 'depth', *_OF_MIXERS, 'head_hidden', 'rope_pretrained_grid', *_OF_DECODERS)
_SIDES = ('img_size', 'patch_size', 'stride')


def cfg(**kwargs: Any) -> Dict[str, Any]:
    """A pretrained configuration of a trunk for ImageNet, with changes."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'fixed_input_size': True,
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'custom_load': True,
        **kwargs,
    }


def small_cfg(**kwargs: Any) -> Dict[str, Any]:
    """A configuration for ten classes of 32 x 32 images, with changes."""
    return cfg(**{'num_classes': 10, 'input_size': (3, 32, 32), 'crop_pct': 1.0, **kwargs})


def build_model(
    cls: Type[Model], variant: str, pretrained: bool, filter_fn: Callable[..., Any], kwargs: Dict[str, Any]
) -> Model:
    """timm's factory for a family's entrypoint.

    Args:
        cls: The family's class.
        variant: Name of the registered model.
        filter_fn: The family's `checkpoint_filter_fn`.
        kwargs: Arguments of the variant, overridden by the caller's.

    Raises:
        ValueError: an argument that is no such size, rate, number or switch, or a feature extractor that would return
            tokens in another order than timm's.
    """
    _check_numbers(kwargs)
    _check_switches(cls, kwargs)
    if pretrained:
        kwargs = on_disk(variant, kwargs)
    extractor = kwargs.get('feature_cls', 'getter')
    getter = (extractor.lower() if isinstance(extractor, str) else extractor) in ('getter', FeatureGetterNet)

    def build(**arguments: Any) -> Model:
        model = cls(**arguments)
        if not getter and isinstance(model, Trunk):
            _check_order(model, extractor)
        return model

    feature_cfg = dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter')
    return build_model_with_cfg(
        build, variant, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs
    )


def _check_numbers(arguments: Dict[str, Any]) -> None:
    """Refuse numbers of which torch would make a model that computes nothing or NaN, or a traceback."""
    for name, value in arguments.items():
        number = float(value) if isinstance(value, Real) else math.nan
        wanted = ''
        if value is not None and name in _SIDES:
            sides(name, value)
        if value is not None and name in _COUNTS and not is_count(value):
            wanted = 'a whole number of at least 1'
        elif name == 'dt_rank' and value != 'auto' and not is_count(value):
            wanted = "'auto' or a whole number of at least 1"
        elif name == 'num_classes' and value is not None and not isinstance(value, Integral):
            wanted = 'a whole number'  # timm takes those below 1 for none
        elif name.endswith('_rate') and not 0 <= number <= 1:
            wanted = 'a number from 0 to 1'
        elif name in ('expand', 'norm_eps') and not 0 < number < math.inf:
            wanted = 'a number above 0'
        elif name in ('mlp_ratio', 'init_values') and value is not None and not math.isfinite(number):
            wanted = 'a number'
        if wanted:
            raise ValueError(f'{name} must be {wanted}, not {value!r}')


def _check_switches(cls: Type[Any], arguments: Dict[str, Any]) -> None:
    """Refuse words, such as 'none' or 'false', for arguments that are True or False: any word would be True."""
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.annotation is bool and arguments.get(name, True) not in (True, False):
            raise ValueError(f'{name} must be True or False, not {arguments[name]!r}')


def _check_order(model: Trunk, extractor: Any) -> None:
    """Refuse raw outputs of blocks that would be read as a class token and patches in rows, and are others."""
    by_channel = model.cls_token is not None and model.cls_token.ndim > 3
    shuffled = model.random_token_order or model.random_class_position
    if by_channel or shuffled or model.class_token not in ('head', 'none'):
        raise ValueError(
            f"feature_cls {extractor!r} gives the blocks' raw outputs, which in this {type(model).__name__} are not "
            'one class token and then the patches in rows: leave it out, for maps'
        )
