"""Curves of a page, which its script draws: pointing at one shows its numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from . import page

# One colour has one meaning in all pages and plots: right, wrong; training, evaluation, moving average; none of them.
MEANINGS = {name: f'var(--{name})' for name in ('right', 'wrong', 'training', 'evaluation', 'average', 'text', 'soft')}


@dataclasses.dataclass
class Line:
    """A curve.

    Attributes:
        x, y: its points.
        time: seconds after the start of the run at each point, where they are known.
        dashed: drawn so. bare: without markers and numbers, a line to compare with.
        radius: of the marker at each point, in pixels. note: what else is said of each point.
    """

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    time: Sequence[float] | None = None
    dashed: bool = False
    bare: bool = False
    radius: Sequence[float] | None = None
    note: Sequence[str] | None = None


def duration(seconds: float) -> str:
    """A span of time in words: `41 s`, `2 min 5 s`, `3 h 4 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s' if minutes else f'{seconds:.3g} s'


def charts(
    panels: Mapping[str, Sequence[Line]], axis: str = 'epoch', common: bool = False,
    ranges: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> str:  # fmt: skip
    """Panels of curves as HTML: title -> lines.

    Args:
        common: the lines have the same names and colours in all panels, and one legend.
        ranges: [x, y] limits of a panel, by its title.
    """
    drawn: list[dict[str, Any]] = [
        {
            'title': title,
            'lines': [{name: value for name, value in vars(line).items() if value} for line in lines],
            'range': (ranges or {}).get(title),
        }
        for title, lines in panels.items()
    ]
    return page.live('charts-data', {'panels': drawn, 'axis': axis, 'common': common})
