"""Class names and numbers: a class is known by its name, in training, in evaluation and in a checkpoint."""

import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data.readers.class_map import load_class_map
from torch.utils.data import Dataset, IterableDataset

from ..errors import UserError, explain


def class_names(dataset: Any) -> list[str]:
    """Class names of a data set by number, as far as it tells; else an empty list."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        if names := getattr(owner, 'classes', None):  # torchvision's ImageNet has tuples of synonyms
            return [name if isinstance(name, str) else ', '.join(map(str, name)) for name in names]
        if indices := getattr(owner, 'class_to_idx', None):
            return _by_number(indices)
    return []


def is_wordnet_id(name: str) -> bool:
    """Whether it is such a name as those of ImageNet's folders: n01440764."""
    return name[:1] == 'n' and name[1:].isdecimal() and len(name) == 9


def _by_number(indices: Mapping[Any, int]) -> list[str]:
    names: dict[int, str] = {}
    for name, index in indices.items():
        names.setdefault(index, str(name))
    return [names.get(index, str(index)) for index in range(max(names) + 1)]


def read_class_map(path: str, root: str | None) -> dict[Any, int]:
    """Class numbers by name, from a text file with a name a line or a pickled dictionary. Nothing in it is executed.

    Args:
        root: folder of the data set, where a relative path is looked up as well.

    Raises:
        UserError: it cannot be read, or does not number classes.
    """
    with explain(f'--class-map {path}'):
        if not path.endswith('.txt'):
            indices = load_class_map(path, root or '')
            if not indices or not all(isinstance(index, int) and index >= 0 for index in indices.values()):
                raise ValueError('it must map class names to whole numbers from 0')
            return indices
        with open(path if os.path.exists(path) else os.path.join(root or '', path), encoding='utf-8-sig') as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
        name, count = Counter(names).most_common(1)[0] if names else ('', 0)
        if count != 1:
            raise ValueError(f'the class {name!r} is in it {count} times' if count else 'it names no class')
        return {name: number for number, name in enumerate(names)}


def read_valid_labels(path: str) -> list[int]:
    """A model's class numbers in the order of a data set's classes, from a text file with a number a line.

    Raises:
        UserError: it cannot be read, or does not name different classes.
    """
    with explain(f'--valid-labels {path}'), open(path, encoding='utf-8-sig') as file:
        labels = [int(line) for line in file.read().split('\n') if line.strip()]
        number, count = Counter(labels).most_common(1)[0] if labels else (0, 0)
        if count != 1:
            raise ValueError(f'the class {number} is in it {count} times' if count else 'it names no class')
        return labels


def renumbered(dataset: Any, known: Sequence[str], what: str, where: str) -> Any:
    """The data set with its classes numbered as they are in `known`; as it is, where one of the two names no classes.

    Args:
        what, where: the data set, and what knows the classes, for the message.

    Raises:
        UserError: it has a class that is not known. It would be scored as another one.
    """
    names = class_names(dataset)
    if not names or not known or names == list(known):
        return dataset
    foreign = [name for name in names if name not in known]
    if foreign or len(set(names)) < len(names) or len(set(known)) < len(known):
        which = f'the class {foreign[0]!r}' if foreign else 'other classes'
        raise UserError(
            f'{what} has {which} (of {_shown(names)}), which {where} does not know (it has {_shown(known)}): rename '
            'class folders, or give the same --class-map in training and evaluation'
        )
    numbers = [known.index(name) for name in names]
    if isinstance(dataset, IterableDataset):
        dataset.target_transform = Numbers(numbers)  # type: ignore[attr-defined]
        return dataset
    return Renumbered(dataset, Numbers(numbers), list(known))


def _shown(names: Sequence[str], most: int = 5) -> str:
    return ', '.join(map(repr, names[:most])) + (f' and {len(names) - most} more' if len(names) > most else '')


class Numbers:
    """A data set's class number -> the number that is meant; what is no class (-1) stays."""

    def __init__(self, numbers: Sequence[int]):
        self.numbers = numbers

    def __call__(self, target: Any) -> int:
        try:
            number = operator.index(target)
        except TypeError as error:
            raise UserError('the splits name other classes, and their targets are no class numbers') from error
        return self.numbers[number] if number >= 0 else number


class Renumbered(Dataset):
    """A data set whose classes have other numbers."""

    def __init__(self, dataset: Any, numbers: Numbers, classes: list[str]):
        self.dataset: Any = dataset
        self.numbers, self.classes = numbers, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        return image, self.numbers(target)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)
