"""Runs of training side by side: curves over each other, settings that differ, best numbers, on one page."""

import csv
import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from ..errors import UserError, explain
from . import page
from .chart import Line, charts, duration

COLOURS = (
    '#3b6fd4', '#e0567a', '#1f9e89', '#b8860b', '#8e5bd0', '#5f9e3a', '#c46a2b', '#3c9dc8', '#a1459b', '#7a7f87',
)  # fmt: skip
PREFIXES = {'train': 'training', 'eval': 'evaluation', 'ema': 'moving average'}
NAMES = {'top1': 'top-1 (%)', 'top5': 'top-5 (%)', 'lr': 'learning rate', 'images_per_second': 'images a second'}
ERRORS = ('mse', 'rmse', 'mae', 'err', 'error')
OF_A_RUN = ('output', 'experiment', 'resume', 'workers', 'log_interval')  # settings that change no number


@dataclasses.dataclass
class Run:
    """A run as its folder tells of it.

    Attributes:
        rows: of summary.csv, numbers where there are any.
        settings: of args.yaml; empty where there is none.
    """

    name: str
    rows: list[dict[str, float]]
    settings: dict[str, Any]

    def best(self, column: str) -> tuple[float, int] | None:
        """The best finite value of a column and its epoch; None where it has none."""
        known = [(row[column], int(row['epoch'])) for row in self.rows if math.isfinite(row.get(column, math.nan))]
        sign = -1 if less_is_better(column) else 1
        return max(known, key=lambda pair: (sign * pair[0], -pair[1])) if known else None


def less_is_better(column: str) -> bool:
    """Whether a column of a log is a loss or an error; PSNR of an error is not."""
    words = column.split('_')
    return 'loss' in column or ('psnr' not in words and any(word in words for word in ERRORS))


def read_run(path: str) -> Run:
    """The run in a folder, or in that of a file of it.

    Raises:
        UserError: there is no log of a run, or it cannot be read.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    log, settings = os.path.join(folder, 'summary.csv'), os.path.join(folder, 'args.yaml')
    if not os.path.isfile(log):
        raise UserError(f'{path} is no folder of a run: it has no summary.csv')
    with explain(log), open(log, newline='', encoding='utf-8') as file:
        rows = [
            {name: float(value) for name, value in row.items() if name and value not in (None, '')}
            for row in csv.DictReader(file)
        ]
    if not all('epoch' in row for row in rows):
        raise UserError(f'{log} is no log of a run: it has no column epoch')
    known: Any = {}
    if os.path.isfile(settings):
        with explain(settings), open(settings, encoding='utf-8') as file:
            known = yaml.safe_load(file)
    name = os.path.basename(os.path.abspath(folder))
    return Run(name, rows, known if isinstance(known, dict) else {})


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in folders; those of one name have their paths for names."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for run, path in zip(runs, paths):
        if names.count(run.name) > 1:
            run.name = os.path.normpath(path)
    return runs


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings in which runs differ, by name: the value of each run, `–` where it has none."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in OF_A_RUN)
    unset = (None, '')
    values = {
        name: ['–' if (value := run.settings.get(name)) in unset else value for run in runs] for name in sorted(names)
    }
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def title_of(column: str) -> str:
    """A column of a log in words."""
    prefix, _, metric = column.partition('_')
    if prefix not in PREFIXES:
        return NAMES.get(column, column)
    return f'{PREFIXES[prefix]} {NAMES.get(metric, metric)}'


def _columns(runs: Sequence[Run]) -> list[str]:
    """Columns to draw, those of the evaluation first."""
    columns = dict.fromkeys(name for run in runs for row in run.rows for name in row if name not in ('epoch', 'time'))
    shown = [name for name in columns if name != 'skipped' or any(run.rows[-1].get(name) for run in runs)]
    order = ('eval', 'ema', 'train')
    return sorted(
        shown,
        key=lambda name: order.index(name.partition('_')[0]) if name.partition('_')[0] in order else len(order),
    )


def panels(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """A panel for each column of the logs, with a line a run, of one colour in all."""
    found = {}
    for column in _columns(runs):
        lines = []
        for place, run in enumerate(runs):
            rows = [row for row in run.rows if column in row]
            if rows:
                times = [row['time'] for row in rows if 'time' in row]
                colour, again = COLOURS[place % len(COLOURS)], place >= len(COLOURS)
                lines.append(
                    Line(
                        run.name, colour, [int(row['epoch']) for row in rows], [row[column] for row in rows],
                        times if len(times) == len(rows) else None, dashed=again,
                    )
                )  # fmt: skip
        found[title_of(column)] = lines
    return found


def best_numbers(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """A table of the best numbers: its head, a row a run, and the places (row, column) of the best of all."""
    columns = [name for name in _columns(runs) if name.partition('_')[0] in ('eval', 'ema', 'train')]
    head = ['run', 'epochs', 'time', 'images a second, the median epoch', *map(title_of, columns)]
    rows, winners = [], set()
    for run in runs:
        last, rates = run.rows[-1], [row['images_per_second'] for row in run.rows if 'images_per_second' in row]
        row = [run.name, f'{len(run.rows)}', duration(last['time']) if 'time' in last else '–']
        row.append(f'{statistics.median(rates):,.0f}' if rates else '–')
        found = [run.best(column) for column in columns]
        rows.append([*row, *('–' if best is None else f'{best[0]:.5g} (epoch {best[1]})' for best in found)])
    for place, column in enumerate(columns):
        values = {number: best[0] for number, run in enumerate(runs) if (best := run.best(column))}
        if len(values) > 1:
            top = (min if less_is_better(column) else max)(values.values())
            winners |= {(number, place + 4) for number, value in values.items() if value == top}
    return head, rows, winners


def comparison_page(runs: Sequence[Run]) -> str:
    """The page."""
    title = f'{len(runs)} runs compared'
    table = _table(*_turned(*best_numbers(runs)))
    differences = differing(runs)
    silent = [run.name for run in runs if not run.settings]
    body = [
        f'<h1>{page.escape(title)}</h1>',
        '<nav><a href="#best">Best numbers</a><a href="#curves">Curves</a><a href="#settings">Settings</a></nav>',
        '<h2 id="best">Best numbers</h2>',
        f'<div class="card">{table}</div>',
        '<h2 id="curves">Curves</h2>',
        '<p>Point at a curve: its numbers. Click a name: it goes, and comes again.</p>',
        charts(panels(runs), common=True),
        '<h2 id="settings">Settings that differ</h2>',
    ]
    if silent:
        body.append(f'<p>{page.escape(", ".join(silent))}: no args.yaml says the settings.</p>')
    if differences:
        listing = page.table(
            ['setting', *(run.name for run in runs)],
            ([name, *map(_value, values)] for name, values in differences.items()), text=len(runs) + 1,
        )  # fmt: skip
        body.append(f'<div class="card">{listing}</div>')
    else:
        body.append('<p>None.</p>')
    return page.page(title, body)


def _value(value: Any) -> str:
    return '–' if value is None or value == '' else f'{value:g}' if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], best: set[tuple[int, int]]) -> str:
    """A table that sorts by a click on its head, with the best values of all in bold."""

    def cells(number: int, row: Sequence[str]) -> str:
        marks = (' class="best"' if (number, place) in best else '' for place in range(len(row)))
        return ''.join(f'<td{mark}>{page.escape(value)}</td>' for mark, value in zip(marks, row))

    names = ''.join(f'<th>{page.escape(name)}</th>' for name in head)
    body = ''.join(f'<tr>{cells(number, row)}</tr>' for number, row in enumerate(rows))
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def as_text(runs: Sequence[Run]) -> str:
    """The best numbers as lines for a terminal, a column a run."""
    head, rows, winners = _turned(*best_numbers(runs))
    table = [head]
    for i, row in enumerate(rows):
        table.append([f'{value} *' if (i, j) in winners else value for j, value in enumerate(row)])
    widths = [max(len(row[place]) for row in table) for place in range(len(head))]
    return '\n'.join('  '.join(f'{value:{width}}' for value, width in zip(row, widths)).rstrip() for row in table)


def _turned(
    head: Sequence[str], rows: Sequence[Sequence[str]], winners: set[tuple[int, int]]
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """The table of best numbers with a column a run, which fits a narrow window."""
    first, *rest = zip(head, *rows)
    return list(first), [list(row) for row in rest], {(place - 1, number + 1) for number, place in winners}
