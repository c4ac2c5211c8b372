"""Figures as PNG files in memory, in one style. Blue is right or training, orange is wrong or evaluation."""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import Scores

RIGHT, WRONG, GREY = '#2f6db3', '#d9601a', '#6b7280'
COLOURS = (RIGHT, WRONG, '#2a9d6f', '#8a5cb8', '#b08a1e', GREY)
# Up to so many classes a confusion matrix has cells in their true size, every name on its axes, numbers in its cells.
LARGE, NAMED, WRITTEN = 200, 60, 25
STYLE: dict[Any, Any] = {
    'font.size': 10, 'axes.titlesize': 11, 'axes.titleweight': 'bold', 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.edgecolor': GREY, 'axes.grid': True, 'grid.color': '#e5e7eb',
    'grid.linewidth': 0.8, 'axes.axisbelow': True, 'xtick.color': '#374151', 'ytick.color': '#374151',
    'axes.labelcolor': '#111827', 'legend.frameon': False, 'text.parse_math': False,
    'savefig.dpi': 150, 'savefig.bbox': 'tight', 'figure.constrained_layout.use': True,
}  # fmt: skip


def shorten(name: str, length: int = 24) -> str:
    """A class name that fits on an axis."""
    return name if len(name) <= length else f'{name[: length - 1]}…'


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of this size in inches, without a window or global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height))


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return file.getvalue()


def confusion_matrix(matrix: np.ndarray, names: Sequence[str], percent: bool) -> bytes:
    """Heat map of a confusion matrix (C, C): of counts, or of each row in percent.

    What is right and what is wrong have a colour scale each, so that single mistakes are seen. A small matrix has names
    and numbers; cells of a very large one are drawn larger than they are.
    """
    count = len(names)
    matrix = np.nan_to_num(matrix.astype(float))
    cell = 0.36 if count <= WRITTEN else 0.16 if count <= NAMED else 0
    side = max(5.0 if count <= NAMED else 8.0, 1.5 + cell * count)
    with _figure(side + (0.8 if count > WRITTEN else 0), side) as figure:
        axes = figure.add_subplot()
        axes.set(xlabel='predicted class', ylabel='true class', xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
        axes.set_title(f'Confusion matrix, {"percent of each true class" if percent else "counts"}')
        axes.set_aspect('equal')
        axes.grid(False)
        diagonal = np.eye(count, dtype=bool)
        for part, mask, colours in (('wrong', ~diagonal, 'Oranges'), ('right', diagonal, 'Blues')):
            drawn = _cells(axes, np.where(mask, matrix, 0.0), colours)
            if count > WRITTEN and drawn is not None:
                bar = figure.colorbar(drawn, ax=axes, shrink=0.4, aspect=25, pad=0.02, format='%.3g')
                bar.set_label(f'{part}, {"% of the true class" if percent else "images"}')
                bar.outline.set_visible(False)
        _name_axes(axes, names)
        if count <= WRITTEN:
            _write_cells(axes, matrix, percent)
        return _png(figure)


def _cells(axes: Any, matrix: np.ndarray, colours: str) -> Any:
    """Draw the cells above zero, the largest last; returns what a colour bar needs, or None if there are none."""
    import matplotlib
    from matplotlib.colors import ListedColormap, PowerNorm

    rows, columns = np.nonzero(matrix)
    values = matrix[rows, columns]
    if not len(values):
        return None
    scale = ListedColormap(matplotlib.colormaps[colours](np.linspace(0.12, 0.95, 256)))
    norm = PowerNorm(0.7 if colours == 'Oranges' else 1, 0, values.max())  # most mistakes are few
    if len(matrix) <= LARGE:
        shown = np.ma.masked_equal(matrix, 0)
        return axes.imshow(shown, cmap=scale, norm=norm, interpolation='nearest', aspect='equal')
    order = values.argsort(kind='stable')
    size = 4 if colours == 'Oranges' else 1  # points squared; a thin diagonal leaves room for the mistakes beside it
    return axes.scatter(
        columns[order], rows[order], c=values[order], cmap=scale, norm=norm, s=size, marker='s', linewidths=0,
        clip_on=False,
    )  # fmt: skip


def _name_axes(axes: Any, names: Sequence[str]) -> None:
    count = len(names)
    if count > NAMED:
        step = -(-count // 200) * 10 if count > 200 else 5
        axes.set_xticks(range(0, count, step), range(0, count, step), rotation=90, fontsize=8)
        axes.set_yticks(
            range(0, count, step), [f'{shorten(names[i], 18)}  {i}' for i in range(0, count, step)], fontsize=8
        )
        return
    labels = [shorten(name, 18) for name in names]
    size = 10 if count <= WRITTEN else 7
    axes.set_xticks(range(count), labels, fontsize=size, rotation=90 if any(len(label) > 2 for label in labels) else 0)
    axes.set_yticks(range(count), labels, fontsize=size)
    axes.tick_params(length=0)


def _write_cells(axes: Any, matrix: np.ndarray, percent: bool) -> None:
    diagonal = matrix.diagonal().max()
    wrong = (matrix * ~np.eye(len(matrix), dtype=bool)).max()
    for (row, column), value in np.ndenumerate(matrix):
        if value > 0:
            text = f'{value:.0f}' if not percent or value >= 0.95 else f'{value:.1f}'
            dark = value > 0.6 * (diagonal if row == column else wrong)
            axes.text(column, row, text, ha='center', va='center', color='white' if dark else '#111827', fontsize=9)


def reliability(scores: Scores) -> bytes:
    """Accuracy against score in each bin, above the histogram of the scores."""
    bins = scores.reliability
    with _figure(6.4, 5.6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=GREY, linestyle='--', linewidth=1, label='perfectly calibrated')
        upper.plot(bins['score'], bins['accuracy'], color=RIGHT, marker='o', markersize=5, label='this model')
        upper.vlines(bins['score'], bins['score'], bins['accuracy'], color=WRONG, alpha=0.5, linewidth=3, label='gap')
        upper.set(ylabel='accuracy (%)', ylim=(-2, 102), xlim=(-2, 102))
        upper.set_title(f'Reliability: expected calibration error {scores.ece:.2f} %')
        upper.legend(loc='upper left')
        edges = np.linspace(0, 100, 31)
        correct = scores.correct
        lower.hist(
            [100 * scores.scores[correct], 100 * scores.scores[~correct]],
            bins=edges, stacked=True, color=[RIGHT, WRONG], label=['right', 'wrong'],
        )  # fmt: skip
        lower.set(xlabel='score of the predicted class (%)', ylabel='images')
        lower.legend(loc='upper left')
        return _png(figure)


def per_class(scores: Scores, limit: int = 40) -> bytes:
    """Bars of F1, with precision and recall, of the classes with the lowest F1."""
    f1 = scores.per_class['f1']
    order = [index for index in np.argsort(f1, kind='stable') if scores.per_class['support'][index]][:limit]
    with _figure(7.2, 1.4 + 0.24 * len(order)) as figure:
        axes, places = figure.add_subplot(), np.arange(len(order))
        axes.barh(places, f1[order], color=RIGHT, alpha=0.35, height=0.7, label='F1')
        for name, marker, colour in (('precision', '|', RIGHT), ('recall', '.', WRONG)):
            axes.plot(
                scores.per_class[name][order], places, marker, color=colour, markersize=9, markeredgewidth=2, label=name
            )
        axes.set_yticks(places, [shorten(scores.names[index], 32) for index in order])
        axes.set(xlabel='%', xlim=(0, 101), ylim=(len(order) - 0.4, -0.6))
        axes.grid(False, axis='y')
        axes.set_title(
            'Precision, recall and F1 of each class'
            if len(order) == len(f1)
            else f'The {len(order)} classes with the lowest F1'
        )
        figure.legend(ncols=3, loc='outside lower center')
        return _png(figure)


def samples(pictures: Sequence[tuple[Any, str, bool]], title: str, columns: int = 6) -> bytes:
    """A sheet of (PIL image, caption, right) with sharp pixels."""
    rows = -(-len(pictures) // columns)
    with _figure(1.8 * columns, 0.5 + 2.25 * rows) as figure:
        axes = figure.add_subplot(title=title, xlim=(0, columns), ylim=(1.25 * rows, 0))
        axes.axis('off')
        for place, (image, caption, right) in enumerate(pictures):
            row, column = divmod(place, columns)
            longest = max(image.size)
            width, height = (0.94 * side / longest for side in image.size)
            left, base = column + (1 - width) / 2, 1.25 * (row + 1)
            axes.imshow(
                np.asarray(image), extent=(left, left + width, base, base - height), interpolation='nearest',
                aspect='equal',
            )  # fmt: skip
            axes.text(
                column + 0.5, base - height - 0.03, caption, ha='center', va='bottom', fontsize=8,
                color=RIGHT if right else WRONG,
            )  # fmt: skip
        axes.set(xlim=(0, columns), ylim=(1.25 * rows, 0))
        return _png(figure)


def reconstructions(triples: Sequence[Sequence[np.ndarray]], caption: str) -> bytes:
    """A sheet of (original, masked, reconstructed) images (H, W, 3) in 0..1, two triples a row, with sharp pixels."""
    titles = ('original', 'masked', 'reconstructed')
    rows = -(-len(triples) // 2)
    with _figure(10.2, 0.9 + 1.7 * rows) as figure:
        grid = figure.subplots(rows, 6, squeeze=False)
        for axes in grid.flat:
            axes.axis('off')
        for place, triple in enumerate(triples):
            row, half = divmod(place, 2)
            for column, image in enumerate(triple):
                axes = grid[row, 3 * half + column]
                axes.imshow(image, interpolation='nearest', vmin=0, vmax=1)
                if row == 0:
                    axes.set_title(titles[column])
        figure.supxlabel('\n'.join(textwrap.wrap(caption, 120)), fontsize=9)
        return _png(figure)


def curves(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], xlabel: str = 'epoch') -> bytes:
    """A panel for each quantity, over epochs: panel title -> name of the line -> (epochs, values)."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _figure(4.6 * columns, 3.6 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.axis('off')
        for axes, (title, lines) in zip(grid.flat, panels.items()):
            for (name, (epochs, values)), colour in zip(lines.items(), COLOURS * len(lines)):
                axes.plot(epochs, values, color=colour, marker='.' if len(epochs) <= 30 else None, label=name)
            axes.set(title=title, xlabel=xlabel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                axes.legend()
        return _png(figure)
