"""The page of a classifier's evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import page
from .chart import MEANINGS, Line, charts
from .confusion import SHOWN, WHOLE, matrix
from .curves import panels
from .metrics import Scores

UNDEFINED = (
    'A class without images has no recall, and one that is never predicted no precision (–). Where a class has images '
    'or is predicted such a number counts as zero in the averages, as in scikit-learn; another class does not count.'
)


def classification_page(
    evaluation: Any, pairs: tuple[Sequence[Mapping[str, Any]], int, int],
    shown: Mapping[str, Sequence[Mapping[str, Any]]], per_class: bytes,
    picture: Callable[[int], tuple[str, int, int] | None],
) -> str:  # fmt: skip
    """The page.

    Args:
        evaluation: an `Evaluation`.
        pairs, shown: of `confused_pairs`; of the samples, right and wrong.
        per_class: the plot of precision, recall and F1.
        picture: see `confusion.matrix`.
    """
    row, facts, scores = evaluation.row, evaluation.facts, evaluation.scores
    title = f'Evaluation of {row["model"]}'
    training = '<a href="#training">Training</a>' if evaluation.history else ''
    body = [
        f'<h1>{page.escape(title)}</h1>',
        '<nav><a href="#classes">Classes</a><a href="#confusion">Confusion</a><a href="#samples">Samples</a>'
        f'<a href="#calibration">Calibration</a>{training}<a href="#settings">Settings</a></nav>',
        page.tiles(_headline(row, facts, scores)),
        '<h2 id="classes">Classes</h2>',
        _classes(scores, per_class),
        '<h2 id="confusion">Confusion</h2>',
        *_confusion(scores, pairs, matrix(scores, evaluation.file, picture)),
        '<h2 id="samples">Samples</h2>',
        *_samples(shown),
        '<h2 id="calibration">Calibration</h2>',
        '<p>Where the line is below the diagonal the model is surer than it is right. The expected calibration error '
        'is the mean gap over 15 bins, weighted by their images; a marker is as large as its bin is full.</p>',
        _calibration(scores),
    ]
    if evaluation.history:
        body += ['<h2 id="training">Training</h2>', charts(panels(evaluation.history))]
    settings = page.table(['name', 'value'], {**facts, **row}.items(), text=2)
    return page.page(title, [*body, '<h2 id="settings">Settings</h2>', f'<div class="card">{settings}</div>'])


def _headline(row: Mapping[str, Any], facts: Mapping[str, Any], scores: Scores) -> dict[str, str]:
    return {
        'top-1 accuracy': f'{row["top1"]:.2f} %',
        'top-5 accuracy': f'{row["top5"]:.2f} %',
        'macro F1': f'{scores.averages["macro"]["f1"]:.2f} %',
        'calibration error': f'{scores.ece:.2f} %',
        'images': f'{row["count"]:,}',
        'classes': f'{len(scores.names):,}',
        'images a second': f'{facts["images_per_second"]:,.0f}',
        'parameters': f'{row["param_count"]:,.2f} M',
    }


def _classes(scores: Scores, png: bytes) -> str:
    columns = [values.tolist() for values in scores.per_class.values()]
    rows = zip(map(str, range(len(scores.names))), scores.names, *columns)
    support = int(scores.per_class['support'].sum())
    averages = [('', f'{name} average', *values.values(), support) for name, values in scores.averages.items()]
    listing = page.table(['#', 'class', 'precision', 'recall', 'F1', 'images'], rows, text=2, totals=averages)
    missing = any(np.isnan(scores.per_class[name]).any() for name in ('precision', 'recall'))
    text = f'<p>{UNDEFINED}</p>' if missing else ''
    figure = page.figure(png, 'precision, recall and F1')
    return f'{text}<div class="columns">{figure}<div class="card">{listing}</div></div>'


def _confusion(scores: Scores, pairs: tuple[Sequence[Mapping[str, Any]], int, int], matrix: str) -> Iterable[str]:
    count = len(scores.names)
    text = 'Rows are true classes, columns predicted ones; blue is right, orange is wrong. Click a cell: its pictures.'
    if count > WHOLE:
        text += (
            f' The map has all {count:,} classes, those that are confused with each other side by side; the table '
            f'the {SHOWN} that are confused most, or a class that you name and what it is confused with.'
        )
    yield f'<p>{text}</p><div class="card">{matrix}</div>'
    listed, rest, most = pairs
    if not listed and not rest:
        yield '<p>No image is wrong.</p>'
        return
    yield '<h2>Most confused</h2>'
    if listed:
        rows = [(pair['true'], pair['predicted'], pair['count'], pair['percent']) for pair in listed]
        listing = page.table(['true', 'predicted', 'images', '% of true class'], rows, text=2)
        yield f'<div class="card narrow">{listing}</div>'
    if rest:
        times = 'once' if most == 1 else f'at most {most:,} times, many of them equally often'
        pairs_are = 'pair is' if rest == 1 else 'pairs are'
        yield f'<p>{rest:,} {"further " if listed else ""}{pairs_are} confused {times}: see confusion_matrix.csv.</p>'


def _samples(shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    if not any(shown.values()):
        yield '<p>A streamed data set has no pictures to go back to.</p>'
        return
    texts = {'wrong': 'Wrong, most confident first', 'right': 'Right, drawn at random'}
    for kind, text in texts.items():
        cards = ''.join(_sample(sample) for sample in shown[kind]) or '<p>none</p>'
        yield f'<h3>{text}</h3><div class="samples">{cards}</div><br>'


def _sample(sample: Mapping[str, Any]) -> str:
    lines = []
    for place, guess in enumerate(sample['predicted']):
        kind = 'true' if guess['class'] == sample['true'] else 'first' if place == 0 else ''
        lines.append(page.bar(guess['class'], guess['score'], kind))
    true = page.escape(sample['true'])
    return (
        f'<div class="sample {"right" if sample["right"] else "wrong"}">'
        f'{page.picture(sample["picture"], sample["image"])}'
        f'<div class="name"><span title="{true}">true: <b>{true}</b></span></div>{"".join(lines)}</div>'
    )


def _calibration(scores: Scores) -> str:
    bins = scores.reliability
    counts, score, accuracy = (bins[name].tolist() for name in ('count', 'score', 'accuracy'))
    whole = [[-2, 102], [-2, 102]]
    lines = [
        Line('perfectly calibrated', MEANINGS['soft'], [0, 100], [0, 100], dashed=True, bare=True),
        Line(
            'accuracy', MEANINGS['text'], score, accuracy, radius=marker_sizes(bins['count'], 12).tolist(),
            note=[f'{count:,} images' for count in counts],
        ),
    ]  # fmt: skip
    chart = charts({'accuracy (%) by score (%)': lines}, 'score', ranges={'accuracy (%) by score (%)': whole})
    rows = ([f'{mean:.1f}', f'{right:.1f}', count] for mean, right, count in zip(score, accuracy, counts))
    listing = page.table(['mean score (%)', 'accuracy (%)', 'images'], rows, text=0)
    return f'<div class="columns">{chart}<div class="card">{listing}</div></div>'


def marker_sizes(counts: np.ndarray, largest: float) -> np.ndarray:
    """Radius of each bin's marker, whose area is in proportion to its images, but never too small to see."""
    return np.maximum(1.5, largest * np.sqrt(counts / counts.max()))
