"""Pages that need nothing but themselves: style, script and pictures are inside."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .metrics import Scores
from .samples import data_uri

STYLE = """
:root { color-scheme: light dark; --text: #1f2937; --soft: #6b7280; --ground: #f6f7f9; --card: #fff; --line: #e2e5ea;
  --right: #2f6db3; --wrong: #d9601a; }
@media (prefers-color-scheme: dark) { :root { --text: #e5e7eb; --soft: #9ca3af; --ground: #14171c; --card: #1d2128;
  --line: #333944; --right: #6ba6e8; --wrong: #f08a4b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
p { margin: .3rem 0 .8rem; color: var(--soft); max-width: 75ch; }
nav { display: flex; flex-wrap: wrap; margin: .6rem 0 1.2rem; }
nav a { color: var(--right); margin-right: 1rem; text-decoration: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: .7rem; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  overflow-x: auto; min-width: 0; }
.tile { padding: .8rem .9rem; }
.tile b { display: block; font-size: 1.3rem; line-height: 1.3; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.narrow { max-width: 720px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: .8rem;
  align-items: start; }
.figure { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; }
.scroll { overflow: auto; max-height: 560px; }
.matrix { cursor: zoom-in; }
.whole { width: auto; max-width: none; cursor: zoom-out; image-rendering: pixelated; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; white-space: normal; }
thead th { position: sticky; top: 0; background: var(--card); cursor: pointer; }
tfoot { position: sticky; bottom: 0; background: var(--card); color: var(--soft); }
tfoot tr:first-child td { box-shadow: inset 0 2px 0 var(--line); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .7rem; }
.sample { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--right); padding: .55rem;
  border-radius: 8px; font-size: .8rem; min-width: 0; }
.sample.wrong { border-top-color: var(--wrong); }
.sample img { display: block; width: 100%; height: 130px; object-fit: contain; image-rendering: pixelated;
  margin-bottom: .4rem; }
.sample .name { display: flex; justify-content: space-between; gap: .4rem; }
.sample .name span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
.bar { height: 4px; border-radius: 2px; background: var(--line); margin-bottom: .25rem; }
.bar i { display: block; height: 4px; border-radius: 2px; background: var(--soft); }
.bar i.true { background: var(--right); }
.bar i.first { background: var(--wrong); }
"""
SCRIPT = """
document.querySelectorAll('.matrix').forEach(image => { image.onclick = () => image.classList.toggle('whole'); });
const value = (row, place) => { const text = row.cells[place].textContent, number = parseFloat(text);
  return isNaN(number) ? text : number; };
const compare = (x, y) => typeof x === typeof y && typeof x === 'number' ? x - y : String(x).localeCompare(String(y));
document.querySelectorAll('thead th').forEach(head => { head.onclick = () => {
  const body = head.closest('table').tBodies[0], up = head.dataset.up = head.dataset.up ? '' : '1';
  const order = (a, b) => compare(value(a, head.cellIndex), value(b, head.cellIndex));
  const rows = [...body.rows].sort(order);
  body.append(...(up ? rows : rows.reverse()));
}; });
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        + '\n'.join(body)
        + f'\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


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
    return escape(str(value))


def figure(png: bytes, description: str, kind: str = '') -> str:
    """A picture on its own white ground, in a card."""
    image = f'<img class="{f"figure {kind}".strip()}" src="{data_uri(png)}" alt="{escape(description)}">'
    return f'<div class="card">{image}</div>'


def evaluation(
    row: Mapping[str, Any],
    facts: Mapping[str, Any],
    scores: Scores,
    pairs: Sequence[Mapping[str, Any]],
    shown: Mapping[str, Sequence[Mapping[str, Any]]],
    pngs: Mapping[str, bytes],
) -> str:
    """The page of an evaluation."""
    title = f'Evaluation of {row["model"]}'
    body = [
        f'<h1>{escape(title)}</h1>',
        '<nav><a href="#classes">Classes</a><a href="#confusion">Confusion</a><a href="#samples">Samples</a>'
        '<a href="#calibration">Calibration</a><a href="#settings">Settings</a></nav>',
        tiles(_headline(row, facts, scores)),
        '<h2 id="classes">Classes</h2>',
        _classes(scores, pngs['per_class']),
        '<h2 id="confusion">Confusion</h2>',
        *_confusion(scores, pairs, pngs),
        '<h2 id="samples">Samples</h2>',
        *_samples(shown),
        '<h2 id="calibration">Calibration</h2>',
        '<p>Where the line is below the diagonal the model is surer than it is right. The expected calibration error '
        'is the mean gap over 15 bins, weighted by their images.</p>',
        f'<div class="columns">{figure(pngs["reliability"], "reliability diagram")}'
        f'<div class="card">{_bins(scores)}</div></div>',
        '<h2 id="settings">Settings</h2>',
        f'<div class="card">{table(["name", "value"], {**facts, **row}.items(), text=2)}</div>',
    ]
    return page(title, body)


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
    rows = zip(range(len(scores.names)), scores.names, *columns)
    support = int(scores.per_class['support'].sum())
    averages = [('', f'{name} average', *values.values(), support) for name, values in scores.averages.items()]
    listing = table(['#', 'class', 'precision', 'recall', 'F1', 'images'], rows, text=2, totals=averages)
    return f'<div class="columns">{figure(png, "precision, recall and F1")}<div class="card">{listing}</div></div>'


def _confusion(scores: Scores, pairs: Sequence[Mapping[str, Any]], pngs: Mapping[str, bytes]) -> list[str]:
    matrices = [figure(pngs[name], name.replace('_', ' '), 'matrix') for name in pngs if name.startswith('confusion')]
    parts = [
        '<p>Rows are true classes, columns predicted ones; what is off the diagonal is wrong. Click a matrix to see '
        'all of its pixels.</p>',
        f'<div class="columns">{"".join(matrices)}</div>',
    ]
    if pairs:
        rows = [(pair['true'], pair['predicted'], pair['count'], pair['percent']) for pair in pairs]
        listing = table(['true', 'predicted', 'images', '% of true class'], rows, text=2)
        parts += [f'<h2>Most confused</h2><div class="card narrow">{listing}</div>']
    return parts


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
        lines.append(bar(guess['class'], guess['score'], kind))
    return (
        f'<div class="sample {"right" if sample["right"] else "wrong"}"><img src="{data_uri(sample["picture"])}" '
        f'alt="{escape(sample["image"])}" title="{escape(sample["image"])}">'
        f'<div class="name"><span>true: <b>{escape(sample["true"])}</b></span></div>{"".join(lines)}</div>'
    )


def bar(name: str, percent: float, kind: str = '') -> str:
    """A class with its score as a number and as a bar."""
    return (
        f'<div class="name"><span title="{escape(name)}">{escape(name)}</span><span>{percent:.1f} %</span></div>'
        f'<div class="bar"><i class="{kind}" style="width:{percent:.1f}%"></i></div>'
    )


def _bins(scores: Scores) -> str:
    columns = scores.reliability
    rows = zip(columns['score'].tolist(), columns['accuracy'].tolist(), columns['count'].tolist())
    return table(['mean score (%)', 'accuracy (%)', 'images'], ([f'{score:.1f}', *rest] for score, *rest in rows))
