"""Logs of runs without what depends on the machine."""

import csv
import io
import json

OF_THE_MACHINE = ('time', 'images_per_second')


def settled(rows):
    """The rows of a log without time and speed."""
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


def log_of(folder):
    """What summary.csv and summary.json of a run say, without time and speed."""
    table = csv.DictReader(io.StringIO((folder / 'summary.csv').read_text()))
    return settled(table), settled(json.loads((folder / 'summary.json').read_text()))
