"""Figures as PNG files in memory, in one style. Blue is right, orange is wrong, and nothing else is."""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import Scores
from .samples import TINY

RIGHT, WRONG, GREY, INK = '#2f6db3', '#d9601a', '#6b7280', '#1f2937'
TRAINING, EVALUATION, AVERAGE = '#0f8a6c', '#8a4fb8', '#a8820f'
COLOURS = {'var(--training)': TRAINING, 'var(--evaluation)': EVALUATION, 'var(--average)': AVERAGE}
LARGE = 200  # up to so many classes the cells of the map of all classes have their true size
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


def confusion_matrix(
    matrix: np.ndarray, names: Sequence[str], percent: bool, order: Sequence[int] = (), shown: Sequence[int] = ()
) -> bytes:
    """Heat map of a confusion matrix (C, C): of counts, or of each row in percent.

    What is right and what is wrong have a colour scale each, so that single mistakes are seen.

    Args:
        order: of the classes in the map of all; as they are numbered where it is empty.
        shown: classes that have names and numbers, all where it is empty. Beside fewer than all stands the map.
    """
    count, matrix = len(names), np.nan_to_num(matrix.astype(float))
    order, shown = list(order) or list(range(count)), list(shown) or list(range(count))
    limits = {
        'wrong': (matrix * ~np.eye(count, dtype=bool)).max() or 1,
        'right': matrix.diagonal().max() or 1,
    }
    side, what = max(5.0, 1.5 + 0.36 * len(shown)), 'percent of each true class' if percent else 'counts'
    whole = len(shown) == count
    with _figure(side if whole else 2 * side + 1.2, side) as figure:
        grid = figure.subplots(1, 1 if whole else 2, squeeze=False)[0]
        if not whole:
            drawn = _heat_map(grid[0], matrix[np.ix_(order, order)], limits)
            step = -(-count // 40)
            ticks = range(step // 2, count, step)
            grid[0].set_yticks(ticks, [shorten(names[order[place]], 20) for place in ticks], fontsize=8)
            grid[0].set_xticks([])
            grid[0].set_title(f'All {count:,} classes, similar ones side by side, {what}')
            for part, colours in drawn.items():
                bar = figure.colorbar(colours, ax=grid[0], shrink=0.4, aspect=25, pad=0.02, format='%.3g')
                bar.set_label(f'{part}, {"% of the true class" if percent else "images"}')
                bar.outline.set_visible(False)
        axes, labels = grid[-1], [shorten(names[index], 20) for index in shown]
        _heat_map(axes, matrix[np.ix_(shown, shown)], limits)
        upright = 90 if any(len(label) > 2 for label in labels) else 0
        axes.set_xticks(range(len(shown)), labels, rotation=upright)
        axes.set_yticks(range(len(shown)), labels)
        axes.set_title(f'Confusion matrix, {what}' if whole else f'The {len(shown)} that are confused most, {what}')
        _write_cells(axes, matrix[np.ix_(shown, shown)], percent, limits)
        return _png(figure)


def _heat_map(axes: Any, matrix: np.ndarray, limits: Mapping[str, float]) -> dict[str, Any]:
    """Draw a matrix with a scale for what is wrong and one for what is right; what a colour bar needs of each."""
    count, drawn = len(matrix), {}
    axes.set(xlabel='predicted class', ylabel='true class', xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    axes.set_aspect('equal')
    axes.grid(False)
    axes.tick_params(length=0)
    diagonal = np.eye(count, dtype=bool)
    for part, mask, colours in (('wrong', ~diagonal, 'Oranges'), ('right', diagonal, 'Blues')):
        found = _cells(axes, np.where(mask, matrix, 0.0), colours, limits[part])
        if found is not None:
            drawn[part] = found
    return drawn


def _cells(axes: Any, matrix: np.ndarray, colours: str, largest: float) -> Any:
    """Draw the cells above zero, the largest last; returns what a colour bar needs, or None if there are none."""
    import matplotlib
    from matplotlib.colors import ListedColormap, PowerNorm

    rows, columns = np.nonzero(matrix)
    values = matrix[rows, columns]
    if not len(values):
        return None
    scale = ListedColormap(matplotlib.colormaps[colours](np.linspace(0.12, 0.95, 256)))
    norm = PowerNorm(0.7 if colours == 'Oranges' else 1, 0, largest)  # most mistakes are few
    if len(matrix) <= LARGE:
        shown = np.ma.masked_equal(matrix, 0)
        return axes.imshow(shown, cmap=scale, norm=norm, interpolation='nearest', aspect='equal')
    order = values.argsort(kind='stable')
    size = 7 if colours == 'Oranges' else 1  # points squared; a thin diagonal leaves room for the mistakes beside it
    return axes.scatter(
        columns[order], rows[order], c=values[order], cmap=scale, norm=norm, s=size, marker='s', linewidths=0,
        clip_on=False,
    )  # fmt: skip


def _write_cells(axes: Any, matrix: np.ndarray, percent: bool, limits: Mapping[str, float]) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if value > 0:
            text = f'{value:.0f}' if not percent or value >= 0.95 else f'{value:.1f}'
            dark = value > 0.6 * limits['right' if row == column else 'wrong']
            axes.text(column, row, text, ha='center', va='center', color='white' if dark else '#111827', fontsize=9)


def reliability(scores: Scores) -> bytes:
    """Accuracy against score in each bin, above the histogram of the scores."""
    bins = scores.reliability
    with _figure(6.4, 5.6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=GREY, linestyle='--', linewidth=1, label='perfectly calibrated')
        upper.vlines(bins['score'], bins['score'], bins['accuracy'], color=GREY, alpha=0.4, linewidth=3, label='gap')
        upper.plot(bins['score'], bins['accuracy'], color=INK, linewidth=1.5, label='this model')
        area = 250 * bins['count'] / bins['count'].max()
        upper.scatter(bins['score'], bins['accuracy'], np.maximum(area, 6), color=INK, alpha=0.6, linewidths=0)
        upper.set(ylabel='accuracy (%)', ylim=(-2, 102), xlim=(-2, 102))
        upper.set_title(f'Reliability: expected calibration error {scores.ece:.2f} %; markers by images')
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
    """Bars of F1, with precision and recall, of the classes that have images and the lowest F1."""
    f1, known = scores.per_class['f1'], np.flatnonzero(scores.per_class['support'])
    order = known[f1[known].argsort(kind='stable')][:limit]
    which = '' if len(known) == len(f1) else ' with images'
    with _figure(7.2, 1.4 + 0.24 * len(order)) as figure:
        axes, places = figure.add_subplot(), np.arange(len(order))
        axes.barh(places, f1[order], color='#d1d5db', height=0.7, label='F1')
        for name, marker, face in (('precision', '|', INK), ('recall', 'o', 'none')):
            axes.plot(
                scores.per_class[name][order], places, marker, color=INK, markerfacecolor=face,
                markersize=9 if marker == '|' else 6, markeredgewidth=1.6, label=name, linestyle='none',
            )  # fmt: skip
        axes.set_yticks(places, [shorten(scores.names[index], 32) for index in order])
        axes.set(xlabel='%', xlim=(0, 101), ylim=(len(order) - 0.4, -0.6))
        axes.grid(False, axis='y')
        axes.set_title(
            f'Precision, recall and F1 of each class{which}'
            if len(order) == len(known)
            else f'The {len(order)} classes{which} that have the lowest F1'
        )
        figure.legend(ncols=3, loc='outside lower center')
        return _png(figure)


def _resampling(image: Any) -> str:
    """How a picture is drawn at another size: one that is tiny by whole pixels, a photograph smoothly."""
    return 'nearest' if max(np.asarray(image).shape[:2]) <= TINY else 'antialiased'


def _show(axes: Any, image: np.ndarray, column: int, base: float) -> float:
    """Draw a picture (H, W, ...) in a cell of width 1, above its base; returns where it ends."""
    height, width = (0.94 * side / max(image.shape[:2]) for side in image.shape[:2])
    left = column + (1 - width) / 2
    place = left, left + width, base, base - height
    axes.imshow(image, extent=place, interpolation=_resampling(image), aspect='equal')
    return base - height


def samples(pictures: Sequence[tuple[Any, str, bool]], title: str, columns: int = 6) -> bytes:
    """A sheet of (PIL image, caption, right); the pixels of tiny pictures are sharp."""
    rows = -(-len(pictures) // columns)
    with _figure(1.8 * columns, 0.5 + 2.25 * rows) as figure:
        axes = figure.add_subplot(title=title, xlim=(0, columns), ylim=(1.25 * rows, 0))
        axes.axis('off')
        for place, (image, caption, right) in enumerate(pictures):
            row, column = divmod(place, columns)
            top = _show(axes, np.asarray(image), column, 1.25 * (row + 1))
            axes.text(
                column + 0.5, top - 0.03, caption, ha='center', va='bottom', fontsize=8,
                color=RIGHT if right else WRONG,
            )  # fmt: skip
        axes.set(xlim=(0, columns), ylim=(1.25 * rows, 0))
        return _png(figure)


def reconstructions(triples: Sequence[Sequence[np.ndarray]], caption: str) -> bytes:
    """A sheet of (original, masked, reconstructed) images (H, W, 3) of one size in 0..1, two triples a row."""
    titles = ('original', 'masked', 'reconstructed')
    rows, shape = -(-len(triples) // 2), triples[0][0].shape[:2]
    step = 0.06 + 0.94 * shape[0] / max(shape)
    with _figure(10.2, 0.9 + 1.7 * rows * step) as figure:
        axes = figure.add_subplot()  # one for all: one for each picture takes twice as long
        axes.axis('off')
        for place, triple in enumerate(triples):
            row, half = divmod(place, 2)
            for column, image in enumerate(triple, 3 * half):
                top = _show(axes, image, column, step * (row + 1))
                if row == 0:
                    title = titles[column % 3]
                    axes.text(column + 0.5, top - 0.03, title, ha='center', va='bottom', fontsize=11, weight='bold')
        axes.set(xlim=(0, 6), ylim=(step * rows, 0))
        figure.supxlabel('\n'.join(textwrap.wrap(caption, 120)), fontsize=9)
        return _png(figure)


def curves(panels: Mapping[str, Sequence[Any]], xlabel: str = 'epoch') -> bytes:
    """A panel for each quantity, over epochs: title -> `Line`s, whose colours say what they mean."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _figure(4.6 * columns, 3.6 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.axis('off')
        for axes, (title, lines) in zip(grid.flat, panels.items()):
            for line in lines:
                colour = COLOURS.get(line.colour, line.colour if line.colour[:1] == '#' else INK)
                axes.plot(
                    line.x, line.y, color=colour, linestyle='--' if line.dashed else '-',
                    marker='.' if len(line.x) <= 30 else None, label=line.name,
                )  # fmt: skip
            axes.set(title=title, xlabel=xlabel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                axes.legend()
        return _png(figure)
