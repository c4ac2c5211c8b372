"""Pages that need nothing but themselves: style, script and pictures are inside."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from .samples import SIDE, data_uri, embedded, enlargement


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document."""
    style, script = ((files(__package__) / name).read_text(encoding='utf-8') for name in ('page.css', 'page.js'))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n'
        + '\n'.join(body)
        + f'\n<script>{script}</script>\n</body>\n</html>\n'
    )


def live(kind: str, data: Mapping[str, Any]) -> str:
    """A place of a page that its script fills from `data`, plain values; `kind` says with what."""
    plain = json.loads(json.dumps(data, default=_plain), parse_constant=lambda _: None)  # JSON has no NaN
    text = json.dumps(plain, separators=(',', ':'), ensure_ascii=False)
    for letter in '<>&\u2028\u2029':  # nothing in it ends the element
        text = text.replace(letter, f'\\u{ord(letter):04x}')
    note = '<noscript><p>Scripts are off: the pictures and tables beside this page show the same.</p></noscript>'
    return f'<div class="{kind}"><script type="application/json">{text}</script>{note}</div>'


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f'{type(value).__name__} has no place in a page')


def tiles(values: Mapping[str, str]) -> str:
    """A row of large numbers with their names below."""
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in values.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], text: int = 1, totals: Iterable[Sequence[Any]] = ()
) -> str:
    """A table that sorts by a click on its head, but for its totals.

    The first `text` columns are names, the others numbers.
    """

    def cells(tag: str, values: Iterable[Any]) -> str:
        return ''.join(
            f'<{tag} class="text">{escape(str(value))}</{tag}>' if i < text else f'<{tag}>{_number(value)}</{tag}>'
            for i, value in enumerate(values)
        )

    def lines(tag: str, values: Iterable[Sequence[Any]]) -> str:
        return f'<{tag}>{"".join("<tr>" + cells("td", row) + "</tr>" for row in values)}</{tag}>'

    head = f'<thead><tr>{cells("th", header)}</tr></thead>'
    return f'<div class="scroll"><table>{head}{lines("tbody", rows)}{lines("tfoot", totals)}</table></div>'


def _number(value: Any) -> str:
    if isinstance(value, float):
        return '–' if value != value else f'{value:.2f}'
    return f'{value:,}' if isinstance(value, int) else escape(str(value))


def figure(png: bytes, description: str) -> str:
    """A plot on its own white ground, in a card."""
    return f'<div class="card"><img class="figure" src="{data_uri(png)}" alt="{escape(description)}"></div>'


def picture(image: Image.Image, description: str, side: int = SIDE) -> str:
    """A picture of a data set: one that is tiny enlarged by whole pixels, others as they are or smaller."""
    factor, name = enlargement(image), escape(description)
    size = f' class="tiny" width="{factor * image.width}"' if factor > 1 else ''
    return f'<div class="picture"><img{size} src="{embedded(image, side)}" alt="{name}" title="{name}"></div>'


def bar(name: str, percent: float, kind: str = '') -> str:
    """A class with its score as a number and as a bar."""
    return (
        f'<div class="name"><span title="{escape(name)}">{escape(name)}</span><span>{percent:.1f} %</span></div>'
        f'<div class="bar"><i class="{kind}" style="width:{percent:.1f}%"></i></div>'
    )
