"""Data sets and loaders whose randomness depends on (seed, epoch, position) alone, not on who fetches a sample when.

The sampler hands out keys (epoch, position, index), and the data set seeds every generator from the key before it
fetches the sample. So a run may stop anywhere and go on from (epoch, step), with any number of workers.
"""

import hashlib
import math
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import AugMixDataset, auto_augment, create_dataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from .digits import Digits
from .errors import TrainingStopped, UserError, explain, sentence


def seed_everything(*key: int, device: bool = False) -> None:
    """Seed Python's, NumPy's and torch's generators (the device's too, if asked) from a tuple of integers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    value = int.from_bytes(digest, 'little')
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    if device:
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)


class EpochBatches:
    """Batches of keys (epoch, position, index) for one rank; a global batch does not depend on the number of ranks.

    Training shuffles anew each epoch and drops the last partial batch. Evaluation gives every index to exactly one
    rank, in order. `start` skips batches of a resumed epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, world: int, training: bool, passes: float):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world, self.training = rank, world, training
        self.passes = max(1.0, passes)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        if self.training:
            return int(self.size * self.passes) // (self.batch_size * self.world)
        return math.ceil(len(range(self.rank, self.size, self.world)) / self.batch_size)

    def positions(self) -> list[tuple[int, int]]:
        """(position, index) pairs of this rank in this epoch."""
        if not self.training:
            return [(index, index) for index in range(self.rank, self.size, self.world)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        draws = [torch.randperm(self.size, generator=generator) for _ in range(math.ceil(self.passes))]
        order = torch.cat(draws)[: int(self.size * self.passes)].tolist()
        step, offset = self.batch_size * self.world, self.batch_size * self.rank
        places = (first + offset + i for first in range(0, len(self) * step, step) for i in range(self.batch_size))
        return [(place, order[place]) for place in places]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        keys = [(self.epoch, position, index) for position, index in self.positions()]
        for first in range(self.start * self.batch_size, len(keys), self.batch_size):
            yield keys[first : first + self.batch_size]


class RepeatedBatches(EpochBatches):
    """EpochBatches with timm's repeated augmentation: copies of an image go to different ranks, or follow each other."""

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, world: int, repeats: float):
        super().__init__(size, batch_size, seed, rank, world, training=True, passes=1)
        self.sampler = RepeatAugSampler(range(size), num_replicas=world, rank=rank, num_repeats=repeats)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def positions(self) -> list[tuple[int, int]]:
        self.sampler.set_epoch(self.seed * 1_000_003 + self.epoch)
        indices = list(self.sampler)[: len(self) * self.batch_size]
        return [(self.rank + self.world * i, index) for i, index in enumerate(indices)]


class Samples(Dataset):
    """A data set fetched by key, with each sample's own seed; unreadable images are named, counted and replaced.

    In training the next readable image takes the place of an unreadable one. In evaluation its label becomes -1, which
    `evaluate.predictions` leaves out.
    """

    def __init__(self, dataset: Any, transform: Any, mode: str, seed: int, training: bool, limit: int):
        self.dataset, self.transform, self.mode = dataset, transform, mode
        self.seed, self.training, self.limit = seed, training, limit
        self.unreadable = 0
        if hasattr(dataset, '_max_retries'):  # timm's own replacement neither names nor counts
            dataset._max_retries = 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]):
        epoch, position, index = key
        seed_everything(self.seed, epoch, position)
        for attempt in range(len(self)):
            candidate = (index + attempt) % len(self)
            try:
                image, target = self.dataset[candidate]
                if self.mode:
                    image = image.convert(self.mode)
            except (OSError, RuntimeError, SyntaxError, ValueError) as error:  # what PIL and timm raise
                self._count(candidate, error)
                continue
            image = image if self.transform is None else self.transform(image)
            return image, (target if attempt == 0 or self.training else -1)
        raise UserError('the data set has no readable image')

    def _count(self, index: int, error: Exception) -> None:
        self.unreadable += 1
        name = str(index)
        if hasattr(self.dataset, 'filename'):
            name = self.dataset.filename(index, absolute=True)
        print(f'unreadable image {name}, skipped ({sentence(error)})', flush=True)
        if self.unreadable > self.limit:
            raise TrainingStopped(
                f'{self.unreadable} unreadable images in one loading process, more than --max-unreadable {self.limit}; '
                f'the last one is {name}'
            )


class Stream(IterableDataset):
    """A streamed data set with a seed for each sample, drawn from the epoch, the worker and the sample's place."""

    def __init__(self, dataset: IterableDataset, seed: int, rank: int):
        self.dataset, self.seed, self.rank = dataset, seed, rank
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def __iter__(self):
        worker = get_worker_info()
        source = iter(self.dataset)
        for place in range(1 << 62):
            seed_everything(self.seed, int(self.epoch), self.rank, worker.id if worker else 0, place)
            try:
                yield next(source)
            except StopIteration:
                return


class SeededErasing:
    """Random erasing of whole batches on the device, with a seed for each batch."""

    def __init__(self, erasing: RandomErasing, seed: int, rank: int):
        self.erasing, self.seed, self.rank = erasing, seed, rank
        self.epoch = self.step = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_everything(self.seed, self.epoch, self.step, self.rank, 1, device=True)
        self.step += 1
        return self.erasing(images)


def keep_posterizing(transform: Any) -> None:
    """Let timm's posterize have zero bits, a black image: Pillow 12 raises where it drew that before."""
    for name in ('transforms', 'ops', 'policy'):
        for part in getattr(transform, name, ()):
            for step in part if isinstance(part, (list, tuple)) else [part]:
                keep_posterizing(step)
    if getattr(transform, 'aug_fn', None) is auto_augment.posterize:
        transform.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def make_dataset(args: Any, split: str, training: bool, channels: int) -> Any:
    """The data set of one split, without a transform.

    Raises:
        UserError: there is no such data set, folder or split, or it is empty.
    """
    mode = args.input_img_mode or ('L' if channels == 1 else 'RGB')
    if args.dataset == 'digits':
        return Digits(training, mode)
    name = args.dataset or 'image folder'
    if not args.dataset.startswith(('hfds/', 'hfids/', 'tfds/', 'wds/')) and not args.dataset_download:
        if not args.data_dir:
            raise UserError('no data: give --data-dir, or --dataset digits for the embedded digits')
        if not os.path.exists(args.data_dir):
            raise UserError(f'there is no data folder {args.data_dir}')
    with explain(f'{name} {args.data_dir or ""}, split {split!r}'):
        dataset = create_dataset(
            args.dataset, root=args.data_dir, split=split, is_training=training, class_map=args.class_map,
            download=args.dataset_download, batch_size=args.batch_size, seed=args.seed,
            repeats=args.epoch_repeats if training else 0, input_img_mode=mode, input_key=args.input_key,
            target_key=args.target_key, num_samples=args.train_num_samples if training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
        )  # fmt: skip
    if not args.dataset.startswith(('hfids/', 'tfds/', 'wds/')) and len(dataset) == 0:
        raise UserError(f'there are no images in {args.data_dir}, split {split!r}')
    dataset.image_mode = mode if args.dataset.startswith('torch/') else ''
    return dataset


def count_classes(dataset: Any) -> int | None:
    """Number of classes of a data set, where it says."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        for name in ('classes', 'class_to_idx'):
            if getattr(owner, name, None):
                return len(getattr(owner, name))
    return None


def _worker_init(_: int) -> None:
    # The parent's handlers only set a flag; a worker must end when it is told to. Ctrl-C is the parent's to handle.
    for name in ('SIGTERM', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class Loader:
    """Batches of one split on the device: `for images, targets in loader.epoch(epoch, start)`.

    images (B, C, H, W) are normalized, in the model's dtype; targets (B,) are int64.
    """

    def __init__(self, dataset: Any, transform: Any, args: Any, data_config: dict[str, Any], training: bool):
        mode = getattr(dataset, 'image_mode', '')
        for part in transform if isinstance(transform, tuple) else [transform]:
            keep_posterizing(part)
        self.splits = args.aug_splits if training else 0
        if self.splits > 1:
            dataset = AugMixDataset(dataset, num_splits=self.splits)
            dataset.transform, transform = transform, None
        self.device, self.dtype, self.prefetch = args.torch_device, args.dtype, not args.no_prefetcher
        self.dataset: Dataset
        options: dict[str, Any] = {}
        size = args.batch_size if training else (args.validation_batch_size or args.batch_size)
        if isinstance(dataset, IterableDataset):
            dataset.transform = transform  # type: ignore[attr-defined]
            if hasattr(dataset, 'set_loader_cfg'):
                dataset.set_loader_cfg(num_workers=args.workers)  # type: ignore[attr-defined]
            self.dataset = Stream(dataset, args.seed, args.rank)
            options.update(batch_size=size, drop_last=training)
        else:
            self.dataset = Samples(dataset, transform, mode, args.seed, training, args.max_unreadable)
            common = len(dataset), size, args.seed, args.rank, args.world_size
            if training and args.aug_repeats:
                options['batch_sampler'] = RepeatedBatches(*common, repeats=args.aug_repeats)
            else:
                options['batch_sampler'] = EpochBatches(*common, training, args.epoch_repeats if training else 0)
        loader = DataLoader(
            self.dataset,
            num_workers=args.workers,
            pin_memory=args.pin_mem,
            collate_fn=fast_collate if self.prefetch else default_collate,
            persistent_workers=args.workers > 0,
            worker_init_fn=_worker_init,
            **options,
        )
        self.sampler = options.get('batch_sampler')
        self.loader = self._prefetching(loader, args, data_config, training) if self.prefetch else loader
        if training and len(self) == 0:
            raise UserError(f'{len(dataset)} training images do not fill one batch of {size} on each of the ranks')

    def _prefetching(self, loader: DataLoader, args: Any, data_config: dict[str, Any], training: bool) -> Any:
        erasing = args.reprob if training and not args.no_aug else 0.0
        prefetching = PrefetchLoader(
            loader, mean=data_config['mean'], std=data_config['std'], channels=data_config['input_size'][0],
            device=self.device, img_dtype=self.dtype, re_prob=erasing, re_mode=getattr(args, 'remode', 'const'),
            re_count=getattr(args, 'recount', 1),
            re_num_splits=(self.splits or 2) if getattr(args, 'resplit', False) else 0,
        )  # fmt: skip
        if prefetching.random_erasing is not None:
            prefetching.random_erasing = SeededErasing(prefetching.random_erasing, args.seed, args.rank)
        return prefetching

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch from batch `start` on."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = epoch, start
        elif isinstance(self.dataset, Stream):
            self.dataset.set_epoch(epoch)
        erasing = getattr(self.loader, 'random_erasing', None)
        if erasing is not None:
            erasing.epoch, erasing.step = epoch, start if self.sampler is not None else 0
        for step, (images, targets) in enumerate(self.loader):
            if self.sampler is None and step < start:  # a stream has no index: replay it
                continue
            if not self.prefetch:
                images = images.to(self.device, self.dtype, non_blocking=True)
                targets = targets.to(self.device, non_blocking=True)
            yield images, targets


def train_loader(args: Any, dataset: Any, data_config: dict[str, Any]) -> Loader:
    """Loader of the training split with timm's augmentation flags."""
    splits = max(args.aug_splits, 0)
    transform = create_transform(
        data_config['input_size'], is_training=True, no_aug=args.no_aug, train_crop_mode=args.train_crop_mode,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob, grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0, auto_augment=args.aa,
        interpolation=data_config['interpolation'] if args.no_aug or not args.train_interpolation
        else args.train_interpolation,
        mean=data_config['mean'], std=data_config['std'], crop_pct=data_config['crop_pct'], re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, re_num_splits=(splits or 2) if args.resplit else 0,
        use_prefetcher=not args.no_prefetcher, separate=splits > 0,
    )  # fmt: skip
    return Loader(dataset, transform, args, data_config, training=True)


def eval_loader(args: Any, dataset: Any, data_config: dict[str, Any]) -> Loader:
    """Loader of an evaluation split: every image on exactly one rank, resized and cropped as the model says."""
    transform = create_transform(
        data_config['input_size'], is_training=False, interpolation=data_config['interpolation'],
        mean=data_config['mean'], std=data_config['std'], crop_pct=data_config['crop_pct'],
        crop_mode=data_config.get('crop_mode'), crop_border_pixels=getattr(args, 'crop_border_pixels', None),
        use_prefetcher=not args.no_prefetcher,
    )  # fmt: skip
    return Loader(dataset, transform, args, data_config, training=False)
