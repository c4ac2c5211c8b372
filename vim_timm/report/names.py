"""Names of a data set's classes."""

from collections import Counter
from typing import Any

from timm.data import ImageNetInfo


def class_names(dataset: Any) -> list[str]:
    """Class names in the order of their labels, as far as the data set tells; WordNet ids as words."""
    for owner in (dataset, getattr(dataset, 'reader', None)):
        if names := getattr(owner, 'classes', None):
            return _words([str(name) for name in names])
        indices = getattr(owner, 'class_to_idx', None)
        if indices:
            names = {index: str(name) for name, index in indices.items()}
            return _words([names.get(index, str(index)) for index in range(max(names) + 1)])
    return []


def _words(names: list[str]) -> list[str]:
    if not any(name[:1] == 'n' and name[1:].isdecimal() and len(name) == 9 for name in names):
        return names
    info = ImageNetInfo()
    words = []
    for name in names:
        try:
            words.append(info.label_name_to_description(name).split(',')[0])
        except KeyError:  # no WordNet id
            words.append(name)
    seen = Counter(words)  # there are two cranes in ImageNet
    return [word if seen[word] == 1 else f'{word} ({name})' for word, name in zip(words, names)]
