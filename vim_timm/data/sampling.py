"""Samplers and data sets whose randomness depends on (seed, epoch, position) alone, not on who fetches a sample when.

The sampler hands out keys (epoch, position, index), and the data set seeds every generator from the key before it
fetches the sample. So a run may stop anywhere and go on from (epoch, step), with any number of workers.
"""

import errno
import hashlib
import itertools
import logging
import math
import random
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL.Image import DecompressionBombError
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import TrainingStopped, UserError, sentence
from .folder import Images
from .images import reason, to_mode
from .unreadable import Unreadable

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # for which no image can help it
UNREADABLE = (OSError, RuntimeError, SyntaxError, ValueError, DecompressionBombError)  # what PIL and timm raise


def seed_everything(*key: int, device: bool = False) -> None:
    """Seed Python's, NumPy's and torch's generators (the device's too, if asked) from a tuple of integers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    value = int.from_bytes(digest, 'little')
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    if device and torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # without an accelerator torch.manual_seed takes half a millisecond for those it does not find
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

    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (n,) of this rank's samples in this epoch, and their indices."""
        if not self.training:
            index = torch.arange(self.rank, max(self.size, self.rank), self.world)
            return index, index
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        draws = [torch.randperm(self.size, generator=generator) for _ in range(math.ceil(self.passes))]
        first = torch.arange(len(self))[:, None] * self.world + self.rank
        places = (first * self.batch_size + torch.arange(self.batch_size)).flatten()
        return places, torch.cat(draws)[places]

    def keys(self) -> torch.Tensor:
        """Keys (n, 3) of what is left of this rank's samples in this epoch."""
        positions, indices = self.positions()
        keys = torch.stack([torch.full_like(positions, self.epoch), positions, indices], 1)
        return keys[self.start * self.batch_size :]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        keys = self.keys()
        for first in range(0, len(keys), self.batch_size):
            yield list(map(tuple, keys[first : first + self.batch_size].tolist()))


class RepeatedBatches(EpochBatches):
    """EpochBatches with repeated augmentation: the copies of an image go to different ranks, or follow each other."""

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, world: int, repeats: float):
        super().__init__(size, batch_size, seed, rank, world, training=True, passes=1)
        self.sampler = RepeatAugSampler(range(size), num_replicas=world, rank=rank, num_repeats=repeats)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.sampler.set_epoch(self.seed * 1_000_003 + self.epoch)
        indices = torch.tensor(list(self.sampler)[: len(self) * self.batch_size], dtype=torch.int64)
        return self.rank + self.world * torch.arange(len(indices)), indices


def _refuse_unlisted(dataset: Any, error: KeyError) -> None:
    """Raise a UserError for a label that a timm reader looked up in --class-map in vain."""
    if getattr(getattr(dataset, 'reader', None), 'remap_class', False):
        raise UserError(
            f'--class-map does not list {error.args[0]!r}, a label of the data: it takes the labels as the data has '
            'them'
        ) from error


class Samples(Dataset):
    """A data set fetched by key, with each sample's own seed; unreadable images are named, counted and replaced.

    Items are (image, target, key). In training the next readable image takes the place of an unreadable one. In
    evaluation the place in its key becomes -1, and `evaluate.predictions` leaves it out.
    """

    def __init__(
        self, dataset: Any, transform: Any, mode: str, seed: int, training: bool, unreadable: Unreadable, splits: int
    ):
        self.dataset, self.transform, self.mode = dataset, transform, mode
        self.seed, self.training, self.unreadable, self.splits = seed, training, unreadable, splits

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
                    image = to_mode(image, self.mode)
            except UserError:
                raise
            except KeyError as error:
                _refuse_unlisted(self.dataset, error)
                raise
            except UNREADABLE as error:
                if getattr(error, 'errno', None) in SHORTAGES:
                    raise
                self.unreadable.skip(self._name(candidate), reason(error))
                continue
            return self._augment(image), target, (epoch, position, candidate if attempt == 0 or self.training else -1)
        raise UserError('the data set has no readable image')

    def _augment(self, image: Any) -> Any:
        if self.splits < 2:
            return self.transform(image)
        base, augment, normalize = self.transform
        image = base(image)
        return tuple(normalize(view) for view in (image, *(augment(image) for _ in range(self.splits - 1))))

    def _name(self, index: int) -> str:
        file = self.dataset.filename(index, absolute=True) if hasattr(self.dataset, 'filename') else ''
        if isinstance(getattr(self.dataset, 'reader', None), Images):
            return file
        return f'{index} of the {"training" if self.training else "evaluation"} split{f", {file}" if file else ""}'


class _Skipped(logging.Handler):
    """Takes what timm's reader of web data sets skips, which it only logs, for unreadable images."""

    def __init__(self, unreadable: Unreadable):
        super().__init__(logging.WARNING)
        self.unreadable = unreadable

    def emit(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        name = 'of a web data set'
        for frame, _ in traceback.walk_tb(
            error.__traceback__ if error else None
        ):  # the message names neither sample nor shard
            sample = frame.f_locals.get('sample')
            if isinstance(sample, dict) and '__key__' in sample:
                name = f'{sample["__key__"]} of {sample.get("__url__", name)}'
            elif isinstance(sample, dict) and 'url' in sample:
                name = str(sample['url'])
        why = reason(error) if error else record.getMessage()
        self.unreadable.skip(name, why, key=f'{name} {why}')


class Stream(IterableDataset):
    """A streamed data set with a seed for each sample, drawn from the epoch, the worker and the sample's place.

    Items are (image, target, key); a worker cannot number its samples among those of others, so the loader does.

    Args:
        more: samples that there may be beyond the data set's own number.
    """

    def __init__(self, dataset: IterableDataset, seed: int, rank: int, unreadable: Unreadable, more: int = 0):
        self.dataset, self.seed, self.rank, self.unreadable, self.more = dataset, seed, rank, unreadable, more
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset) + self.more  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def __iter__(self):
        worker = get_worker_info()
        log, handler = logging.getLogger('timm.data.readers.reader_wds'), _Skipped(self.unreadable)
        log.addHandler(handler)
        try:
            reader: Any = getattr(self.dataset, 'reader', None)
            if worker is None and hasattr(reader, 'worker_seed'):  # in a process of its own it would begin anew
                reader.ds, reader.worker_seed = None, self.seed * 1_000_003 + int(self.epoch)
            source = iter(self.dataset)
            for place in range(1 << 62):
                epoch = int(self.epoch)
                seed_everything(self.seed, epoch, self.rank, worker.id if worker else 0, place)
                try:
                    yield *next(source), (epoch, 0, 0)
                except StopIteration:
                    return
        except KeyError as error:
            _refuse_unlisted(self.dataset, error)
            raise
        except UNREADABLE as error:
            if isinstance(error, UserError):
                raise
            raise TrainingStopped(
                f'an image of the stream cannot be read, and the stream cannot go on without it ({sentence(error)}): '
                'repair it, or read the data set with an index (hfds/)'
            ) from error
        finally:
            log.removeHandler(handler)


class EvaluationShards:
    """Deals the shards of a web data set to all workers of all ranks, once each, where timm evens ranks out instead."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def __call__(self, shards: Iterable[Any]) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return itertools.islice(shards, self.rank * count + number, None, self.world * count)


class EvaluationShare:
    """How many samples timm's reader of tfds data sets asks of a worker: those it has, where timm repeats the last one.

    A split is dealt as evenly as can be, so that each worker has this number or one more.
    """

    def __init__(self, reader: Any):
        self.reader = reader

    def __call__(self) -> int:
        reader = self.reader
        return int(reader.num_samples / max(reader.global_num_workers, reader.dist_num_replicas))


class SeededErasing:
    """Random erasing of whole batches on the device, with a seed for each batch."""

    def __init__(self, erasing: RandomErasing, seed: int, rank: int):
        self.erasing, self.seed, self.rank = erasing, seed, rank
        self.epoch = self.step = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_everything(self.seed, self.epoch, self.step, self.rank, 1, device=True)
        self.step += 1
        return self.erasing(images)
