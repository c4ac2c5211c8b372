"""--data-in-memory: decode once to uint8, keep the images on the device, and augment them there in batches."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data.loader import adapt_to_chs
from torch.utils.data import DataLoader

from ..errors import UserError
from ..settings import Process
from .batch import Collate, Labels
from .device_augment import Augmentation
from .device_erasing import Erasing
from .device_randaugment import RandAugment, supports
from .sampling import EpochBatches, Samples, seed_everything
from .workers import start_worker, usual_workers, watched


def make_augmentation(args: Any, data_config: dict[str, Any], transform: Any) -> Augmentation:
    """The augmentation that the training flags ask for.

    Args:
        transform: timm's, for the same flags.

    Raises:
        UserError: a flag asks for what the device cannot do; it is named.
    """
    interpolation = args.train_interpolation or data_config['interpolation']
    policy = next(filter(supports, getattr(transform, 'transforms', ())), None)
    for flag, unwanted in (
        ('--aa', args.aa and policy is None),
        ('--color-jitter-prob', args.color_jitter_prob is not None),
        ('--grayscale-prob', args.grayscale_prob),
        ('--gaussian-blur-prob', args.gaussian_blur_prob),
        ('--aug-splits', args.aug_splits),
        ('--resplit', args.resplit and args.reprob),
        ('--train-crop-mode', args.train_crop_mode not in (None, 'rrc')),
        ('--train-interpolation', interpolation not in ('random', 'bilinear', 'bicubic')),
    ):
        if unwanted:
            raise UserError(
                f'--data-in-memory cannot do {flag} {getattr(args, flag[2:].replace("-", "_")) or interpolation}: '
                'leave one of the two out'
            )
    jitter = 0.0 if policy else args.color_jitter  # as timm's
    return Augmentation(
        data_config['input_size'][1:], args.scale, args.ratio, args.hflip, args.vflip, jitter, interpolation,
        RandAugment(policy) if policy else None,
    )  # fmt: skip


def _stack(batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor]:
    images = [image for image, _ in batch]
    _check_sizes(images)
    return (torch.stack(images),)


def _check_sizes(images: Sequence[torch.Tensor]) -> None:
    shapes = sorted({tuple(image.shape[-3:]) for image in images})
    if len(shapes) > 1:
        raise UserError(
            f'--data-in-memory needs images of one size, and these have {shapes[0][1:]}, {shapes[1][1:]} (height, '
            'width): resize them first, or leave it out'
        )


def _check_memory(needed: int, device: torch.device) -> None:
    if device.type == 'cuda':
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == 'cpu' and hasattr(os, 'sysconf') and 'SC_AVPHYS_PAGES' in os.sysconf_names:
        free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    else:
        return
    if needed > 0.8 * free:
        raise UserError(
            f'--data-in-memory needs {needed / 2**30:.1f} GiB for the images, and {device} has {free / 2**30:.1f} GiB '
            'free: leave it out'
        )


class InMemory:
    """Batches of a data set that is decoded once: 8-bit images and the numbers by which `finish` augments them.

    The augmentation of a sample is a function of (seed, epoch, position in the epoch), so a run resumes anywhere, and
    does not depend on how many processes share a batch. What fills erased boxes follows the device's generator.

    Args:
        samples: what to decode; its transform ends in uint8 tensors (C, H, W).
        sampler: batches of keys (epoch, position, index).
        augment: applied to each batch; without it the images must have their final size.
        erasing: probability of random erasing.
    """

    def __init__(
        self, samples: Samples, sampler: EpochBatches, args: Any, process: Process, data_config: dict[str, Any],
        augment: Augmentation | None, erasing: float,
    ):  # fmt: skip
        self.sampler, self.augment = sampler, augment
        self.device, self.dtype = process.device, process.dtype
        channels = data_config['input_size'][0]
        self.mean, self.std = (
            torch.tensor([255 * value for value in adapt_to_chs(data_config[name], channels)], device=self.device)
            .to(self.dtype)
            .view(1, channels, 1, 1)
            for name in ('mean', 'std')
        )
        self.erasing = Erasing(erasing, args.remode, args.recount) if erasing > 0 else None
        self.draws = [part.draws if part else 0 for part in (augment, self.erasing)]
        self.columns = [augment.columns if augment else 0, self.draws[1]]
        collate = Collate(_stack, None if args.mae else args.num_classes)
        self.images, self.labels = self._decode(samples, usual_workers(args), collate)
        places = self.labels.keys[:, 2]  # others stand where a sample could not be read
        self.replaced = not torch.equal(places, torch.arange(len(places), device=self.device))

    def _decode(self, samples: Samples, workers: int, collate: Collate) -> tuple[torch.Tensor, Labels]:
        batches = EpochBatches(len(samples), 256, samples.seed, rank=0, world=1, training=False, passes=1)
        loader = DataLoader(
            samples, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=start_worker
        )
        images: list[torch.Tensor] = []
        labels: list[Labels] = []
        for part, of_part in watched(loader, workers):
            if not images:
                _check_memory(part[0].numel() * len(samples), self.device)
            images.append(part)
            labels.append(of_part)
        _check_sizes(images)
        targets, keys = (torch.cat([getattr(part, name) for part in labels]) for name in ('targets', 'keys'))
        complete = all(part.complete for part in labels)
        return torch.cat(images).to(self.device), Labels(targets, keys, complete).to(self.device)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Labels]]:
        sampler = self.sampler
        keys = sampler.keys().to(self.device)
        _, positions, places = keys.unbind(1)
        if any(self.draws):
            seed_everything(sampler.seed, sampler.epoch)
        uniform = torch.rand(len(sampler) * sampler.batch_size * sampler.world, sum(self.draws)).to(self.device)
        if self.replaced:
            keys = torch.cat([keys[:, :2], self.labels.keys[places, 2:]], 1)
        # by steps they would be a dozen small operations in each
        of_epoch = places, self.labels.targets[places], keys, self._numbers(uniform[positions])
        for places, targets, keys, numbers in zip(*(part.split(sampler.batch_size) for part in of_epoch)):
            yield self.images[places], Labels(targets, keys, self.labels.complete, numbers)

    def _numbers(self, uniform: torch.Tensor) -> torch.Tensor:
        for_augment, for_erasing = uniform.split(self.draws, 1)
        if self.augment:
            for_augment = self.augment.numbers(for_augment, *self.images.shape[2:])
        return torch.cat([for_augment, for_erasing], 1)

    def finish(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Images of a batch (B, C, H, W), augmented and normalized: work of the device alone."""
        for_augment, for_erasing = numbers.split(self.columns, 1)
        if self.augment:
            images = self.augment(images, for_augment)
        images = images.to(self.dtype).sub_(self.mean).div_(self.std)
        return self.erasing(images, for_erasing) if self.erasing else images
