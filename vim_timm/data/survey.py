"""A look at every image of a data set: which can be read, how large they are, and which are in two splits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .images import reason
from .workers import start_worker, watched

NEAR = 3  # bits of 64 in which the hashes of near-duplicates may differ
LIKE = 8.0  # mean difference of grey values (0..255) that they may have, at 16 x 16 pixels
_SIDE = 16


class Seen(NamedTuple):
    """What was found of one image.

    Attributes:
        label: its class number; None where there is none.
        width, height: in pixels.
        small: (16, 16) uint8, the image in grey.
        digest: 64 bits, whether grey values rise from left to right at 8 x 8 places.
        turned: its EXIF data ask for a rotation or reflection, which nothing here applies.
        error: why it could not be read; there is nothing else then.
    """

    label: int | None = None
    width: int = 0
    height: int = 0
    small: np.ndarray | None = None
    digest: int = 0
    turned: bool = False
    error: str = ''


class _Glances(Dataset):
    def __init__(self, dataset: Any, picture: Callable[[Any], Image.Image]):
        self.dataset, self.picture = dataset, picture

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Seen:
        try:
            item, label = self.dataset[index]
            image = self.picture(item)
        except UserError:
            raise
        except Exception as error:  # of any kind, in damaged files
            return Seen(error=reason(error))
        grey = image.convert('L')
        steps = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
        digest = int(''.join('01'[bit] for bit in (np.diff(steps) > 0).astype(int).flat), 2)
        small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX))
        return Seen(label, image.width, image.height, small, digest, _is_turned(image))


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # of any kind, in damaged EXIF data
        return False


def _same(seen: Any) -> Any:
    return seen


def survey(
    dataset: Any, picture: Callable[[Any], Image.Image], workers: int, tick: Callable[[], Any] = lambda: None
) -> list[Seen]:
    """What is found of every image, in order.

    Args:
        picture: a data set's image -> PIL.
        tick: called after each one.
    """
    loader = DataLoader(
        _Glances(dataset, picture), batch_size=None, num_workers=workers, worker_init_fn=start_worker, collate_fn=_same
    )
    found = []
    for seen in watched(loader, workers):
        found.append(seen)
        tick()
    return found


def near_duplicates(some: Sequence[Seen], others: Sequence[Seen]) -> list[tuple[int, int]]:
    """Places of images in `some` and in `others` that look alike, each of the latter with the most alike one.

    Their hashes agree but for a few bits, and so do their grey values: pictures without structure have like hashes.
    """
    bands: dict[tuple[int, int], list[int]] = {}  # with 3 of 64 bits off, one of four 16-bit parts is whole
    for place, seen in enumerate(some):
        for band in range(4 if seen.small is not None else 0):
            bands.setdefault((band, seen.digest >> 16 * band & 0xFFFF), []).append(place)
    pairs = []
    for place, seen in enumerate(others):
        if seen.small is None:
            continue
        known = {near for band in range(4) for near in bands.get((band, seen.digest >> 16 * band & 0xFFFF), ())}
        alike = [
            (difference, near)
            for near in known
            if (some[near].digest ^ seen.digest).bit_count() <= NEAR
            and (difference := _difference(some[near], seen)) <= LIKE
        ]
        if alike:
            pairs.append((min(alike)[1], place))
    return pairs


def _difference(one: Seen, other: Seen) -> float:
    assert one.small is not None and other.small is not None
    return float(np.abs(one.small.astype(np.int16) - other.small).mean())
