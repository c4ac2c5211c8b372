"""Data sets, samplers and loaders for training and evaluation, on top of timm's."""

from .arrays import Arrays, channel_statistics
from .batch import Batch
from .classes import class_names, renumbered
from .datasets import describe, held_out_share, hold_out, make_dataset
from .digits import Digits
from .loading import Loader, eval_loader, train_loader
from .sampling import seed_everything

__all__ = [
    'Arrays', 'Batch', 'Digits', 'Loader', 'channel_statistics', 'class_names', 'describe', 'eval_loader',
    'held_out_share', 'hold_out', 'make_dataset', 'renumbered', 'seed_everything', 'train_loader',
]  # fmt: skip
