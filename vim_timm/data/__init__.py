"""Data sets, samplers and loaders for training and evaluation, on top of timm's."""

from typing import TYPE_CHECKING

from vim_timm.lazy import attributes

if TYPE_CHECKING:
    from .arrays import Arrays, channel_statistics
    from .batch import Batch
    from .classes import class_names, renumbered
    from .datasets import check_labelled, describe, held_out_share, hold_out, is_labelled, make_dataset, same_images
    from .digits import Digits
    from .loading import Loader, eval_loader, train_loader
    from .sampling import seed_everything

_MODULES = {
    'arrays': ('Arrays', 'channel_statistics'),
    'batch': ('Batch',),
    'classes': ('class_names', 'renumbered'),
    'datasets': (
        'check_labelled',
        'describe',
        'held_out_share',
        'hold_out',
        'is_labelled',
        'make_dataset',
        'same_images',
    ),
    'digits': ('Digits',),
    'loading': ('Loader', 'eval_loader', 'train_loader'),
    'sampling': ('seed_everything',),
}

__all__ = [
    'Arrays', 'Batch', 'Digits', 'Loader', 'channel_statistics', 'check_labelled', 'class_names', 'describe',
    'eval_loader', 'held_out_share', 'hold_out', 'is_labelled', 'make_dataset', 'renumbered', 'same_images',
    'seed_everything', 'train_loader',
]  # fmt: skip

__getattr__, __dir__ = attributes(
    __name__, {name: f'{__name__}.{module}' for module, names in _MODULES.items() for name in names}
)
