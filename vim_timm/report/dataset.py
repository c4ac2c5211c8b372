"""The page of a data set: what it holds, what cannot be read, one picture a class, and what a model will see of it."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.data.loader import adapt_to_chs

from ..data import Batch
from ..data.survey import Seen, near_duplicates
from ..files import printable
from . import page
from .samples import as_picture

PICTURES, PAIRS, LISTED = 120, 24, 300  # classes with a picture, pairs of duplicates, lines of a list
SIDES = (32, 64, 128, 224, 384, 640, 1280)  # of the shorter side, between which images are counted


@dataclasses.dataclass
class Split:
    """One split of a data set, and what was found of its images.

    Attributes:
        line: what a run says of it.
    """

    name: str
    dataset: Any
    found: Sequence[Seen]
    line: str

    def file(self, place: int) -> str:
        """Name of an image: its path where the data set has one, else its place."""
        name = self.dataset.filename(place) if hasattr(self.dataset, 'filename') else ''
        return printable(str(name or place))

    def picture(self, place: int) -> Any:
        """An image as PIL."""
        return as_picture(self.dataset[place][0])

    @property
    def passed_over(self) -> Mapping[str, Sequence[str]]:
        return getattr(getattr(self.dataset, 'reader', None), 'passed_over', {})


def dataset_page(title: str, splits: Sequence[Split], names: Sequence[str], batch: Batch, data_config: Any) -> str:
    """The page of a data set.

    Args:
        splits: of training, then of evaluation.
        names: of the classes, by number.
        batch: the first one of training.
        data_config: timm's settings of its images.
    """
    pairs = near_duplicates(splits[0].found, splits[1].found)
    unread = [(split, place) for split in splits for place, seen in enumerate(split.found) if seen.error]
    passed = {file: why for split in splits for why, files in split.passed_over.items() for file in files}
    tiles = {f'images to {use}': f'{len(split.found):,}' for split, use in zip(splits, ('train on', 'evaluate on'))}
    tiles.update({'classes': f'{len(names):,}', 'unreadable': f'{len(unread):,}', 'passed over': f'{len(passed):,}'})
    tiles['evaluation images much like a training image'] = f'{len(pairs):,}'
    body = [
        f'<h1>{page.escape(title)}</h1>',
        '<nav><a href="#classes">Classes</a><a href="#sizes">Sizes</a><a href="#batch">First batch</a>'
        '<a href="#alike">Near-duplicates</a><a href="#files">Files</a></nav>',
        page.tiles(tiles) + '<br>',
        *(f'<p>{page.escape(split.line)}</p>' for split in splits),
        '<h2 id="classes">Classes</h2>',
        *_classes(splits, names),
        '<h2 id="sizes">Sizes</h2>',
        *_sizes(splits, data_config['input_size']),
        '<h2 id="batch">The first training batch, as the model sees it</h2>',
        *_batch(batch, names, data_config),
        '<h2 id="alike">Near-duplicates between the splits</h2>',
        *_alike(splits, names, pairs),
        '<h2 id="files">Files that are no data</h2>',
        *_files(unread, passed),
    ]
    return page.page(title, body)


def _classes(splits: Sequence[Split], names: Sequence[str]) -> Iterator[str]:
    if not names:
        yield '<p>There are no class folders: nothing to learn but the images themselves.</p>'
        return
    counts = [Counter(seen.label for seen in split.found if not seen.error) for split in splits]
    numbers = [counts[0][label] for label in range(len(names))]
    if min(numbers):
        yield (
            f'<p>From {min(numbers):,} to {max(numbers):,} readable images of a class in training: the largest has '
            f'{max(numbers) / min(numbers):.1f} times those of the smallest.</p>'
        )
    else:
        yield f'<p>{numbers.count(0)} classes have no readable image in training.</p>'
    rows = ((place, printable(name), *(count[place] for count in counts)) for place, name in enumerate(names))
    listing = page.table(['#', 'class', *(split.name for split in splits)], rows, text=2)
    yield f'<div class="card narrow">{listing}</div>'
    first = {seen.label: place for place, seen in reversed(list(enumerate(splits[0].found))) if not seen.error}
    shown = [(label, first[label]) for label in range(len(names)) if label in first][:PICTURES]
    yield f'<br><h3>One picture a class{f", the first {PICTURES} classes" if len(names) > PICTURES else ""}</h3>'
    yield _cards((splits[0].picture(place), names[label], splits[0].file(place)) for label, place in shown)


def _cards(pictures: Iterable[tuple[Any, str, str]]) -> str:
    """Cards of (picture, line below it, what a mouse over it shows)."""
    cards = (
        f'<div class="sample">{page.picture(image, title)}'
        f'<div class="name"><span>{page.escape(printable(text))}</span></div></div>'
        for image, text, title in pictures
    )
    return f'<div class="samples">{"".join(cards)}</div>'


def _sizes(splits: Sequence[Split], input_size: Sequence[int]) -> Iterator[str]:
    seen = [seen for split in splits for seen in split.found if not seen.error]
    if not seen:
        yield '<p>No image could be read.</p>'
        return
    short = sorted(min(one.width, one.height) for one in seen)
    small = sum(side < min(input_size[1:]) for side in short)
    spread = f'{short[0]} to {short[-1]} pixels, {short[len(short) // 2]} in the middle'
    yield (
        f'<p>The shorter side is {spread if short[0] < short[-1] else f"{short[0]} pixels in every image"}; the model '
        f'takes {input_size[2]} x {input_size[1]}, and {f"{small:,}" if small else "none"} of {len(short):,} '
        f'{"is" if small < 2 else "are"} smaller than that, and enlarged.</p>'
    )
    turned = sum(one.turned for split in splits for one in split.found)
    if turned:
        yield (
            f'<p>{turned:,} of them {"has" if turned == 1 else "have"} an orientation in EXIF data, which is not '
            'applied, as in timm: turn such pictures first (mogrify -auto-orient FILE).</p>'
        )
    edges = [0, *SIDES, max(short[-1] + 1, SIDES[-1])]
    counts = [
        (f'{low} to {high - 1}', sum(low <= side < high for side in short)) for low, high in zip(edges, edges[1:])
    ]
    sides = page.table(['shorter side', 'images'], (row for row in counts if row[1]))
    common = Counter((one.width, one.height) for one in seen).most_common(10)
    frequent = page.table(
        ['most frequent', 'images'], ((f'{width} x {height}', count) for (width, height), count in common)
    )
    yield f'<div class="columns"><div class="card">{sides}</div><div class="card">{frequent}</div></div>'


def _batch(batch: Batch, names: Sequence[str], data_config: Any) -> Iterator[str]:
    yield (
        '<p>After random crop, flip, colour and erasing, back from the normalization; mixup and cutmix come later. Is '
        'the object still there, and its class to be told?</p>'
    )
    channels = batch.images.shape[1]
    mean, std = (torch.tensor(adapt_to_chs(data_config[key], channels)).view(-1, 1, 1) for key in ('mean', 'std'))
    pictures = (batch.images.float().cpu() * std + mean).clamp(0, 1)
    labels = batch.targets.tolist() if batch.targets.ndim == 1 else [-1] * len(pictures)
    texts = [names[label] if 0 <= label < len(names) else '' for label in labels]
    yield _cards((as_picture(image), text, text) for image, text in zip(pictures, texts))


def _alike(splits: Sequence[Split], names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
    if not pairs:
        yield '<p>None: no image to evaluate on looks like one that is trained on.</p>'
        return
    yield (
        f'<p>{len(pairs):,} images to evaluate on look like a training image (by hash): copies, or pictures of one '
        'scene. They make the accuracy look better than it is. Put pictures of one scene into one split.</p>'
    )
    cards = ''.join(_pair(splits, names, pair) for pair in pairs[:PAIRS])
    yield f'<div class="samples pairs">{cards}</div>'
    rows = [(splits[0].file(near), splits[1].file(place)) for near, place in pairs[:LISTED]]
    yield f'<br><div class="card">{page.table([split.name for split in splits], rows, text=2)}</div>'


def _pair(splits: Sequence[Split], names: Sequence[str], pair: tuple[int, int]) -> str:
    """A card of a training image and an evaluation image."""
    parts = []
    for split, place in zip(splits, pair):
        label = split.found[place].label
        name = names[label] if label is not None and 0 <= label < len(names) else ''
        parts.append(
            f'<div>{page.picture(split.picture(place), split.file(place))}'
            f'<div class="name"><span>{page.escape(printable(f"{split.name}: {name}"))}</span></div></div>'
        )
    return f'<div class="sample pair">{"".join(parts)}</div>'


def _files(unread: Sequence[tuple[Split, int]], passed: Mapping[str, str]) -> Iterator[str]:
    rows = [(split.file(place), f'cannot be read: {split.found[place].error}') for split, place in unread]
    rows += [(printable(file), f'passed over: {why}') for file, why in sorted(passed.items())]
    if not rows:
        yield '<p>Every file is an image that can be read.</p>'
        return
    rest = f'<p>The first {LISTED} of {len(rows):,}.</p>' if len(rows) > LISTED else ''
    yield f'{rest}<div class="card">{page.table(["file", "why"], rows[:LISTED], text=2)}</div>'
