"""What a classifier gets right and wrong, as numbers. scikit-learn computes all but the calibration error."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import UserError

BINS = 15  # of the calibration error: Guo et al., On Calibration of Modern Neural Networks, 2017
TOP = 3  # classes kept of each image


@dataclasses.dataclass
class Scores:
    """Numbers of N images and C classes.

    Attributes:
        names: C class names.
        targets, places: (N,) int64; the true class, and the image's place in the data set.
        top_classes, top_scores: (N, <= 3) most probable classes and their softmax probabilities, best first.
        per_class: precision, recall and F1 in percent (NaN where undefined) and support, (C,) each.
        averages: the same without support, as macro and weighted averages.
        confusion: (C, C) int64, true class by predicted class.
        ece: expected calibration error in percent, 15 bins of equal width.
        reliability: of every bin that is not empty: number of images, their mean score and accuracy in percent.
    """

    names: list[str]
    targets: np.ndarray
    places: np.ndarray
    top_classes: np.ndarray
    top_scores: np.ndarray
    per_class: dict[str, np.ndarray]
    averages: dict[str, dict[str, float]]
    confusion: np.ndarray
    ece: float
    reliability: dict[str, np.ndarray]

    @property
    def predicted(self) -> np.ndarray:
        return self.top_classes[:, 0]

    @property
    def scores(self) -> np.ndarray:
        return self.top_scores[:, 0]

    @property
    def correct(self) -> np.ndarray:
        return self.predicted == self.targets


def best_classes(logits: torch.Tensor) -> torch.Tensor:
    """Classes (N, <= 5) of logits (N, C), best first, as timm's accuracy takes them, of ties too.

    Probabilities are tied where logits are not: they are rounded near 1, and vanish far below.
    """
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def measure(logits: torch.Tensor, targets: torch.Tensor, places: torch.Tensor, names: Sequence[str]) -> Scores:
    """All numbers of a report from logits (N, C) and targets (N,) on the CPU.

    Raises:
        UserError: some logits are not finite, there is no image, or a target is no class of the model's.
    """
    from sklearn.metrics import confusion_matrix

    if not len(targets):
        raise UserError('no image could be read: no report')
    broken = int((~torch.isfinite(logits).all(dim=1)).sum())
    if broken:
        raise UserError(f'the model returns values that are not finite for {broken} of {len(logits)} images: no report')
    count = logits.shape[1]
    if int(targets.max()) >= count:
        raise UserError(f'the data set has label {int(targets.max())}, but the model {count} classes')
    names = [*names[:count], *map(str, range(len(names), count))]
    best = best_classes(logits)[:, :TOP]
    top_scores, top_classes = logits.softmax(dim=1).gather(1, best).numpy(), best.numpy()
    labels, predicted = targets.numpy(), top_classes[:, 0]
    reliability = _reliability(predicted == labels, top_scores[:, 0])
    return Scores(
        names, labels, places.numpy(), top_classes, top_scores,
        *_precision_and_recall(labels, predicted, count),
        confusion=confusion_matrix(labels, predicted, labels=np.arange(count)),
        ece=float(np.average(abs(reliability['score'] - reliability['accuracy']), weights=reliability['count'])),
        reliability=reliability,
    )  # fmt: skip


def _precision_and_recall(
    targets: np.ndarray, predicted: np.ndarray, count: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    from sklearn.metrics import precision_recall_fscore_support

    columns = ('precision', 'recall', 'f1')
    *values, support = precision_recall_fscore_support(
        targets, predicted, labels=np.arange(count), average=None, zero_division=np.nan
    )
    per_class = {**{name: 100 * value for name, value in zip(columns, values)}, 'support': support.astype(np.int64)}
    averages = {}
    for average in ('macro', 'weighted'):
        values = precision_recall_fscore_support(targets, predicted, average=average, zero_division=0)[:3]
        averages[average] = {name: 100 * float(value) for name, value in zip(columns, values)}
    return per_class, averages


def _reliability(correct: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], scores)
    count = np.bincount(bins, minlength=BINS)
    used = count > 0
    means = [np.bincount(bins, weights=values, minlength=BINS)[used] / count[used] for values in (scores, correct)]
    return {'count': count[used], 'score': 100 * means[0], 'accuracy': 100 * means[1]}


def confused_pairs(scores: Scores, limit: int) -> tuple[list[dict[str, Any]], int, int]:
    """At most `limit` pairs of classes that are confused most; how many others there are, and the most images of one.

    Of pairs that are tied at the end of the list none is in it, nor is a pair that is confused once. A pair has true
    and predicted class, images, and percent of the true class.
    """
    mistakes = scores.confusion * ~np.eye(len(scores.names), dtype=bool)
    order = np.argsort(-mistakes, axis=None, kind='stable')[: np.count_nonzero(mistakes)]
    counts = mistakes.ravel()[order]
    bound = int(counts[limit]) if len(counts) > limit else 1
    listed = order[counts > bound]
    pairs = [
        {
            'true': scores.names[true],
            'predicted': scores.names[predicted],
            'count': int(mistakes[true, predicted]),
            'percent': 100 * float(mistakes[true, predicted] / scores.per_class['support'][true]),
        }
        for true, predicted in zip(*np.unravel_index(listed, mistakes.shape))
    ]
    return pairs, len(order) - len(listed), bound


def normalized(confusion: np.ndarray) -> np.ndarray:
    """Rows in percent of their class; NaN for a class without images."""
    support = confusion.sum(axis=1, keepdims=True)
    return np.divide(100.0 * confusion, support, out=np.full(confusion.shape, np.nan), where=support > 0)
