"""What a loader yields: images, targets, and which samples they are of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate, get_worker_info

from ..errors import TrainingStopped

Key = tuple[int, int, int]  # epoch, position in the epoch, place in the data set (-1: it could not be read)


class Batch(NamedTuple):
    """One step's samples on the device.

    Attributes:
        images: (B, C, H, W), normalized, in the model's dtype; of 8 bits while they have `draws`.
        targets: (B,) int64 class indices, or whatever else the data set has, (B, ...).
        keys: (B, 3) int64, of each sample the epoch, its position in the epoch (over all ranks) and its place in the
            data set, which is -1 for a sample of an evaluation that could not be read. A stream has no index: there
            the place is the position.
        complete: whether the host knows that every sample could be read.
        draws: numbers (B, any) by which `Loader.finish` is still to augment the images; None where they are done.
        size: height and width of the images when they are done.
        mixing: numbers by which the task is still to mix the images.
    """

    images: torch.Tensor
    targets: torch.Tensor
    keys: torch.Tensor
    complete: bool = True
    draws: torch.Tensor | None = None
    size: tuple[int, int] | None = None
    mixing: torch.Tensor | None = None

    @property
    def places(self) -> torch.Tensor:
        """Places (B,) of the samples in the data set."""
        return self.keys[:, 2]


class Labels:
    """What a batch has beside its images, on the way to the device."""

    def __init__(self, targets: torch.Tensor, keys: torch.Tensor, complete: bool, draws: torch.Tensor | None = None):
        self.targets, self.keys, self.complete, self.draws = targets, keys, complete, draws

    def to(self, device: torch.device, non_blocking: bool = False) -> 'Labels':
        """Copy both to a device."""
        targets, keys = (part.to(device, non_blocking=non_blocking) for part in (self.targets, self.keys))
        return Labels(targets, keys, self.complete)

    def pin_memory(self) -> 'Labels':
        """Copy both to pinned memory."""
        return Labels(self.targets.pin_memory(), self.keys.pin_memory(), self.complete)


def collate_targets(targets: list[Any]) -> torch.Tensor:
    """Targets (B, ...): whole numbers as int64, others as float32."""
    result = torch.as_tensor(default_collate(targets))
    return result.float() if result.is_floating_point() else result.long()


class Collate:
    """Collates (image, target, key) to (images, `Labels`).

    Args:
        images: collates (image, 0) pairs, such as timm's `fast_collate`; the copies of an image that are augmented
            apart stand in blocks of a batch each.
        classes: how many the model has, where targets are their numbers.
    """

    def __init__(self, images: Callable[[list[Any]], Any], classes: int | None = None):
        self.images, self.classes = images, classes

    def __call__(self, samples: list[tuple[Any, Any, Key]]) -> tuple[Any, Labels]:
        images = self.images([(image, 0) for image, _, _ in samples])[0]
        images = torch.cat(images) if isinstance(images, list) else images
        targets = collate_targets([target for _, target, _ in samples])
        keys = torch.tensor([key for _, _, key in samples], dtype=torch.int64)
        self._check(targets, keys)
        copies = len(images) // len(samples)
        if copies > 1:
            targets, keys = targets.repeat(copies, *[1] * (targets.ndim - 1)), keys.repeat(copies, 1)
        if get_worker_info() is not None:  # here, not by the thread that hands them over: its errors are not told
            for tensor in (images, targets, keys):
                tensor.share_memory_()
        return images, Labels(targets, keys, bool((keys[:, 2] >= 0).all()))

    def _check(self, targets: torch.Tensor, keys: torch.Tensor) -> None:
        """Refuse class numbers that the model has not: a device ends at them without saying why.

        A stand-in for an image that could not be read is not counted, and is refused where it stands for itself.
        """
        if not self.classes or targets.ndim != 1 or targets.is_floating_point():
            return
        foreign = (((targets < 0) | (targets >= self.classes)) & (keys[:, 2] >= 0)).nonzero()
        if len(foreign):
            number, place = int(targets[foreign[0]]), int(keys[foreign[0], 2])
            which = f'image {place}' if keys[:, 2].any() else 'an image'  # a stream does not number them here
            raise TrainingStopped(
                f'{which} of the data has the class number {number}, and the model has classes 0 to '
                f'{self.classes - 1}: number them from 0, or set --num-classes'
            )
