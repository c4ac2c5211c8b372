"""Data sets and loaders from flags."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torchvision.transforms import PILToTensor

from ..errors import UserError, explain
from ..settings import Process
from ..settings.flags import AUTO
from .batch import Batch, Collate
from .classes import class_names
from .datasets import Pictures
from .device_augment import Augmentation
from .images import to_mode
from .in_memory import InMemory, make_augmentation
from .sampling import (
    EpochBatches,
    EvaluationShards,
    EvaluationShare,
    RepeatedBatches,
    Samples,
    SeededErasing,
    Stream,
    seed_everything,
)
from .unreadable import Unreadable
from .workers import start_worker, usual_workers, watched


def operations(transform: Any) -> Iterator[auto_augment.AugmentOp]:
    """All operations of timm's policies in a transform, or in a tuple of them."""
    if isinstance(transform, auto_augment.AugmentOp):
        yield transform
    parts = [transform] if isinstance(transform, (list, tuple)) else []
    for part in itertools.chain(*parts, *(getattr(transform, name, ()) for name in ('transforms', 'ops', 'policy'))):
        yield from operations(part)


def keep_posterizing(transform: Any) -> None:
    """Let timm's posterize have zero bits, a black image: Pillow 12 raises where it drew that before."""
    for operation in operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _check_filter(transform: Any, interpolation: str) -> None:
    """Refuse a filter by which Pillow can resize, and cannot turn, shear or shift."""
    moved = {'Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'TranslateXRel', 'TranslateYRel'}
    if interpolation in ('box', 'hamming', 'lanczos') and moved & {part.name for part in operations(transform)}:
        raise ValueError(f'Pillow cannot turn images by {interpolation}: --train-interpolation bicubic')


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _prefetches(args: Any, dataset: Any) -> bool:
    """Whether images go to the device as 8 bits and are normalized there. Arrays are normalized where they are read."""
    return not args.no_prefetcher and not getattr(dataset, 'floating', False)


class _Prepared:
    """The transform of a stream, after the images have their mode."""

    def __init__(self, mode: str, transform: Any):
        self.mode, self.transform = mode, transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(to_mode(image, self.mode) if self.mode else image)


class Loader:
    """Batches of one split on the device: `for batch in loader.epoch(epoch, start)`."""

    def __init__(
        self, dataset: Any, transform: Any, args: Any, process: Process, data_config: dict[str, Any], training: bool,
        unreadable: Unreadable, augment: Augmentation | None = None,
    ):  # fmt: skip
        dataset, mode = Pictures.of(dataset), getattr(dataset, 'image_mode', '')
        self.classes, self.unreadable, self.data_config = class_names(dataset), unreadable, data_config
        self.bounds: dict[str, str] = getattr(getattr(dataset, 'reader', None), 'bounds', {})
        keep_posterizing(transform)
        if args.data_in_memory and getattr(dataset, 'floating', False):
            raise UserError('--data-in-memory keeps pictures of 8 bits, not arrays: leave it out')
        self.training, self.splits = training, args.aug_splits if training else 0
        self.process, self.prefetch = process, _prefetches(args, dataset)
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.workers, self.started = usual_workers(args), False
        self.dataset: Dataset
        options: dict[str, Any] = {}
        classes = None if args.mae else args.num_classes
        self.seed, self.generator = args.seed, torch.Generator()  # of the workers' own seeds
        chosen = None if training or args.validation_batch_size == AUTO else args.validation_batch_size
        self.batch_size = size = chosen or args.batch_size
        if isinstance(dataset, IterableDataset):
            if training and args.aug_repeats:
                raise UserError(f'--aug-repeats needs images with an index, not the stream {args.dataset}')
            dataset.transform = _Prepared(mode, transform)  # type: ignore[attr-defined]
            if training and args.dataset.startswith('wds/'):
                shards = len(dataset.reader.split_info.filenames)  # type: ignore[attr-defined]
                self.workers = min(self.workers, self._share_of(shards, process.world_size))
            if hasattr(dataset, 'set_loader_cfg'):
                dataset.set_loader_cfg(num_workers=self.workers)  # type: ignore[attr-defined]
            if not training and args.dataset.startswith('wds/'):
                reader = dataset.reader  # type: ignore[attr-defined]
                reader.dist_rank, reader.dist_num_replicas = 0, 1
                reader._split_by_node_and_worker = EvaluationShards(process.rank, process.world_size)
            more = 0
            if not training and args.dataset.startswith('tfds/'):
                more = max(1, self.workers)  # one for each process, where the split is not even
                reader = dataset.reader  # type: ignore[attr-defined]
                reader._num_samples_per_worker = EvaluationShare(reader)
            self.dataset = Stream(dataset, args.seed, process.rank, unreadable, more)
            options.update(batch_size=size, drop_last=training)
        else:
            self.dataset = Samples(dataset, transform, mode, args.seed, training, unreadable, self.splits)
            self._try_one(data_config['input_size'][0])
            common = len(dataset), size, args.seed, process.rank, process.world_size
            if training and args.aug_repeats:
                options['batch_sampler'] = RepeatedBatches(*common, repeats=args.aug_repeats)
            else:
                options['batch_sampler'] = EpochBatches(*common, training, args.epoch_repeats if training else 0)
        self._load = functools.partial(
            DataLoader,
            self.dataset,
            num_workers=self.workers,
            # without it each step waits for its copy
            pin_memory=process.device.type == 'cuda' or (args.pin_mem and process.device.type != 'cpu'),
            collate_fn=Collate(fast_collate if self.prefetch else default_collate, classes),
            # the readers of streams keep state from epoch to epoch, which a resumed run would not have
            persistent_workers=self.workers > 0 and not isinstance(self.dataset, Stream),
            generator=self.generator,
            worker_init_fn=start_worker,
        )
        loader = self._load(**options)
        self.sampler = options.get('batch_sampler')
        erasing = args.reprob if training and not args.no_aug else 0.0
        if args.data_in_memory:
            if not isinstance(self.dataset, Samples) or self.sampler is None:
                raise UserError(f'--data-in-memory needs images with an index, not the stream {args.dataset}')
            if args.no_prefetcher:
                raise UserError('--data-in-memory cannot do --no-prefetcher: leave one of the two out')
            self.loader: Any = InMemory(self.dataset, self.sampler, args, process, data_config, augment, erasing)
        else:
            self.loader = self._prefetching(loader, args, data_config, erasing) if self.prefetch else loader
        if training and len(self) == 0:
            each = f' on each of {process.world_size} ranks' if process.world_size > 1 else ''
            raise UserError(
                f'{len(dataset)} training images do not fill one batch of {size}{each}: a smaller --batch-size'
            )

    @staticmethod
    def _share_of(shards: int, ranks: int) -> int:
        """Shards of each rank, at least. A process without one would read nothing, and the epoch would end early.

        Raises:
            UserError: there are too few. A rank that has none would never make the step that the others wait for.
        """
        if shards < ranks:
            raise UserError(f'{shards} shards are too few for {ranks} ranks: write more of them, or start fewer ranks')
        return shards // ranks

    def _try_one(self, channels: int) -> None:
        """Prepare the first image, before anything is written.

        Raises:
            UserError: it cannot be prepared, or has another number of channels than the model takes.
        """
        with explain('images'):
            image = self.dataset[0, 0, 0][0]
            found = (image[0] if isinstance(image, tuple) else image).shape[0]
        if found != channels:
            raise UserError(f'the images have {found} channels, and the model takes {channels}: --in-chans sets that')

    def _prefetching(self, loader: DataLoader, args: Any, data_config: dict[str, Any], erasing: float) -> Any:
        prefetching = PrefetchLoader(
            loader, mean=data_config['mean'], std=data_config['std'], channels=data_config['input_size'][0],
            device=self.process.device, img_dtype=self.process.dtype, re_prob=erasing,
            re_mode=getattr(args, 'remode', 'const'), re_count=getattr(args, 'recount', 1),
            re_num_splits=(self.splits or 2) if getattr(args, 'resplit', False) else 0,
        )  # fmt: skip
        if prefetching.random_erasing is not None:
            prefetching.random_erasing = SeededErasing(  # type: ignore[assignment]
                prefetching.random_erasing, args.seed, self.process.rank
            )
        return prefetching

    def __len__(self) -> int:
        return len(self.loader)

    def rebatch(self, size: int) -> None:
        """Read batches of another size from the next epoch on."""
        self.batch_size = size
        if self.sampler is not None:
            self.sampler.batch_size = size
            return
        loader = self._load(batch_size=size, drop_last=self.training)
        if self.prefetch:
            self.loader.loader = loader
        else:
            self.loader = loader

    @property
    def readers(self) -> int:
        """Processes that read batches, each of them whole ones; 0 where the images are in memory."""
        return 0 if isinstance(self.loader, InMemory) else self.workers

    @property
    def awaited(self) -> str:
        """What the first batch of an epoch waits for, in words."""
        if self.workers and not self.started:
            return f'{self.workers} data loading processes to start and read the first batch'
        return 'the first batch to be read'

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from batch `start` on."""
        for step, batch in enumerate(self.unfinished(epoch, start), start):
            if batch.draws is not None and self.training:
                seed_everything(self.seed, epoch, step, self.process.rank, device=True)
            yield self.finish(batch)

    def finish(self, batch: Batch) -> Batch:
        """A batch whose images are augmented and normalized; what is random follows the device's generator."""
        if batch.draws is None:
            return batch
        images = self.loader.finish(batch.images, batch.draws).contiguous(memory_format=self.layout)
        return batch._replace(images=images, draws=None)

    def compile(self, backend: Any) -> None:
        """Let `finish` augment by one function that torch compiles, where it augments on the device."""
        if isinstance(self.loader, InMemory):
            self.loader.finish = torch.compile(self.loader.finish, backend=backend, dynamic=False)  # type: ignore[method-assign]

    def unfinished(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, whose images `finish` is to augment where they have `draws`."""
        process, seen, self.started = self.process, 0, True
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = epoch, start
        elif isinstance(self.dataset, Stream):
            self.dataset.set_epoch(epoch)
            self.generator.manual_seed(self.seed * 1_000_003 + epoch)
        erasing = getattr(self.loader, 'random_erasing', None)
        if erasing is not None:
            erasing.epoch, erasing.step = epoch, start if self.sampler is not None else 0
        # A stream that is split unevenly may go on for longer on one rank: training must not, evaluation must.
        batches = itertools.islice(watched(self.loader, self.workers), len(self) if self.training else None)
        for step, (images, labels) in enumerate(batches):
            if not self.prefetch:
                images = images.to(process.device, process.dtype, non_blocking=True)
                labels = labels.to(process.device, non_blocking=True)
            if self.sampler is None:
                count = len(labels.keys)
                numbers = torch.arange(seen, seen + count, device=process.device)
                labels.keys[:, 1:] = (process.rank + process.world_size * numbers)[:, None]
                seen += count
                if step < start:  # a stream has no index: replay it
                    continue
            batch = Batch(images, labels.targets, labels.keys, labels.complete)
            if labels.draws is None:
                yield batch._replace(images=images.contiguous(memory_format=self.layout))
            else:
                yield batch._replace(draws=labels.draws, size=self.data_config['input_size'][1:])


def train_loader(args: Any, process: Process, dataset: Any, data_config: dict[str, Any]) -> Loader:
    """Loader of the training split with timm's augmentation flags."""
    splits, prefetches = max(args.aug_splits, 0), _prefetches(args, dataset)
    jitter = _colour_jitter(args, dataset)
    own = args.no_aug or not args.train_interpolation
    interpolation = data_config['interpolation'] if own else args.train_interpolation
    with explain('augmentation'):
        transform = create_transform(
            data_config['input_size'], is_training=True, no_aug=args.no_aug, train_crop_mode=args.train_crop_mode,
            scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=jitter,
            color_jitter_prob=args.color_jitter_prob, grayscale_prob=args.grayscale_prob or 0.0,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.0, auto_augment=args.aa,
            interpolation=interpolation,
            mean=data_config['mean'], std=data_config['std'], crop_pct=data_config['crop_pct'], re_prob=args.reprob,
            re_mode=args.remode, re_count=args.recount, re_num_splits=(splits or 2) if args.resplit else 0,
            use_prefetcher=prefetches, separate=splits > 0,
        )  # fmt: skip
        _check_filter(transform, interpolation)
    augment = make_augmentation(args, data_config, transform) if args.data_in_memory and not args.no_aug else None
    transform = PILToTensor() if augment else transform
    unreadable = Unreadable(args.max_unreadable, usual_workers(args))
    return Loader(dataset, transform, args, process, data_config, True, unreadable, augment)


def _colour_jitter(args: Any, dataset: Any) -> float:
    """Strength of the colour jitter. Arrays, whose channels are no colours, have none.

    Raises:
        UserError: a flag asks for what the data set's kind of images cannot have.
    """
    floating, mode = getattr(dataset, 'floating', False), getattr(dataset, 'image_mode', 'RGB')
    for flag, wanted in (('--aa', args.aa), ('--grayscale-prob', args.grayscale_prob)):
        if wanted and not args.no_aug and (floating or mode not in ('L', 'RGB')):
            raise UserError(
                f'{flag} is for grey and RGB pictures, not for {"arrays" if floating else mode}: leave it out'
            )
    if floating and args.color_jitter and 'color_jitter' in args.chosen and not args.no_aug:
        raise UserError('--color-jitter is for pictures, not for arrays: leave it out')
    return 0.0 if floating else args.color_jitter


def eval_loader(
    args: Any, process: Process, dataset: Any, data_config: dict[str, Any], unreadable: Unreadable | None = None
) -> Loader:
    """Loader of an evaluation split: every image on exactly one rank, resized and cropped as the model says.

    Args:
        unreadable: counts what cannot be read in the training split, too.
    """
    transform = create_transform(
        data_config['input_size'], is_training=False, interpolation=data_config['interpolation'],
        mean=data_config['mean'], std=data_config['std'], crop_pct=data_config['crop_pct'],
        crop_mode=data_config.get('crop_mode'), crop_border_pixels=getattr(args, 'crop_border_pixels', None),
        use_prefetcher=_prefetches(args, dataset),
    )  # fmt: skip
    unreadable = unreadable or Unreadable(args.max_unreadable, usual_workers(args))
    return Loader(dataset, transform, args, process, data_config, False, unreadable)
