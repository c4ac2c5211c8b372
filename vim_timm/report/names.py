"""Names of classes as a report shows them."""

from collections import Counter

from timm.data import ImageNetInfo

from ..data.classes import is_wordnet_id


def words(names: list[str]) -> list[str]:
    """Class names to show: words for WordNet ids, as they are else."""
    if not any(map(is_wordnet_id, names)):
        return names
    info = ImageNetInfo()
    found = []
    for name in names:
        try:
            found.append(info.label_name_to_description(name).split(',')[0])
        except KeyError:  # no WordNet id
            found.append(name)
    seen = Counter(found)  # there are two cranes in ImageNet
    return [word if seen[word] == 1 else f'{word} ({name})' for word, name in zip(found, names)]
