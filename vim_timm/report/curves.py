"""Curves of a training run: `python -m vim_timm.report.curves RUN_FOLDER` draws them from its summary.csv."""

import argparse
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, explain, run
from ..files import write_atomically
from . import page, plots
from .extras import require

TITLES = {'loss': 'loss', 'accuracy': 'accuracy (%)', 'lr': 'learning rate', 'skipped': 'updates skipped (total)'}
PREFIXES = {'train': 'training', 'eval': 'evaluation', 'ema': 'moving average'}


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """What to draw of a run's log: panel title -> name of the line -> (epochs, values)."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {'loss': {}, 'accuracy (%)': {}, 'learning rate': {}}
    for column in dict.fromkeys(name for row in rows for name in row if name != 'epoch'):
        prefix, _, metric = column.partition('_') if column.startswith(tuple(PREFIXES)) else ('', '', column)
        points = [(int(row['epoch']), float(row[column])) for row in rows if row.get(column) not in (None, '')]
        if not points or (column == 'skipped' and not points[-1][1]):
            continue
        title = 'accuracy (%)' if metric in ('top1', 'top5') else TITLES.get(metric, metric)
        line = ' '.join(
            filter(None, (PREFIXES.get(prefix), metric.replace('top', 'top-') if metric[:3] == 'top' else ''))
        )
        epochs, values = zip(*points)
        found.setdefault(title, {})[line or title] = (list(epochs), list(values))
    return {title: lines for title, lines in found.items() if lines}


def write_curves(folder: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write curves.png and curves.html into a run's folder and return the page's path.

    Args:
        rows: the run's log, one mapping an epoch, as in summary.csv.

    Raises:
        UserError: matplotlib is missing.
    """
    require(['matplotlib'])
    png = plots.curves(panels(rows))
    path = os.path.join(folder, 'curves.html')
    write_atomically(os.path.join(folder, 'curves.png'), png)
    write_atomically(path, _page(os.path.basename(os.path.abspath(folder)), rows, png))
    return path


def _page(name: str, rows: Sequence[Mapping[str, Any]], png: bytes) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    listing = page.table(columns, ([_cell(row.get(column)) for column in columns] for row in rows), text=0)
    return page.page(
        f'Training {name}',
        [
            f'<h1>{page.escape(f"Training {name}")}</h1><nav></nav>',
            page.tiles(_headline(rows)),
            '<h2>Curves</h2>',
            page.figure(png, 'training curves'),
            f'<h2>Epochs</h2><div class="card">{listing}</div>',
        ],
    )


def _cell(value: Any) -> str:
    return '–' if value in (None, '') else f'{float(value):.6g}'


def _headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    tiles = {'epochs': str(len(rows))}
    for column, title in (('eval_top1', 'best top-1 accuracy'), ('ema_top1', 'best top-1 of the moving average')):
        known = [(float(row[column]), int(row['epoch'])) for row in rows if row.get(column) not in (None, '')]
        if known:
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
