"""Figures as PNG files in memory, in one style. Blue is right or training, orange is wrong or evaluation."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import Scores

RIGHT, WRONG, GREY = '#2f6db3', '#d9601a', '#6b7280'
COLOURS = (RIGHT, WRONG, '#2a9d6f', '#8a5cb8', '#b08a1e', GREY)
STYLE: dict[Any, Any] = {
    'font.size': 10, 'axes.titlesize': 11, 'axes.titleweight': 'bold', 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.edgecolor': GREY, 'axes.grid': True, 'grid.color': '#e5e7eb',
    'grid.linewidth': 0.8, 'axes.axisbelow': True, 'xtick.color': '#374151', 'ytick.color': '#374151',
    'axes.labelcolor': '#111827', 'legend.frameon': False, 'text.parse_math': False,
    'savefig.dpi': 150, 'figure.constrained_layout.use': True,
}  # fmt: skip
NAMED, WRITTEN = 60, 25  # up to so many classes a matrix has names on its axes, and a number in each cell


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

    A small matrix has names and numbers; in a large one every cell is at least two pixels wide, and colour is
    logarithmic, so that single mistakes are seen.
    """
    from matplotlib.colors import LogNorm, Normalize

    count = len(names)
    side = 3.2 + (0.42 * count if count <= WRITTEN else 0.2 * count if count <= NAMED else max(7, count * 2 / 150))
    side = max(5.0, side)
    with _figure(side + 0.8, side) as figure:
        axes = figure.add_subplot()
        top = 100.0 if percent else max(float(np.nanmax(matrix)), 1.0)
        shown: Any = matrix.astype(float)
        norm: Any = Normalize(0, top)
        if count > WRITTEN:
            lowest = max(float(shown[shown > 0].min(initial=top)), top / 1e4)
            shown, norm = np.ma.masked_less_equal(np.nan_to_num(shown), 0), LogNorm(min(lowest, top / 2), top)
        image = axes.imshow(shown, cmap='Blues', norm=norm, interpolation='nearest')
        bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02, format='%g')
        bar.set_label('% of the true class' if percent else 'images')
        bar.outline.set_visible(False)
        axes.set(xlabel='predicted class', ylabel='true class')
        axes.set_title(f'Confusion matrix, {"percent of each true class" if percent else "counts"}')
        axes.grid(False)
        if count <= NAMED:
            size = 10 if count <= WRITTEN else 7
            labels = [shorten(name, 18) for name in names]
            straight = all(len(label) <= 2 for label in labels)
            axes.set_xticks(range(count), labels, fontsize=size, rotation=0 if straight else 90)
            axes.set_yticks(range(count), labels, fontsize=size)
            axes.tick_params(length=0)
        if count <= WRITTEN:
            _write_cells(axes, matrix, top, percent)
        return _png(figure)


def _write_cells(axes: Any, matrix: np.ndarray, top: float, percent: bool) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if value > 0:
            text = f'{value:.0f}' if not percent or value >= 0.95 else f'{value:.1f}'
            colour = 'white' if value > 0.5 * top else '#111827'
            axes.text(column, row, text, ha='center', va='center', color=colour, fontsize=8)


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
        axes.set_title('Classes' if len(order) == len(f1) else f'The {len(order)} classes with the lowest F1')
        figure.legend(ncols=3, loc='outside lower center')
        return _png(figure)


def samples(pictures: Sequence[tuple[Any, str, bool]], title: str, columns: int = 6) -> bytes:
    """A sheet of (PIL image, caption, right) with sharp pixels."""
    rows = -(-len(pictures) // columns)
    with _figure(1.75 * columns, 0.5 + 2.25 * rows) as figure:
        figure.suptitle(title, fontweight='bold')
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis('off')
        for axes, (image, caption, right) in zip(grid.flat, pictures):
            axes.imshow(np.asarray(image.convert('RGB')), interpolation='nearest')
            axes.set_title(caption, fontsize=8, fontweight='normal', color=RIGHT if right else WRONG)
        return _png(figure)


def curves(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> bytes:
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
            axes.set(title=title, xlabel='epoch')
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                axes.legend()
        return _png(figure)
