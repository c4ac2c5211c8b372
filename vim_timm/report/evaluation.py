"""`validate.py --report FOLDER`: numbers, tables, pictures and the page of one evaluation."""

import csv
import dataclasses
import fnmatch
import io
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..errors import explain
from ..files import printable, to_json, write_atomically
from . import plots, samples
from .classification import classification_page
from .confusion import balanced, view
from .metrics import Scores, confused_pairs, normalized

PICTURES, PAIRS = 24, 30  # right pictures, wrong pictures; confused pairs
CELL_SIDE = 112  # pixels of the longer side of a picture behind a cell of the confusion matrix


@dataclasses.dataclass
class Evaluation:
    """What a report tells of: an evaluation's result row, its settings, and the scores of its images.

    Attributes:
        row: validate.py's result row.
        facts: further lines for the summary, by name, such as the data set and the hardware.
        dataset: where pictures and file names come from.
        history: the log of the training that made the weights, a row an epoch, where it is known.
    """

    row: Mapping[str, Any]
    facts: Mapping[str, Any]
    scores: Scores
    dataset: Any
    history: Sequence[Mapping[str, Any]] = ()

    def file(self, place: int) -> str:
        """Name of an image: its path where the data set has one, else its place."""
        reader: Any = getattr(self.dataset, 'reader', None)
        return printable(str(reader.filename(place) if hasattr(reader, 'samples') else place))

    def cell_picture(self, place: int) -> tuple[str, int, int] | None:
        """An image as the confusion matrix shows it: (source, factor by which it is enlarged, width)."""
        image = samples.read(self.dataset, place)
        return None if image is None else (
            samples.embedded(image, CELL_SIDE), samples.enlargement(image), image.width,
        )  # fmt: skip


def open_folder(folder: str) -> None:
    """Make the folder of a report, before an evaluation that may take long."""
    with explain(f'--report {folder}'):
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError('the folder cannot be written to')


def remove_earlier(folder: str, patterns: Iterable[str], files: Collection[str]) -> None:
    """Remove from a folder the files of an earlier report that match a pattern and are not among those of this one."""
    for name in os.listdir(folder):
        if name not in files and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            os.remove(os.path.join(folder, name))


def write_report(folder: str, evaluation: Evaluation) -> None:
    """Write a report's files into a folder, each whole or not at all, `report.html` last."""
    open_folder(folder)
    scores = evaluation.scores
    pairs = confused_pairs(scores, PAIRS)
    shown = {
        kind: _pictures(evaluation, rows) for kind, rows in zip(('right', 'wrong'), samples.choose(scores, PICTURES))
    }
    pngs = _figures(scores, shown)
    files: dict[str, str | bytes] = {
        'report.json': to_json(_summary(evaluation, pairs[0], shown)),
        'per_class.csv': _csv(
            ['label', 'class', *scores.per_class],
            zip(range(len(scores.names)), scores.names, *map(_rounded, scores.per_class.values())),
        ),
        'confusion_matrix.csv': _csv(
            ['true \\ predicted', *scores.names],
            ([name, *row] for name, row in zip(scores.names, scores.confusion.tolist())),
        ),
        'predictions.csv': _csv(['image', 'true', 'predicted', 'score', 'right'], _predictions(evaluation)),
        **{f'{name}.png': png for name, png in pngs.items()},
    }
    files['report.html'] = classification_page(evaluation, pairs, shown, pngs['per_class'], evaluation.cell_picture)
    remove_earlier(folder, ('confusion_matrix_normalized.png', 'samples_right.png', 'samples_wrong.png'), files)
    for name, content in files.items():
        write_atomically(os.path.join(folder, name), content)


def _pictures(evaluation: Evaluation, rows: Iterable[int]) -> list[dict[str, Any]]:
    """What the report shows of these images: picture, file, true class, best classes with their scores in percent."""
    scores, found = evaluation.scores, []
    for row in rows:
        image = samples.read(evaluation.dataset, int(scores.places[row]))
        if image is None:
            break
        best = zip(scores.top_classes[row].tolist(), scores.top_scores[row].tolist())
        found.append(
            {
                'picture': image,
                'image': evaluation.file(int(scores.places[row])),
                'true': scores.names[scores.targets[row]],
                'predicted': [{'class': scores.names[index], 'score': round(100 * score, 2)} for index, score in best],
                'right': bool(scores.correct[row]),
            }
        )
    return found


def _figures(scores: Scores, shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, bytes]:
    classes = view(scores.confusion)
    pngs = {
        'confusion_matrix': plots.confusion_matrix(scores.confusion, scores.names, False, *classes),
        'per_class': plots.per_class(scores),
        'reliability': plots.reliability(scores),
    }
    if not balanced(scores.confusion):  # else it would be the same picture
        shares = normalized(scores.confusion)
        pngs['confusion_matrix_normalized'] = plots.confusion_matrix(shares, scores.names, True, *classes)
    titles = {'right': 'Right predictions, drawn at random', 'wrong': 'Wrong predictions, most confident first'}
    for kind, pictures in shown.items():
        if pictures:
            pngs[f'samples_{kind}'] = plots.samples([_captioned(sample) for sample in pictures], titles[kind])
    return pngs


def _captioned(sample: Mapping[str, Any]) -> tuple[Image.Image, str, bool]:
    best = sample['predicted'][0]
    caption = f'{plots.shorten(best["class"], 18)}  {best["score"]:.1f} %'
    if not sample['right']:
        caption += f'\ntrue: {plots.shorten(sample["true"], 18)}'
    return sample['picture'], caption, sample['right']


def _summary(evaluation: Evaluation, pairs: Sequence[Any], shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict:
    scores = evaluation.scores
    columns = {name: _rounded(values) for name, values in scores.per_class.items()}
    return {
        'result': dict(evaluation.row),
        'facts': dict(evaluation.facts),
        'averages': scores.averages,
        'calibration': {
            'ece': scores.ece,
            'mean_score': 100 * float(scores.scores.mean()),
            'bins': {name: _rounded(values) for name, values in scores.reliability.items()},
        },
        'per_class': [
            {'class': name, **dict(zip(columns, values))} for name, *values in zip(scores.names, *columns.values())
        ],
        'confused_pairs': pairs,
        'samples': [
            {key: value for key, value in sample.items() if key != 'picture'}
            for kind in shown.values()
            for sample in kind
        ],
    }


def _predictions(evaluation: Evaluation) -> Iterable[list[Any]]:
    scores = evaluation.scores
    for place, target, predicted, score in zip(
        scores.places.tolist(), scores.targets.tolist(), scores.predicted.tolist(), scores.scores.tolist()
    ):
        names = scores.names[target], scores.names[predicted]
        yield [evaluation.file(place), *names, round(100 * score, 2), int(target == predicted)]


def _rounded(values: np.ndarray) -> list[Any]:
    """Plain numbers with two decimals; None for NaN."""
    return [None if value != value else round(value, 2) for value in values.tolist()]


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator='\n')
    writer.writerow(header)
    writer.writerows(rows)
    return table.getvalue()
