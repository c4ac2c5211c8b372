"""Configurations and models as timm's registry wants them."""

from typing import Any, Callable, Dict, Type, TypeVar

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

from vim_timm.models.pretrained import on_disk

Model = TypeVar('Model', bound=nn.Module)


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
    """
    if pretrained:
        kwargs = on_disk(variant, kwargs)
    feature_cfg = dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter')
    return build_model_with_cfg(
        cls, variant, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=feature_cfg, **kwargs
    )
