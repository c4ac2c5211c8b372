"""Predictions to read: lines in a terminal, JSON, CSV, and a contact sheet as one HTML file."""

import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..engine.predict import Prediction
from ..files import table
from . import page
from .samples import SIDE


def line(prediction: Prediction, width: int) -> str:
    """One line: the file, then the classes with their scores, best first."""
    if prediction.error:
        return f'{prediction.file:{width}}  not read: {prediction.error}'
    best = '  '.join(f'{name} {100 * score:.1f} %' for name, score in zip(prediction.classes, prediction.scores))
    return f'{prediction.file:{width}}  {best}'


def as_json(predictions: Sequence[Prediction]) -> str:
    """A list of {file, predictions: [{class, label, score}, ...]}, or {file, error}."""
    rows = [
        {'file': found.file, 'error': found.error}
        if found.error
        else {
            'file': found.file,
            'predictions': [
                {'class': name, 'label': label, 'score': round(score, 6)}
                for name, label, score in zip(found.classes, found.labels, found.scores)
            ],
        }
        for found in predictions
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + '\n'


def as_csv(predictions: Sequence[Prediction]) -> str:
    """A row a file: file, class_1, score_1, class_2, ..., error."""
    rows = []
    for found in predictions:
        row: dict[str, object] = {'file': found.file}
        for place, (name, score) in enumerate(zip(found.classes, found.scores), 1):
            row.update({f'class_{place}': name, f'score_{place}': round(score, 6)})
        rows.append({**row, 'error': found.error})
    longest = max(rows, key=len, default={})
    return table(rows, *longest)


def overlay(image: Image.Image, heat: np.ndarray, side: int = 2 * SIDE) -> Image.Image:
    """What the model saw in grey, coloured where it looks: `heat` (h, w) is 0 where it does not and 1 where most."""
    picture = image.convert('RGB').convert('L').convert('RGB')  # Pillow makes no grey of HSV
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC if scale < 4 else Image.Resampling.NEAREST)
    smooth = Image.fromarray((255 * heat).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    share = np.asarray(smooth, dtype=np.float32)[..., None] / 255
    colour = np.array([255, 96, 0], dtype=np.float32) * share + np.asarray(picture, dtype=np.float32) * (1 - share)
    return Image.fromarray(colour.clip(0, 255).astype(np.uint8))


def contact_sheet(title: str, predictions: Sequence[Prediction]) -> str:
    """A page with every picture, its classes and scores, where the model looks, and the files that were not read."""
    cards = ''.join(_card(found) for found in predictions if found.image)
    errors = [(found.file, found.error) for found in predictions if found.error]
    body = [
        f'<h1>{page.escape(title)}</h1>',
        f'<p>{len(predictions) - len(errors):,} pictures, most probable classes first.</p>',
        f'<div class="samples">{cards}</div>',
    ]
    if errors:
        listing = page.table(['file', 'why'], errors, text=2)
        body.append(f'<h2>Not read</h2><div class="card">{listing}</div>')
    return page.page(title, body)


def _card(found: Prediction) -> str:
    assert found.image is not None
    name = page.escape(found.file)
    heat = ''
    if found.heat is not None and found.seen is not None:
        heat = page.picture(overlay(found.seen, found.heat), 'where it looks', 2 * SIDE)
    bars = ''.join(page.bar(guess, 100 * score) for guess, score in zip(found.classes, found.scores))
    return (
        f'<div class="sample">{page.picture(found.image, found.file)}{heat}'
        f'<div class="name file"><span title="{name}">{name}</span></div>{bars}</div>'
    )
