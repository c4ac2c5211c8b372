"""ImageNet ReaL: L. Beyer et al., Are we done with ImageNet?, 2020 (arXiv:2006.07159)."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import RealLabelsImagenet

from ..errors import UserError, explain
from .classes import is_wordnet_id


def read_real_labels(path: str, dataset: Any, classes: Sequence[str], count: int | None) -> RealLabelsImagenet:
    """ReaL labels from a JSON file, for the images of ImageNet's validation split, which are known by their names.

    Args:
        classes: the model's, by number, as far as they are known.
        count: how many the model has, where that is known.

    Raises:
        UserError: the file cannot be read, the images are others, or the model's class numbers are not ImageNet's.
    """
    if not hasattr(dataset, 'filenames'):
        raise UserError('--real-labels goes by file names: give the images as a folder or tar in --data-dir')
    names = dataset.filenames(basename=True)
    with explain(f'--real-labels {path}'):
        try:
            real = RealLabelsImagenet(names, real_json=path)
        except AssertionError as error:
            raise ValueError(
                f'it has labels for another number of images than the {len(names)} of the data set'
            ) from error
        if not set(names) <= set(real.real_labels):
            raise ValueError('it has labels for the images ILSVRC2012_val_*.JPEG only, and the data set has others')
        largest = max((label for labels in real.real_labels.values() for label in labels), default=0)
        if count and largest >= count:
            raise ValueError(f'it has the class number {largest}, and the model has classes 0 to {count - 1}')
        if all(map(is_wordnet_id, classes)) and list(classes) != sorted(classes):
            raise ValueError("its numbers are those of ImageNet's classes by name, and the model has them otherwise")
    return real


def real_accuracy(real: RealLabelsImagenet, logits: torch.Tensor, places: torch.Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent, from logits (N, classes) and places in the data set (N,).

    Images without a ReaL label do not count.
    """
    real.filenames = [real.filenames[place] for place in places.tolist()]
    real.add_result(logits)
    return {f'top{k}': real.get_accuracy(k=k) for k in (1, 5)}
