"""The confusion matrix of a page: which classes it shows, in which order, and the pictures of its cells."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import page
from .metrics import Scores

WHOLE, SHOWN = 25, 20  # classes up to which all are shown; else so many of those that are confused most
PICTURES, A_CELL, FILES = 600, 8, 5000  # pictures in a page, of one cell; files of wrong predictions that are named


def balanced(confusion: np.ndarray) -> bool:
    """Whether all classes have as many images, so that counts and percentages are the same picture."""
    return len(set(confusion.sum(axis=1).tolist())) == 1


def clustered(confusion: np.ndarray) -> list[int]:
    """Classes (C,) in an order in which those that are confused with each other stand together.

    Average linkage over how often two classes are taken for each other; the order of their numbers where none are.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    count = len(confusion)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    alike = (shares + shares.T) * ~np.eye(count, dtype=bool)
    if count < 3 or not alike.any():
        return list(range(count))
    return leaves_list(linkage(squareform(alike.max() - alike, checks=False), 'average')).tolist()


def most_confused(confusion: np.ndarray, order: Sequence[int], limit: int = SHOWN) -> list[int]:
    """At most `limit` classes, in `order`: those of the pairs that are taken for each other most often."""
    mistakes = np.triu(confusion + confusion.T, 1)
    chosen: dict[int, None] = {}
    for place in np.argsort(-mistakes, axis=None, kind='stable')[: limit * limit]:
        pair = [int(index) for index in np.unravel_index(place, mistakes.shape)]
        if not mistakes[pair[0], pair[1]] or len(chosen | dict.fromkeys(pair)) > limit:
            break
        chosen.update(dict.fromkeys(pair))
    chosen = chosen or dict.fromkeys(order[:limit])
    return [index for index in order if index in chosen]


def view(confusion: np.ndarray) -> tuple[list[int], list[int]]:
    """The order of all classes, and the classes that are shown with names and numbers."""
    if len(confusion) <= WHOLE:
        return list(range(len(confusion))), list(range(len(confusion)))
    order = clustered(confusion)
    return order, most_confused(confusion, order)


def matrix(scores: Scores, file: Callable[[int], str], picture: Callable[[int], tuple[str, int, int] | None]) -> str:
    """The matrix as HTML; a click on a cell shows its pictures.

    Args:
        file: name of the image at a place of the data set.
        picture: (source, factor by which it is enlarged, width) of the image at a place; None where there is none.
    """
    order, shown = view(scores.confusion)
    true, predicted = np.nonzero(scores.confusion)
    cells = np.stack([true, predicted, scores.confusion[true, predicted]], axis=1)
    return page.live(
        'confusion-data',
        {
            'names': scores.names,
            'support': scores.confusion.sum(axis=1).tolist(),
            'cells': cells.ravel().tolist(),
            'order': order,
            'shown': shown,
            'limit': SHOWN,
            'balanced': balanced(scores.confusion),
            'pictures': _pictures(scores, shown, file, picture),
        },
    )


def _pictures(
    scores: Scores, shown: Sequence[int], file: Callable[[int], str],
    picture: Callable[[int], tuple[str, int, int] | None],
) -> dict[str, list[list[Any]]]:  # fmt: skip
    """Cell -> [file, score in percent, picture or None, factor, width] of some of its images."""
    rows_of: dict[tuple[int, int], list[int]] = {}
    sure = np.where(scores.correct, scores.scores, -scores.scores)  # wrong ones most confident first, right ones last
    for row in np.argsort(sure, kind='stable').tolist():
        rows_of.setdefault((int(scores.targets[row]), int(scores.predicted[row])), []).append(row)

    def rank(cell: tuple[int, int]) -> tuple[bool, bool, int]:
        return not set(cell) <= set(shown), cell[0] == cell[1], -len(rows_of[cell])

    cells = sorted(rows_of, key=rank)
    first = [cell for cell in cells if not rank(cell)[0]]
    wanted = [(cell, place) for place in range(A_CELL) for cell in first if place < len(rows_of[cell])]
    wanted += [(cell, place) for cell in cells[len(first) :] for place in range(min(A_CELL, len(rows_of[cell])))]
    found: dict[str, list[list[Any]]] = {}
    pictured, named = 0, 0
    for cell, place in wanted:
        row, drawn = rows_of[cell][place], None
        index = int(scores.places[row])
        if pictured < PICTURES:
            drawn = picture(index)
            pictured += drawn is not None
        if drawn is None and (cell[0] == cell[1] or named >= FILES):
            continue
        named += drawn is None
        entry = [file(index), round(100 * float(scores.scores[row]), 2), *(drawn or (None, 1, 0))]
        found.setdefault(f'{cell[0]},{cell[1]}', []).append(entry)
    return found
