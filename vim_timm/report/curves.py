"""Curves of a training run: `python -m vim_timm.report.curves RUN_FOLDER` draws them from its summary.csv."""

import argparse
import csv
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, explain, run
from ..files import write_atomically
from . import page, plots
from .chart import MEANINGS, Line, charts, duration
from .extras import require

TITLES = {
    'loss': 'loss', 'accuracy': 'accuracy (%)', 'lr': 'learning rate', 'skipped': 'updates skipped (total)',
    'images_per_second': 'images a second',
}  # fmt: skip
PREFIXES = {'train': 'training', 'eval': 'evaluation', 'ema': 'moving average'}
COLOURS = {'train': MEANINGS['training'], 'eval': MEANINGS['evaluation'], 'ema': MEANINGS['average']}


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Line]]:
    """What to draw of a run's log: panel title -> lines over epochs, and over time where the log has it."""
    found: dict[str, list[Line]] = {'loss': [], 'accuracy (%)': [], 'learning rate': []}
    for column in dict.fromkeys(name for row in rows for name in row if name not in ('epoch', 'time')):
        prefix, _, metric = column.partition('_') if column.startswith(tuple(PREFIXES)) else ('', '', column)
        known = [row for row in rows if row.get(column) not in (None, '')]
        values = [float(row[column]) for row in known]
        if not known or (column == 'skipped' and not values[-1]):
            continue
        title = 'accuracy (%)' if metric in ('top1', 'top5') else TITLES.get(metric, metric)
        name = ' '.join(
            filter(None, (PREFIXES.get(prefix), metric.replace('top', 'top-') if metric[:3] == 'top' else ''))
        )
        times = [row.get('time') for row in known]
        found.setdefault(title, []).append(
            Line(
                name or title, COLOURS.get(prefix, MEANINGS['text']), [int(row['epoch']) for row in known], values,
                None if None in times or '' in times else [float(time) for time in times],  # type: ignore[arg-type]
                dashed=metric == 'top5',
            )
        )  # fmt: skip
    return {title: lines for title, lines in found.items() if lines}


def write_curves(folder: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write curves.png and curves.html into a run's folder and return the page's path.

    Args:
        rows: the run's log, one mapping an epoch, as in summary.csv.

    Raises:
        UserError: matplotlib is missing.
    """
    require(['matplotlib'])
    path = os.path.join(folder, 'curves.html')
    write_atomically(os.path.join(folder, 'curves.png'), plots.curves(panels(rows)))
    write_atomically(path, _page(os.path.basename(os.path.abspath(folder)), rows))
    return path


def _page(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    listing = page.table(columns, ([_cell(row.get(column)) for column in columns] for row in rows), text=0)
    return page.page(
        f'Training {name}',
        [
            f'<h1>{page.escape(f"Training {name}")}</h1><nav></nav>',
            page.tiles(_headline(rows)),
            '<h2>Curves</h2>',
            charts(panels(rows)),
            f'<h2>Epochs</h2><div class="card">{listing}</div>',
        ],
    )


def _cell(value: Any) -> str:
    return '–' if value in (None, '') else f'{float(value):.6g}'


def _headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    tiles = {'epochs': str(len(rows))}
    if rows and rows[-1].get('time') not in (None, ''):
        tiles['training and evaluation'] = duration(float(rows[-1]['time']))
    rates = [float(row['images_per_second']) for row in rows if row.get('images_per_second') not in (None, '')]
    if rates:
        tiles['images a second, the median epoch'] = f'{statistics.median(rates):,.0f}'
    for column, title in (('eval_top1', 'best top-1 accuracy'), ('ema_top1', 'best top-1 of the moving average')):
        values = [(float(row[column]), int(row['epoch'])) for row in rows if row.get(column) not in (None, '')]
        if known := [pair for pair in values if math.isfinite(pair[0])]:
            value, epoch = max(known, key=lambda pair: (pair[0], -pair[1]))
            tiles[f'{title}, epoch {epoch}'] = f'{value:.2f} %'
    return tiles


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def body(arguments: Sequence[str]) -> None:
        parser = argparse.ArgumentParser('vim_timm.report.curves', description=__doc__)
        parser.add_argument('folder', help='folder of a training run, with its summary.csv')
        folder = parser.parse_args(arguments).folder
        path = os.path.join(folder, 'summary.csv')
        with explain(path), open(path, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise UserError(f'{path} holds no epoch yet')
        print(write_curves(folder, rows))

    return run(body, 'curves', argv)


if __name__ == '__main__':
    sys.exit(main())
