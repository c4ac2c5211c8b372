"""Data sets, samplers and loaders for training and evaluation, on top of timm's."""

from .batch import Batch
from .digits import Digits
from .loading import Loader, count_classes, eval_loader, make_dataset, train_loader
from .sampling import seed_everything

__all__ = [
    'Batch', 'Digits', 'Loader', 'count_classes', 'eval_loader', 'make_dataset', 'seed_everything', 'train_loader',
]  # fmt: skip
